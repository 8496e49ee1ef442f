"""`Gap`: how far the trainer's log-probabilities are from those of the sampler that drew the tokens.

With the policy that drew, they differ by rounding alone, and by what the two programs do otherwise: the train-inference
gap. With a policy that has moved on since (`max_staleness`), its move counts as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .measures import Measures


class Gap:
    """Collects the tokens of a batch, piece by piece. cap: ratios above it are cut; None: none is"""

    def __init__(self, cap: float | None) -> None:
        self.cap: float | None = cap
        self._batch: list[tuple[Tensor, Tensor]] = []  # (|log ratio|, ratio) of tokens

    def add(self, log_probs: Tensor, sampled: Tensor, mask: Tensor) -> None:
        """Take a piece. log_probs, sampled: [B, C], of the trainer and the sampler; mask: [B, C] bool"""
        difference = (log_probs.detach() - sampled)[mask].double()
        self._batch.append((difference.abs().cpu(), difference.exp().cpu()))

    def end_of_batch(self, measures: Measures, stale: int) -> dict[str, float]:
        """Note the means and the largest ratio of the batch, and let the watch look at them. Returns the numbers.

        stale: updates between the policy that drew and the one that was trained
        """
        if not self._batch:
            return {}
        gaps, ratios = (torch.cat(parts) for parts in zip(*self._batch, strict=True))
        self._batch.clear()
        if not len(gaps):
            return {}
        cut = 0.0 if self.cap is None else (ratios > self.cap).double().mean().item()
        found = {
            "sampler_gap": gaps.mean().item(),
            "importance": ratios.mean().item(),
            "importance_max": ratios.max().item(),
            "importance_cut": cut,
            "staleness": float(stale),
        }
        for name, value in found.items():
            measures.metric(name, value)
        measures.watch.sampler(found["sampler_gap"], found["importance_max"], cut, stale)
        return found
