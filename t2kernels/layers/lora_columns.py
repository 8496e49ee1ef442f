"""`LoraColumns`: LoRA adapters beside the experts of one layer.

    y + ((x Aᵀ) * weight[ids]) Bᵀ

The pairs of all adapters lie side by side, A [C, N] and B [M, C]. A row of the table has an adapter's weight on its own
columns and 0 on those of the others. So it is the sum of the delta form with other factors: one op adds a different
adapter, a mixture of adapters, or nothing to each token, and a row of zeros leaves y's bits as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels.factors.linalg import matmul

from .forward_hooks import remove_hook
from .linear import DeltaLinear, SVFLinear, add_delta
from .routing.active import Routing


class LoraColumns(nn.Module):
    """The pairs of the adapters at one layer, a child of it with the name "lora".

    A: [C, N], B: [M, C] buffers in the dtype of the layer
    weight: [E, C] fp32, one row per row of the experts' tables

    routing: the model's
    """

    A: Tensor
    B: Tensor
    weight: Tensor

    def __init__(self, A: Tensor, B: Tensor, weight: Tensor, routing: Routing) -> None:
        super().__init__()
        for name, t in (("A", A), ("B", B), ("weight", weight)):
            self.register_buffer(name, t, persistent=False)
        self.routing: Routing = routing

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., M] plus the change of each token's adapters. x: [..., N]."""
        route = self.routing.active
        if route is None:
            return y
        return add_delta(y, x, self.A.t(), self.B, self.weight, route.fit(x.shape[:-1]))

    def change(self, row: int) -> Tensor:
        """[M, N] fp32, what the adapters of a row add to the weight."""
        return matmul(self.B.float() * self.weight[row], self.A.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraColumns:
        weight = self._buffers.pop("weight")  # it follows the device, not the dtype
        with torch.inference_mode(False):
            try:
                super()._apply(fn, recurse)
            finally:
                self._buffers["weight"] = None if weight is None else weight.to(self.A.device)
        return self


def attach(layer: SVFLinear, columns: LoraColumns) -> None:
    """Put columns beside a layer, in the place of older ones. A layer without a dense layer computes by other means."""
    module = _module(layer)
    if not hasattr(layer, "lora") and module is not None:
        remove_hook(module, lora_hook)  # of a copy that another thread's `attach` was in the middle of
        module.register_forward_hook(lora_hook)
    layer.add_module("lora", columns)


def detach(layer: SVFLinear) -> None:
    """Undo `attach`."""
    if (module := _module(layer)) is not None:
        remove_hook(module, lora_hook)
    del layer.lora


def lora_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of the dense layer in delta form, of the layer itself in factored form."""
    layer = module if isinstance(module, SVFLinear) else module.svf
    columns = getattr(layer, "lora", None)  # another thread may have removed the last adapter, which no row uses
    return output if columns is None else columns.add_to(output, args[0])


def _module(layer: SVFLinear) -> Any:
    return layer.base() if isinstance(layer, DeltaLinear) else layer
