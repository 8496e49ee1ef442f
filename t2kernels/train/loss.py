"""The loss of REINFORCE with a KL penalty, on log-probabilities. Functions of tensors: no model, no expert."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_pi: Tensor, log_base: Tensor, direction: str = "reverse") -> Tensor:
    """The exact KL of each position over the whole vocabulary.

        "reverse"  Σ_v pi_v (log pi_v - log base_v)
        "forward"  Σ_v base_v (log base_v - log pi_v)

    log_pi, log_base: [B, C, vocabulary], log-probabilities
    Returns [B, C].
    """
    p, q = (log_pi, log_base) if direction == "reverse" else (log_base, log_pi)
    return (p.exp() * (p - q)).sum(-1)


def reinforce_loss(
    token_log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Σ_i weights_i (-A_i Σ_t log pi(y_it) + kl_coef Σ_t KL_it)        (arXiv 2501.06252, section 3.1, equation 2)

    token_log_probs, kl: [B, C]; values outside `mask` do not count and may be anything, NaN included
    mask: [B, C] bool
    advantages: [B]; weights: [B], 1/B for a mean
    Returns a scalar.
    """
    per_row = -advantages * torch.where(mask, token_log_probs, 0).sum(1)
    if kl is not None:
        per_row = per_row + kl_coef * torch.where(mask, kl, 0).sum(1)
    return (weights * per_row).sum()
