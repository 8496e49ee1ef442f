"""`DeltaStack`: SVF experts inside a mixture-of-experts layer. Factors per weight slice, one scale row per token.

transformers keeps the weights of such a layer as 3-D stacks and calls the layer's implementation through
`ALL_EXPERTS_FUNCTIONS`, by a name in its config. A patched layer gets a copy of the config that names
`svf_experts_forward`. A forward without experts goes to the implementation that was there, so the base model stays the
same bit for bit.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from t2kernels import InputError
from t2kernels.factors.factor import Factor
from t2kernels.factors.int8 import Int8Factor, stack
from t2kernels.factors.linalg import matmul
from t2kernels.factors.matrices import Matrix, is_plain

from .dense.link import Link
from .linear import SVFLinear, add_delta, merge
from .private import require

IMPLEMENTATION = "t2kernels_svf"


class DeltaStack(SVFLinear):
    """The delta form of one stack of X weights: y_e + ((x V_e) * scale[expert_ids, e]) U_eᵀ, scale = sigma * (z - 1).

    The layer is a child of the mixture-of-experts layer, named "svf_" and the name of the stack.
    """

    form = "delta"
    tensor: str = ""  # name of the stack in its module: "gate_up_proj", "up_proj" or "down_proj"

    def install(self, model: nn.Module, matrix: Matrix) -> None:
        """Make the layer a child of the mixture-of-experts layer. matrix: the first slice of the stack.

        Raises ValueError, with the model unchanged, for a mixture-of-experts layer that is not supported.
        """
        module: Any = matrix.module
        check_transformers(module)
        if reason := unsupported(module):
            raise InputError(f"{matrix.path} ({type(module).__name__}) cannot be patched: {reason}; leave it out")
        self.place_at(matrix)
        self.tensor = matrix.tensor.rpartition(".")[2]
        self.base = Link(module)
        module.add_module(f"svf_{self.tensor}", self)
        if module.config._experts_implementation != IMPLEMENTATION:
            ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, svf_experts_forward)
            module.svf_base_config = module.config
            module.config = copy.copy(module.config)
            module.config._experts_implementation_internal = IMPLEMENTATION

    def remove(self, model: nn.Module, row: int = 0) -> None:
        """Take the child off the mixture-of-experts layer; add the change of the expert in `row` to the stack."""
        module = self.dense_module(model)
        if row:
            weights, scale = getattr(module, self.tensor), self.table()[row]
            for e in range(weights.shape[0]):
                change = matmul(self.U[e].float() * scale[e], self.Vt[e].float())  # [M, N]
                merge(weights[e], change, self.transposed)
        delattr(module, f"svf_{self.tensor}")
        if not installed(module):
            module.config = module.svf_base_config
            del module.svf_base_config

    def probe_kind(self) -> object:
        """Type and format of the stack; None if it is a plain floating-point one."""
        weights = getattr(self.base(), self.tensor, None)
        return None if weights is None or is_plain(weights) else (type(weights), weights.dtype)

    def unsupported_training(self) -> str | None:
        """See `SVFLinear`; one weight of the stack is run."""
        return self.probe(_Slice(self))


class _Slice(nn.Module):
    """The first weight of a stack as a linear layer."""

    def __init__(self, layer: DeltaStack) -> None:
        super().__init__()
        W = getattr(layer.base(), layer.tensor)[0].detach()
        self.slice = W.t() if layer.transposed else W

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.slice)


def check_transformers(module: nn.Module) -> None:
    """Raise UnsupportedVersionError if transformers calls a mixture-of-experts layer in another way than this file."""
    for name in ("register", "get_interface"):
        require(ALL_EXPERTS_FUNCTIONS, name, "the layer is called through this table", (), transformers)
    for name in ("_experts_implementation", "_experts_implementation_internal"):
        require(module.config, name, "it names the layer's implementation", (), transformers)
    require(type(module).forward, "__wrapped__", "the base model's own forward must stay reachable", (), transformers)
    for name in ("has_gate", "has_bias", "is_transposed", "num_experts"):
        require(module, name, "it says how the stacks are stored", (), transformers)
    if find_spec("transformers.distributed.expert_parallel"):
        require(module, "_is_expert_parallel", "it says whether the stacks are on several devices", (), transformers)
    require(module, "_apply_gate" if module.has_gate else "act_fn", "it is the activation", (), transformers)


def unsupported(module: nn.Module) -> str | None:
    """Why the stacks of a mixture-of-experts layer cannot be patched; None if they can."""
    if getattr(module, "has_post_expert_norm", False):
        return "its weights have a norm of their own"
    if getattr(module, "_is_expert_parallel", False):
        return "its weights are spread over devices"
    return None


def installed(module: nn.Module) -> dict[str, DeltaStack]:
    """{name of the stack: its `DeltaStack`} of a mixture-of-experts layer."""
    return {child.tensor: child for child in module.children() if isinstance(child, DeltaStack)}


def stack_factors(factors: list[Factor | Int8Factor]) -> Factor | Int8Factor:
    """Stack factors of equally shaped weights: U [X, M, C], sigma [X, R], V [X, N, C]."""
    int8 = [f for f in factors if isinstance(f, Int8Factor)]
    if int8:
        return stack(int8)
    return Factor(*(torch.stack(part) for part in zip(*factors, strict=True)))


def svf_experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Σ over a token's k weights e: share of e * down_e(gate(up_e(x))), both matmuls with the expert row of the token.

    hidden: [T, H]
    top_k_index: [T, k], the weights that the router chose; `num_experts` means none
    top_k_weights: [T, k], their shares
    Returns [T, H].
    """
    stacks = installed(module)
    route = next(iter(stacks.values())).routing.active
    if route is None:
        original = type(module).forward.__wrapped__
        return ALL_EXPERTS_FUNCTIONS.get_interface(module.svf_base_config._experts_implementation, original)(
            module, hidden, top_k_index, top_k_weights
        )
    tables = {tensor: layer.table() for tensor, layer in stacks.items()}  # once a forward, not once a weight

    def linear(tensor: str, e: int, x: Tensor, ids: Tensor) -> Tensor:
        W = getattr(module, tensor)[e]
        bias = getattr(module, f"{tensor}_bias", None) if module.has_bias else None
        y = nn.functional.linear(x, W.t() if module.is_transposed else W, None if bias is None else bias[e])
        layer = stacks.get(tensor)
        return y if layer is None else add_delta(y, x, layer.Vt[e].t(), layer.U[e], tables[tensor][:, e], ids)

    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    ids = route.per_token(hidden.shape[0])
    out = torch.zeros_like(hidden)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    top_k_index, top_k_weights = (t.reshape(hidden.shape[0], -1) for t in (top_k_index, top_k_weights))
    for e in top_k_index.unique().tolist():
        if e >= module.num_experts:
            continue
        token, slot = torch.where(top_k_index == e)
        y = linear(up, e, hidden[token], ids[token])
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = linear("down_proj", e, y, ids[token])
        out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
    return out.reshape(shape)
