"""`FactoredLinear`: the factored form, y = ((x V) * scale[expert_ids]) Uᵀ + bias. It replaces the dense layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import same_weight
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.linalg import matmul
from t2kernels.factors.matrices import Matrix
from t2kernels.ops.op import call

from .dense.readonly import NoWeight, ReadOnlyWeight, refuse
from .linear import SVFLinear
from .routing.active import Routing


class FactoredLinear(SVFLinear):
    """y = ((x V) * scale[expert_ids]) Uᵀ + bias with scale = sigma * z. It replaces a layer whose weight is dropped.

    bias: the dense layer's, or None
    in_features, out_features: N, M
    """

    form = "factored"
    bias: Tensor | None
    base_ids: Tensor

    def __init__(
        self,
        factor: Factor | Int8Factor,
        support: int,
        rows: int,
        dtype: torch.dtype,
        routing: Routing,
        keep: bool = False,
    ) -> None:
        super().__init__(factor, support, rows, dtype, routing, keep)
        self.bias = None
        self.in_features: int = factor.V.shape[0]
        self.out_features: int = factor.U.shape[0]
        # the ids of a forward without a route
        base_ids = torch.zeros((), dtype=torch.int32, device=factor.U.device)
        self.register_buffer("base_ids", base_ids, persistent=False)
        self._original: tuple[Any, ...] = ()  # the dense layer; in a tuple, so that it is no submodule
        self._requires_grad = False

    def install(self, model: nn.Module, matrix: Matrix) -> None:
        """Replace the dense layer and drop its weight, so that only one matrix is ever held twice."""
        original: Any = matrix.module
        self.place_at(matrix)
        self.bias = getattr(original, "bias", None)
        self._original, self._requires_grad = (original,), original.weight.requires_grad
        self.train(original.training)
        _replace(model, self.path, self)
        original.weight = None
        self._parameters = NoWeight(self._parameters)

    def remove(self, model: nn.Module, row: int = 0) -> None:
        """Put the dense layer back, with a weight rebuilt from the factors."""
        (original,) = self._original
        self.table()  # an expert in training writes its row
        if self.bias is not None:
            original.bias = self.bias  # it may be another parameter than at first
        original.weight = nn.Parameter(self._stored(self.dense(row)), requires_grad=self._requires_grad)
        _replace(model, self.path, original)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., M] of x [..., N]."""
        route = self.routing.active
        ids = self.base_ids if route is None else route.fit(x.shape[:-1])
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        ids = ids.to(x.device)
        if self.group is not None and (out := self.group.output(self, x, route, ids)) is not None:
            return out
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return call(x, self.V, self.U, self.table(), ids, None, bias)

    def dense(self, row: int = 0) -> Tensor:
        """W' [M, N] = U diag(scale[row]) Vᵀ, computed in fp32, in the dtype of the dense layer."""
        return matmul(self.U.float() * self.scale[row], self.Vt.float()).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The base model's weight as the dense layer stores it. Rebuilt at each access: for code that inspects it.

        It is read-only: what is written into it raises `ReadOnlyWeightError`.
        """
        return ReadOnlyWeight(self._stored(self.dense()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse("setting .weight")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            refuse("deleting .weight")
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in every module, but for "weight", which raises ReadOnlyWeightError."""
        if name == "weight":
            refuse("the buffer 'weight'")
        super().register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module, but for "weight" and for "weight_orig" and the like, which raise ReadOnlyWeightError."""
        if name.partition("_")[0] == "weight":
            refuse(f"the parameter {name!r}")
        super().register_parameter(name, param)

    def _stored(self, w: Tensor) -> Tensor:
        return w.t().contiguous() if self.transposed else w

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight  # in other layers a write into a state dict reaches the model
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a bias. A weight that is the layer's own changes nothing; any other is an error: it would be lost."""
        _, strict, missing_keys, _, error_msgs = args
        for name in ("weight", "bias") if self.bias is not None else ("weight",):
            found = state_dict.get(prefix + name)
            if found is None:
                missing_keys += [prefix + name] if strict else []
            elif found.shape != getattr(self, name).shape:
                error_msgs.append(
                    f"{prefix}{name} is {list(found.shape)}, but the layer has {list(getattr(self, name).shape)}"
                )
            elif name == "bias":
                with torch.no_grad():
                    getattr(self, name).copy_(found)
            elif not same_weight(found, self._stored(self.dense())):
                error_msgs.append(
                    f"{prefix}weight is not the base weight of this layer. The layer is patched in factored form and "
                    "keeps only factors, so another dense weight cannot be loaded into it; unpatch_model(model) first"
                )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
