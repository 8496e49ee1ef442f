"""The best experts of a run so far, in memory: an expert is small."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class BestExperts:
    """The parameters that each expert had when it was best."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, int, dict[str, Tensor]]] = {}

    def offer(self, name: str, value: float, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember an expert if `value` is more than ever before. Of two equal ones the earlier stays."""
        if name not in self._kept or value > self._kept[name][0]:
            self._kept[name] = (value, step, {key: p.detach().clone() for key, p in parameters.items()})

    @torch.no_grad()
    def restore(self, name: str, parameters: Mapping[str, nn.Parameter]) -> int | None:
        """Give the parameters their best values. Returns the step of them; None if nothing was offered."""
        if name not in self._kept:
            return None
        _, step, values = self._kept[name]
        for key, p in parameters.items():
            p.copy_(values[key])
        return step
