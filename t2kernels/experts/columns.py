"""`Columns`: an expert as one row of numbers [C], z of all matrices of a model side by side, in model order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError, UnknownNameError
from t2kernels.layers.linear import SVFLinear
from t2kernels.layers.scale import truncation_error

from .expert import Expert
from .origin import Origin
from .table import ScaleTable


class Columns:
    """The matrices of one patched model, and the place of each in an expert's row.

    table: the scale tables of all layers
    origin: what is known of the model's factors
    width: C, numbers in an expert's row
    matrices: {matrix: k}, how many components an expert may rescale, in model order
    """

    def __init__(self, table: ScaleTable, origin: Origin):
        self.table: ScaleTable = table
        self.origin: Origin = origin
        self.width: int = table.width
        self.matrices: dict[str, int] = {n: s.layer.support for s in table.slots for n in s.names}
        self._places = {n: (s, i) for s in table.slots for i, n in enumerate(s.names)}
        spans = [torch.arange(span.start, span.stop, device="cpu") for span in self.spans.values()]
        self._supported = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    def layers(self) -> list[tuple[SVFLinear, tuple[str, ...]]]:
        """Every patched layer with the names of its matrices, in model order."""
        return [(s.layer, s.names) for s in self.table.slots]

    @property
    def device(self) -> torch.device:
        """The device of the first layer's table, where `ids` puts its tensors."""
        return self.table.slots[0].layer.scale.device

    @property
    def spans(self) -> dict[str, slice]:
        """{matrix: its place in a row [C]}, the components that an expert may rescale."""
        starts = {name: slot.start + i * slot.layer.rank for name, (slot, i) in self._places.items()}
        return {name: slice(start, start + self.matrices[name]) for name, start in starts.items()}

    def sigma(self, name: str) -> Tensor:
        """[R] fp32, the singular values of a matrix, largest first. Raises KeyError."""
        if name not in self._places:
            raise UnknownNameError(f"no matrix {name!r} in this bank; it has {', '.join(list(self.matrices)[:4])}, ...")
        slot, i = self._places[name]
        return slot.layer.sigma.reshape(slot.shape)[i]

    def check(self, expert: Expert) -> None:
        """Raise ExpertMismatch if an expert is for other matrices or other factors than this model's."""
        expert.check(self.origin)

    def expert(self, z: Mapping[str, Tensor], **manifest: Any) -> Expert:
        """An `Expert` that records the identity of this model's factors. Raises ValueError for an unknown matrix."""
        unknown = [n for n in z if n not in self.matrices]
        if unknown:
            raise InputError(f"no matrix {unknown[0]!r} in this bank; it has {', '.join(list(self.matrices)[:4])}, ...")
        return Expert.trained_on(self.origin, z, **manifest)

    def from_vector(self, delta: Tensor, /, **manifest: Any) -> Expert:
        """The expert whose z - 1 is a row [C]: the inverse of `flatten`."""
        z = 1 + delta.detach().float().cpu()
        return self.expert({name: z[span].clone() for name, span in self.spans.items()}, **manifest)

    def flatten(self, expert: Expert, max_error: float, name: str) -> tuple[Tensor, float]:
        """Concatenate z - 1 of all matrices into one row.

        max_error: largest truncation error of a matrix that is accepted (see `ExpertBank.add`)
        name: of the expert, for the message

        Returns ([C] fp32 on the CPU, 0 for matrices and components that the expert lacks; largest truncation error).
        Raises ValueError if that error is above max_error.
        """
        delta, worst, where = torch.zeros(self.width, dtype=torch.float32, device="cpu"), 0.0, ""
        if expert.ranks == self.matrices:  # all there and nothing cut: at once, of hundreds of matrices
            delta[self._supported] = torch.cat([expert.z[n] for n in self.matrices]).float().cpu() - 1
            return delta, 0.0
        for n, span in self.spans.items():
            z = expert.z.get(n)
            if z is None:
                continue
            k = self.matrices[n]
            part = delta[span]
            part[: len(z)] = z[:k].float().cpu() - 1
            error = lost_share(self.origin, n, z, k)
            if error > worst:
                worst, where = error, n
        if worst > max_error:
            raise InputError(
                f"expert {name!r} rescales components that this model's layers leave out: {worst:.1%} of its change to "
                f"{where} would be lost (max_error={max_error:.1%}); patch with a larger rank, cut the expert, or pass "
                f"max_error={math.ceil(worst * 100) / 100}"
            )
        return delta, worst


def lost_share(origin: Origin, name: str, z: Tensor, k: int) -> float:
    """The share of an expert's change to a matrix that is lost if only the first k components are kept.

    `truncation_error` in the spectral norm. Singular values that the model does not know count as the last known one;
    the result is then an upper bound.
    """
    return truncation_error(z, origin.spectrum(name, len(z)), k) if len(z) > k else 0.0
