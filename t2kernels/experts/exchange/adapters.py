"""`Adapters`: the LoRA adapters of a bank, and which row of the tables uses which of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.layers.linear import SVFLinear, merge
from t2kernels.layers.lora_columns import LoraColumns, attach, detach

from .lora import LoraAdapter


class Adapters(Mapping[str, LoraAdapter]):
    """{name: adapter}, in the order of their columns. The bank calls it with its lock held.

    layers: {matrix: its layer}; a layer of a stack of matrices is left out
    rows: of the tables
    """

    def __init__(self, layers: Mapping[str, SVFLinear], rows: int) -> None:
        self._layers = dict(layers)
        self._count = rows
        self._held: dict[str, LoraAdapter] = {}
        self._weights: dict[int, dict[str, float]] = {}  # row -> {adapter: weight}
        self.laid: Callable[[], None] | None = None  # called when columns were laid anew

    def __getitem__(self, name: str) -> LoraAdapter:
        return self._held[name]

    def __iter__(self) -> Any:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def check(self, name: str, adapter: LoraAdapter) -> None:
        """Raise InputError if an adapter does not fit the layers."""
        try:
            adapter.check({n: (layer.U.shape[0], layer.Vt.shape[1]) for n, layer in self._layers.items()})
        except InputError as error:
            raise InputError(f"adapter {name!r}: {error}") from None
        for n, (B, A) in adapter.pairs.items():
            layer = self._layers[n]
            if not all(torch.isfinite(t.to(layer.dtype)).all() for t in (B, A)):
                raise InputError(f"adapter {name!r}: {n} does not fit {layer.dtype}")

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Hold an adapter, in the place of one of this name. No row uses it yet."""
        touched = {*adapter.pairs, *(self._held[name].pairs if name in self._held else ())}
        self._held[name] = adapter
        self._lay(touched)

    def remove(self, name: str) -> None:
        """Let go of an adapter; without effect if there is none of this name."""
        if (gone := self._held.pop(name, None)) is not None:
            self._weights = {row: {n: w for n, w in of.items() if n != name} for row, of in self._weights.items()}
            self._lay(gone.pairs)

    def copy(self) -> Adapters:
        """The same adapters, layers and rows; a change of the one does not change the other."""
        other = copy.copy(self)
        other._held, other._weights = dict(self._held), dict(self._weights)
        return other

    def lay(self) -> None:
        """Make the columns of all layers anew. No row uses an adapter afterwards."""
        self._weights = {}
        self._lay(self._adapted().union(*(adapter.pairs for adapter in self._held.values())))

    def rows_of(self, name: str) -> list[int]:
        """The rows that were last written with an adapter, or a mixture of it."""
        return [row for row, weights in self._weights.items() if name in weights]

    def set(self, row: int, weights: Mapping[str, float]) -> None:
        """Let a row use adapters: {name: weight}; names of experts are passed over."""
        found = {n: w for n, w in weights.items() if n in self._held}
        if not found and row not in self._weights:
            return
        self._weights[row] = found
        for n in {n for a in found for n in self._held[a].pairs} | self._adapted():
            layer: Any = self._layers[n]
            layer.lora.weight[row].copy_(self._row(n, found))

    def clear(self, rows: int | Tensor) -> None:
        """Let rows use no adapter: they are written with an expert."""
        if self._weights:
            for row in [rows] if isinstance(rows, int) else rows.tolist():
                self.set(row, {})
                self._weights.pop(row, None)

    @torch.no_grad()
    def take_off(self, model: nn.Module, row: int) -> None:
        """Remove all columns, with the adapters of a row merged into the dense layers, which are back already.

        row: 0: nothing is merged
        """
        for n in self._adapted():
            layer: Any = self._layers[n]
            if row and self._weights.get(row):
                change, weight = layer.lora.change(row), layer.dense_module(model).weight
                merge(weight, change, layer.transposed)
            detach(layer)
        self._held, self._weights = {}, {}

    def _adapted(self) -> set[str]:
        return {n for n, layer in self._layers.items() if hasattr(layer, "lora")}

    def _row(self, matrix: str, weights: Mapping[str, float]) -> Tensor:
        """[C] the weights of a row on the columns of a matrix."""
        parts = [(weights.get(name, 0.0), a.ranks[matrix]) for name, a in self._held.items() if matrix in a.pairs]
        return torch.cat([torch.full((r,), w, dtype=torch.float32) for w, r in parts])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay(self, matrices: Iterable[str]) -> None:
        """Lay the pairs of the held adapters side by side, in new tensors: a running forward has the old ones."""
        for n in matrices:
            layer = self._layers[n]
            pairs = [a.pairs[n] for a in self._held.values() if n in a.pairs]
            if not pairs:
                detach(layer)
                continue
            weight = torch.zeros(self._count, sum(p.rank for p in pairs))
            for row, of in self._weights.items():
                weight[row] = self._row(n, of)
            like = {"device": layer.scale.device, "dtype": layer.dtype}
            A, B = torch.cat([p.A for p in pairs]).to(**like), torch.cat([p.B for p in pairs], 1).to(**like)
            attach(layer, LoraColumns(A, B.contiguous(), weight.to(layer.scale.device), layer.routing))
        if self.laid is not None:
            self.laid()
