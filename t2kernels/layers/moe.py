"""Experts of Transformer² inside a mixture-of-experts layer: factors per weight slice, a row per token.

transformers keeps the weights of such a layer as 3-D stacks and dispatches the layer through `ALL_EXPERTS_FUNCTIONS` by a name in its
config. A patched layer gets a config of its own that names `svf_experts_forward`; a forward without experts goes to the implementation
that was there, so the base model stays what it was, bit for bit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from t2kernels.factors.int8 import Int8Factor, stack
from t2kernels.factors.store import Factor

from .linear import SVFLinear, add_delta

IMPLEMENTATION = "t2kernels_svf"


class DeltaStack(SVFLinear):
    """The deltas of one stack of X weights: y_e + ((x V_e) * scale[expert_ids, e]) U_eᵀ, scale = sigma * (z - 1)."""

    form = "delta"

    def add_to(self, y: Tensor, x: Tensor, ids: Tensor, index: int) -> Tensor:
        """y [T, M] and x [T, N] of the tokens that the layer's router sent to weight `index`; ids [T] their rows."""
        return add_delta(y, x, self.Vt[index].t(), self.U[index], self.table()[:, index], ids)


def stack_factors(factors: list[Factor] | list[Int8Factor]) -> Factor | Int8Factor:
    """Factors of equally shaped weights as one: U [X, M, C], sigma [X, R], V [X, N, C]."""
    if isinstance(factors[0], Int8Factor):
        return stack(factors)
    return Factor(*(torch.stack(part) for part in zip(*factors, strict=True)))


def attach(module: nn.Module, tensor: str, layer: DeltaStack) -> None:
    """Make `layer` follow the stack `tensor` ("gate_up_proj", "down_proj") of the mixture-of-experts layer `module`."""
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{type(module).__name__}: experts with a norm of their own, or spread over devices, are not supported yet"
        )
    module.add_module(f"svf_{tensor}", layer)
    if module.config._experts_implementation != IMPLEMENTATION:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, svf_experts_forward)
        module.svf_base_config = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = IMPLEMENTATION


def detach(module: nn.Module, tensor: str) -> None:
    """Undo `attach`."""
    delattr(module, f"svf_{tensor}")
    if not any(name.startswith("svf_") for name, _ in module.named_children()):
        module.config = module.svf_base_config
        del module.svf_base_config


def merge(module: nn.Module, tensor: str, layer: DeltaStack, row: int) -> None:
    """Add the change that the expert in `row` makes to the stack itself."""
    stack = getattr(module, tensor)
    for e in range(stack.shape[0]):
        change = (layer.U[e].float() * layer.scale[row, e]) @ layer.Vt[e].float()  # [M, N]
        stack[e].add_((change.t() if module.is_transposed else change).to(stack.device))


def svf_experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """sum over a token's k weights e of its router's share * down_e(gate(up_e(x))), both matmuls with the token's expert row.

    hidden [T, H]; top_k_index [T, k], an index of `num_experts` means none; top_k_weights [T, k]. Returns [T, H].
    """
    layers = [child for name, child in module.named_children() if name.startswith("svf_")]
    route = layers[0].routing.active
    if route is None:
        original = type(module).forward.__wrapped__
        return ALL_EXPERTS_FUNCTIONS.get_interface(module.svf_base_config._experts_implementation, original)(
            module, hidden, top_k_index, top_k_weights
        )
    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    ids = route.per_token(hidden.shape[0])
    out = torch.zeros_like(hidden)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    top_k_index, top_k_weights = (t.reshape(hidden.shape[0], -1) for t in (top_k_index, top_k_weights))
    for e in top_k_index.unique().tolist():
        if e >= module.num_experts:
            continue
        token, slot = torch.where(top_k_index == e)
        y = _linear(module, up, e, hidden[token], ids[token])
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = _linear(module, "down_proj", e, y, ids[token])
        out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
    return out.reshape(shape)


def _linear(module: nn.Module, tensor: str, e: int, x: Tensor, ids: Tensor) -> Tensor:
    W = getattr(module, tensor)[e]
    bias = getattr(module, f"{tensor}_bias", None) if module.has_bias else None
    y = nn.functional.linear(x, W.t() if module.is_transposed else W, None if bias is None else bias[e])
    layer = getattr(module, f"svf_{tensor}", None)
    return y if layer is None else layer.add_to(y, x, ids, e)
