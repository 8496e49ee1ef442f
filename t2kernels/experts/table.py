"""`ScaleTable`: the scale rows of all layers as one array for each device, so that writing an expert is one row copy, whatever the number of layers.

Nothing is ever allocated anew by writing, so captured graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2kernels.layers.linear import SVFLinear


@dataclass(frozen=True)
class Slot:
    """Where the numbers z of one layer lie among those of all: names of its matrices, where they start, and (X, R)."""

    layer: SVFLinear
    names: tuple[str, ...]
    start: int
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "shape", (len(self.names), self.layer.rank))

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]

    def components(self) -> Tensor:
        """For each column of the layer's table, which number z scales it; on the host."""
        of = torch.arange(self.start, self.stop).reshape(self.shape)
        if self.layer.source is None:
            return of.flatten()
        return of.gather(1, self.layer.source.cpu().reshape(self.shape[0], -1)).flatten()


class ScaleTable:
    """rows: of every layer's `scale`, row 0 (the base model) included. width: numbers z of all layers together."""

    def __init__(self, layers: Sequence[tuple[SVFLinear, tuple[str, ...]]], rows: int):
        self.rows, self.slots, self.width = rows, [], 0
        for layer, names in layers:
            self.slots.append(Slot(layer, names, self.width))
            self.width = self.slots[-1].stop
        self._bind()

    def write(self, rows: int | Tensor, delta: Tensor) -> None:
        """scale[rows] = base + sigma * delta in every layer, in place. rows: one, or [P]; delta: z - 1 of all layers, [width] or [P, width]."""
        if not self._bound():
            self._bind()
        for device, (table, sigma, base, columns) in self._arrays.items():
            d = (delta if columns is None else delta[..., columns]).to(device, non_blocking=True)
            if isinstance(rows, Tensor):
                table.index_copy_(0, rows.to(device).long(), torch.addcmul(base, sigma, d))
            else:
                torch.addcmul(base, sigma, d, out=table[rows])

    def _bind(self) -> None:
        """Make every layer's table a view of one array per device; again after the model was moved."""
        self._arrays = {}
        for device in dict.fromkeys(s.layer.scale.device for s in self.slots):
            slots = [s for s in self.slots if s.layer.scale.device == device]
            table = torch.cat([s.layer.scale.reshape(self.rows, -1) for s in slots], 1)
            sigma = torch.cat([s.layer.columns(s.layer.sigma).reshape(-1) for s in slots])
            start = 0
            for s in slots:
                width = s.layer.scale[0].numel()
                s.layer.scale = table[:, start : start + width].unflatten(1, s.layer.scale.shape[1:])
                start += width
            columns = torch.cat([s.components() for s in slots])
            whole = torch.equal(columns, torch.arange(self.width))
            self._arrays[device] = (table, sigma, table[0].clone(), None if whole else columns)

    def _bound(self) -> bool:
        storages = {table.untyped_storage().data_ptr() for table, *_ in self._arrays.values()}
        return all(s.layer.scale.untyped_storage().data_ptr() in storages for s in self.slots)
