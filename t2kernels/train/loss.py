"""The loss of REINFORCE with a KL penalty, on logits of completions. Plain functions of tensors: no model, no expert."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the vocabulary, in at least fp32; temperature 0 (greedy rollouts) counts as 1.

    logits: [B, C, vocabulary]; the result likewise
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def kl_divergence(log_pi: Tensor, log_base: Tensor, direction: str = "reverse") -> Tensor:
    """[B, C], the exact KL of each position over the whole vocabulary: "reverse" Σ_v pi (log pi - log base), "forward" Σ_v base (log base - log pi).

    log_pi, log_base: [B, C, vocabulary], log-probabilities
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
    """Σ_i weights_i (-A_i Σ_t log pi(y_it) + kl_coef Σ_t KL_it), the paper's objective (arXiv 2501.06252, section 3.1, equation 2).

    token_log_probs, kl: [B, C], only where mask [B, C] bool is set: values elsewhere may be anything, NaN included
    advantages: [B]; weights: [B], 1/B for a mean
    """
    per_row = -advantages * torch.where(mask, token_log_probs, 0).sum(1)
    if kl is not None:
        per_row = per_row + kl_coef * torch.where(mask, kl, 0).sum(1)
    return (weights * per_row).sum()
