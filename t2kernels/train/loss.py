"""The loss of REINFORCE with a KL penalty, on log-probabilities. Functions of tensors: no model, no expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

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
    terms = p.exp() * (p - q)
    return torch.where(p == -torch.inf, 0, terms).sum(-1)  # 0 log 0 = 0


def row_weights(kind: str, lengths: Sequence[int], groups: Sequence[Hashable], longest: int) -> list[float]:
    """What the sum over a completion's tokens counts in the loss, for each row; per expert ("group") of n rows.

        "sum"      1 / n                the sum over tokens: the gradient of the expected reward
        "grpo"     1 / (n |y_i|)        the mean over a completion's tokens (GRPO, arXiv 2402.03300)
        "dapo"     1 / Σ_j |y_j|        the mean over all tokens (DAPO, arXiv 2503.14476)
        "dr_grpo"  1 / (n longest)      a constant (Dr. GRPO, arXiv 2503.20783): no bias towards length

    lengths: |y_i|, tokens of each completion, at least 1; longest: the longest that a completion may be
    """
    counts, tokens = Counter(groups), Counter[Hashable]()
    for group, length in zip(groups, lengths, strict=True):
        tokens[group] += length
    by_kind = {
        "sum": lambda length, group: counts[group],
        "grpo": lambda length, group: counts[group] * length,
        "dapo": lambda length, group: tokens[group],
        "dr_grpo": lambda length, group: counts[group] * longest,
    }
    return [1 / by_kind[kind](length, group) for length, group in zip(lengths, groups, strict=True)]


def importance_ratio(log_probs: Tensor, sampled: Tensor, mask: Tensor, cap: float | None = None) -> Tensor:
    """min(pi(y_it) / mu(y_it), cap): what a token counts that another policy drew, mu the sampler's own probability.

    log_probs: [B, C] log pi, of the policy in training; sampled: [B, C] log mu; mask: [B, C] bool
    cap: truncated importance sampling, the rho of IMPALA (arXiv 1802.01561, section 4.1); None: not cut
    Returns [B, C] without a gradient, 1 outside `mask`.
    """
    ratio = torch.where(mask, log_probs.detach() - sampled, 0).exp()
    return ratio if cap is None else ratio.clamp(max=cap)


def reinforce_loss(
    token_log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    old: Tensor | None = None,
    clip: float | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Σ_i weights_i (-Σ_t a_it + kl_coef Σ_t KL_it)        (arXiv 2501.06252, section 3.1, equation 2)

        a_it = A_i log pi(y_it), or for samples of an older policy, with ratio_it = pi(y_it) / old(y_it)
        a_it = min(ratio_it A_i, cut(ratio_it, 1 - clip, 1 + clip) A_i)       (PPO, arXiv 1707.06347, equation 7)

    token_log_probs, kl, old: [B, C]; values outside `mask` do not count and may be anything, NaN included
    mask: [B, C] bool
    advantages: [B]; weights: [B], 1/B for a mean
    old: log-probabilities under the policy that the samples were drawn from; clip: more than 0, or None: no cut
    importance: [B, C] factors of a_it, from `importance_ratio`, for tokens that another policy drew; None: 1
    Returns a scalar.
    """
    log_probs = torch.where(mask, token_log_probs, 0)
    A = advantages[:, None]
    if old is None:
        gain = log_probs * A
    else:
        ratio = (log_probs - torch.where(mask, old, 0)).exp()
        gain = ratio * A if clip is None else torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if importance is not None:
        gain = importance * gain
    per_row = -torch.where(mask, gain, 0).sum(1)
    if kl is not None:
        per_row = per_row + kl_coef * torch.where(mask, kl, 0).sum(1)
    return (weights * per_row).sum()
