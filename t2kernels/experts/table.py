"""`ScaleTable`: the scale rows of all layers as one array per device. Writing an expert is one row copy per device.

Writes are in place and allocate nothing that outlives them, so a captured CUDA graph stays valid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2kernels.layers.linear import SVFLinear

from .exchange.adapters import Adapters


@dataclass(frozen=True)
class Slot:
    """The place of one layer in an expert's row, which holds z of all layers side by side.

    layer: a patched layer, of one matrix or of a stack of X matrices
    names: [X] names of its matrices
    start: first index of the layer in the row; `stop` is the index behind its last
    shape: (X, R)
    """

    layer: SVFLinear
    names: tuple[str, ...]
    start: int
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (len(self.names), self.layer.rank))

    @property
    def stop(self) -> int:
        """The index behind the last number of this layer."""
        return self.start + self.shape[0] * self.shape[1]

    def bytes_read(self) -> tuple[int, int]:
        """(bytes that a token reads in this layer, bytes that it would read in a dense layer of the model's dtype)."""
        (M, C), N = self.layer.U.shape[-2:], self.layer.Vt.shape[-1]
        dense = M * N * self.layer.dtype.itemsize
        reads = (M + N) * C * self.layer.U.dtype.itemsize + (dense if self.layer.form == "delta" else 0)
        return self.shape[0] * reads, self.shape[0] * dense

    def components(self) -> Tensor:
        """[columns of the layer's table] int64 on the CPU: the index in the row of the z that each column uses."""
        of = torch.arange(self.start, self.stop, device="cpu").reshape(self.shape)
        if self.layer.source is None:
            return of.flatten()
        return of.gather(1, self.layer.source.cpu().reshape(self.shape[0], -1)).flatten()


class ScaleTable:
    """The tables `scale` of all layers, which become views of one array per device.

    layers: [(layer, names of its matrices)], in model order
    rows: rows of every layer's table, row 0 (the base model) included
    slots: the place of each layer in an expert's row
    width: C, numbers in an expert's row
    adapters: LoRA adapters, which rows may use instead
    """

    def __init__(self, layers: Sequence[tuple[SVFLinear, tuple[str, ...]]], rows: int):
        self.rows: int = rows
        self.slots: list[Slot] = []
        self.width: int = 0
        for layer, names in layers:
            self.slots.append(Slot(layer, names, self.width))
            self.width = self.slots[-1].stop
        self.adapters: Adapters = Adapters({n[0]: layer for layer, n in layers if layer.sigma.dim() == 1}, rows)
        self._bind()

    @functools.cached_property
    def _sigma(self) -> Tensor:
        """[C] fp64 on the CPU, sigma of all layers."""
        return torch.cat([s.layer.sigma.double().cpu().reshape(-1) for s in self.slots])

    def unsupported(self, delta: Tensor) -> str | None:
        """Why a row cannot be written, or None: sigma z must be finite in the dtype of its layer.

        delta: [C] z - 1 of all matrices
        """
        limits = {s.layer.dtype: torch.finfo(s.layer.dtype).max for s in self.slots}
        if self.width and float((self._sigma * (delta.double() + 1)).abs().max()) <= min(limits.values()):
            return None  # all layers at once: there are hundreds
        for s in self.slots:
            sigma, z = s.layer.sigma.double().cpu().reshape(-1), delta[s.start : s.stop].double() + 1
            largest, limit = float((sigma * z).abs().max()), torch.finfo(s.layer.dtype).max
            if not largest <= limit:
                dtype = str(s.layer.dtype).removeprefix("torch.")
                return f"sigma z of {s.names[0]} reaches {largest:.3g}, and {dtype} ends at {limit:.3g}"
        return None

    def write(self, rows: int | Tensor, delta: Tensor) -> None:
        """scale[rows] = base + sigma * delta in every layer, in place.

        rows: one row, or [P] rows
        delta: [C] for one row, [P, C] for P rows; z - 1 of all layers
        """
        self.adapters.clear(rows)
        if not self._is_bound():
            self._bind()
        for device, (table, sigma, base, columns) in self._arrays.items():
            d = (delta if columns is None else delta[..., columns]).to(device, table.dtype, non_blocking=True)
            if isinstance(rows, Tensor):
                table.index_copy_(0, rows.to(device).long(), torch.addcmul(base, sigma, d))
            else:
                torch.addcmul(base, sigma, d, out=table[rows])

    @torch.inference_mode(False)  # a table that is made in inference mode could neither be trained nor written later
    @torch.no_grad()
    def _bind(self) -> None:
        """Make every layer's table a view of one array per device. Needed again after the model was moved."""
        self._arrays: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
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
            whole = torch.equal(columns, torch.arange(self.width, device="cpu"))
            self._arrays[device] = (table, sigma, table[0].clone(), None if whole else columns)

    def _is_bound(self) -> bool:
        storages = {table.untyped_storage().data_ptr() for table, *_ in self._arrays.values()}
        return all(s.layer.scale.untyped_storage().data_ptr() in storages for s in self.slots)
