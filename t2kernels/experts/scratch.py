"""`Scratch`: rows of a bank that a search writes candidates into, without making an expert of each.

A row as a bank keeps it is z - 1 over the supports of all matrices side by side, [C]; candidates are many such rows, made at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import columns
from .expert import Expert

if TYPE_CHECKING:
    from .bank import ExpertBank


class Scratch:
    """P rows lent by a bank, until `close`; made by `bank.scratch(P)`.

    ids: [P] int32 on the model's device, the rows
    Raises RuntimeError if fewer than P rows are free of live ids, ValueError for P < 1.
    """

    def __init__(self, bank: ExpertBank, count: int):
        if count < 1:
            raise ValueError(f"scratch({count}): wanted at least one row")
        self._bank, self._keys = bank, [object() for _ in range(count)]
        taken: list[int] = []
        with bank._lock:
            try:
                for key in self._keys:
                    taken.append(bank._rows.take(key))
                    bank._rows.pin(taken[-1])
            except BaseException:
                self._give_back(taken)
                raise
        self._taken = taken
        self.ids = torch.tensor(taken, dtype=torch.int32, device=bank.device)

    def write(self, delta: Tensor) -> Tensor:
        """scale[ids[p]] = base + sigma * delta[p] in every layer, in place; returns the ids of the rows written, [P'].

        delta: [P' <= P, C], z - 1 of each candidate. Raises ValueError for another shape or values that are not finite.
        """
        if delta.dim() != 2 or delta.shape[1] != self._bank.width or not 1 <= len(delta) <= len(self.ids):
            raise ValueError(
                f"candidates are {list(delta.shape)}; wanted [at most {len(self.ids)}, {self._bank.width}]"
            )
        if not torch.isfinite(delta).all():
            raise ValueError("a candidate is not finite: its alphas, or the experts it mixes, are NaN or infinite")
        self._bank.table.write(self.ids[: len(delta)], delta)
        return self.ids[: len(delta)]

    def close(self) -> None:
        """Give the rows back."""
        with self._bank._lock:
            self._give_back(self._taken)
            self._taken = []

    def _give_back(self, taken: list[int]) -> None:
        self._bank._rows.unpin(taken)
        for key in self._keys:
            self._bank._rows.drop(key)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def flatten(bank: ExpertBank, expert: Expert | str) -> Tensor:
    """z - 1 as a flat row [C], on the host. Raises KeyError for a name that the bank lacks, ExpertMismatch for an expert of other factors."""
    if isinstance(expert, str):
        expert = bank[expert]
    bank.origin.check(expert)
    return bank._flatten(expert, 0.1, str(expert.manifest.get("name", "")))[0]


def unflatten(bank: ExpertBank, delta: Tensor, **manifest) -> Expert:
    """The expert whose z - 1 is a flat row [C]."""
    return bank.expert(columns.unflatten(bank._slots, 1 + delta.detach().float().cpu()), **manifest)
