"""LoRA adapters beside the experts of vLLM's linear layers.

    y + ((x Aᵀ) * weight[rows]) Bᵀ

The bank lays the pairs of all its adapters side by side at each matrix (`layers.lora_columns`). Here they are cut to
this rank's part, and the matrices that vLLM merged into one layer become one group of the op, as their experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.ops.prepared import Prepared


class AdapterPath:
    """The change of the adapters at one of vLLM's layers.

    layers: its members that have columns; starts: the first column of each in the layer's output, rising
    width: M, columns of the layer's output
    """

    def __init__(self, layers: Sequence[Any], starts: Sequence[int], width: int) -> None:
        columns = [layer.lora for layer in layers]
        A, weight = torch.cat([c.A for c in columns]), torch.cat([c.weight for c in columns], 1)
        sizes = [len(c.A) for c in columns]
        for c, mine, row in zip(columns, A.split(sizes), weight.split(sizes, 1), strict=True):
            c.A, c.weight = mine, row  # views: the bank writes a row's weights into the group's table
        self.op: Prepared = Prepared(A.t(), [c.B for c in columns], weight)
        self.starts: list[int] = list(starts)
        ends = [s + len(c.B) for s, c in zip(starts, columns, strict=True)]
        cuts = sorted({0, width, *starts, *ends})
        self.widths: list[int] = [b - a for a, b in pairwise(cuts)]
        self.places: list[int] = [cuts.index(s) for s in starts]

    def add(self, y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """y [..., M] plus the change. x: [T, N] in y's dtype; rows: [T]. Nobody else may hold y."""
        if y.is_cpu and y.is_contiguous() and self.op.add_within(x, rows, y, self.starts):
            return y
        pieces = list(y.reshape(-1, y.shape[-1]).split(self.widths, -1))
        made = self.op.add(x, rows, [pieces[i] for i in self.places])
        for i, new in zip(self.places, made, strict=True):
            pieces[i] = new
        return torch.cat(pieces, -1).reshape(y.shape)


def follow(bank: ExpertBank, paths: Sequence[Any]) -> None:
    """Let paths have the adapters of a bank from now on. paths: `ExpertPath`s, whose `lay_adapters` is called"""

    def laid() -> None:
        for path in paths:
            path.lay_adapters()

    bank.table.adapters.laid = laid


def cut(adapter: LoraAdapter, bank: ExpertBank) -> LoraAdapter:
    """This rank's part of an adapter: rows of B (column-parallel layers), columns of A (row-parallel ones).

    Each of the bank's layers has the `Member` of its matrix, which `ExpertPath` notes. Matrices that the bank does not
    have stay whole: it refuses them.
    """
    members: dict[str, Any] = {names[0]: layer.member for layer, names in bank.layers}
    pairs = {}
    for name, (B, A) in adapter.pairs.items():
        m = members.get(name)
        pairs[name] = (B, A) if m is None else (torch.cat([B[s] for s in m.out]), A[:, m.take])
    return LoraAdapter(pairs, adapter.base_model)
