"""`Trainables`: the experts in training. Their numbers are parameters of the layers, and their rows are computed from those in every forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .expert import Expert
from .table import Slot


class Trainables:
    """Names in training; the bank gives each a row and keeps it."""

    def __init__(self, slots: Sequence[Slot]):
        self._slots = slots
        self._keys: dict[str, str] = {}  # name -> what its parameters are called in the layers

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, parametrisation: str, init: Expert | None) -> None:
        """Raises ValueError for a parametrisation that is unknown, or that these layers or an initial expert rule out."""
        if parametrisation not in ("raw", "sigmoid"):
            raise ValueError(f"parametrisation={parametrisation!r}; wanted 'raw' or 'sigmoid'")
        if parametrisation == "raw":
            return
        if init is not None:
            raise ValueError(
                "an initial expert can be trained further with parametrisation='raw' only: z fixes p only up to its trace"
            )
        partial = [n for s in self._slots for n in s.names if s.layer.form == "delta" or s.layer.support < s.layer.rank]
        if partial:
            raise ValueError(
                f"parametrisation='sigmoid' rescales every component, but {partial[0]} leaves some out: patch with form='factored', rank=None"
            )

    def start(self, name: str, row: int, parametrisation: str, start: Tensor | None) -> list[nn.Parameter]:
        """A parameter p for each layer, in model order. start: z - 1 to begin from, [C]"""
        key = self._keys[name] = f"e{row}"
        parameters = []
        for s in self._slots:
            shape = (*s.layer.sigma.shape[:-1], s.layer.support)
            if parametrisation == "sigmoid":
                p = 0.1 + 0.01 * torch.randn(shape, device=s.layer.sigma.device)
            elif start is not None:
                p = (
                    start[s.start : s.stop]
                    .reshape(*s.layer.sigma.shape)[..., : s.layer.support]
                    .to(s.layer.sigma.device)
                    .clone()
                )
            else:
                p = torch.zeros(shape, device=s.layer.sigma.device)
            parameters.append(nn.Parameter(p))
            s.layer.add_trained(key, row, parameters[-1], parametrisation)
        return parameters

    def stop(self, name: str) -> None:
        key = self._keys.pop(name)
        for s in self._slots:
            s.layer.drop_trained(key)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """{matrix, or module and stack: p}, in model order."""
        key = self._keys[name]
        return {
            s.names[0] if len(s.names) == 1 else s.names[0].rpartition(".")[0]: s.layer.logits[key] for s in self._slots
        }

    @torch.no_grad()
    def z(self, name: str) -> dict[str, Tensor]:
        """{matrix: z [k] as it is now, fp32 on the host}."""
        key = self._keys[name]
        parts = [(s, s.layer.trained_z(key).detach().float().cpu().reshape(len(s.names), -1)) for s in self._slots]
        return {n: z[i].clone() for s, z in parts for i, n in enumerate(s.names)}
