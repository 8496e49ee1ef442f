"""An expert as one row of numbers: z of all matrices side by side, [C], in model order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .expert import Expert
from .origin import Origin
from .table import Slot


def flatten(slots: Sequence[Slot], origin: Origin, expert: Expert, max_error: float, name: str) -> tuple[Tensor, float]:
    """z - 1 over all columns [C], zero where the expert says nothing, and the worst truncation error over its matrices.

    Raises ValueError where that is more than max_error (see `ExpertBank.add`).
    """
    delta, worst, where = torch.zeros(slots[-1].stop), 0.0, ""
    for s in slots:
        part = delta[s.start : s.stop].view(s.shape)
        k = s.layer.support
        for i, n in enumerate(s.names):
            z = expert.z.get(n)
            if z is None:
                continue
            kept = min(k, z.shape[0])
            part[i, :kept] = z[:kept].float().cpu() - 1
            error = origin.truncation_error(n, z, k)
            if error > worst:
                worst, where = error, n
    if worst > max_error:
        raise ValueError(
            f"expert {name!r} rescales components that this model's layers leave out: {worst:.1%} of its change to {where} would be lost "
            f"(max_error={max_error:.1%}); patch with a larger rank, cut the expert, or pass max_error={math.ceil(worst * 100) / 100}"
        )
    return delta, worst


def unflatten(slots: Sequence[Slot], z: Tensor) -> dict[str, Tensor]:
    """{matrix: z over its support} of a row [C]."""
    return {name: z[span].clone() for name, span in spans(slots).items()}


def spans(slots: Sequence[Slot]) -> dict[str, slice]:
    """{matrix: its columns}, the part of them that an expert may rescale."""
    out = {}
    for s in slots:
        for i, name in enumerate(s.names):
            start = s.start + i * s.layer.rank
            out[name] = slice(start, start + s.layer.support)
    return out
