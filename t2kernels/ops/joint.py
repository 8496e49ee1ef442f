"""The products of a group's dense layers and their change in one step of autograd, for training on a CPU.

    y_i = x W_iᵀ + b_i + ((x V) * scale[expert_ids])_i U_iᵀ

As separate ops, each change is a new tensor beside the output of its dense layer, x is kept for the backward pass, and
autograd adds up as many gradients of x as the group has products. Here the change is added in place, the backward pass
keeps h = x V and the rows of scale alone, and dx is one tensor that products are added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .impls.cpp_kernels import times as cpp_times
from .impls.torch_kernels import dscale_of, scale_rows
from .op import untransformed

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def can_join(x: Tensor, V: Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> bool:
    """True if `join` computes these products: frozen plain tensors of one dtype on the CPU, outside of torch.compile,
    autocast, dispatch modes and function transforms."""
    if not (x.is_cpu and x.dtype in DTYPES and V.dtype is x.dtype and untransformed(x)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    for t in (*weights, *biases):
        if t is not None and not (
            type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype is x.dtype and not t.requires_grad
        ):
            return False
    return True


def join(
    x: Tensor,
    V: Tensor,
    Us: Sequence[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """y_i = x W_iᵀ + b_i + ((x V) * scale[expert_ids])_i U_iᵀ for calls that `can_join` allows.

    x: [..., N]; V, Us, scale, expert_ids: as in `svf_linear_group`, right by construction
    weights: W_i [M_i, N] of each member; biases: b_i [M_i] or None

    Returns y_i [..., M_i]. x and scale get gradients. The forward computes what the dense layer and `svf_linear`
    compute one after the other; in fp32 sums may be in another order.
    """
    return list(_Joint.apply(x, V, scale, expert_ids, len(Us), *Us, *weights, *biases))


def through(a: Tensor, B: Tensor) -> Tensor:
    """a B [T, C] in their dtype. a: [T, K]; B: [K, C]"""
    found = cpp_times(a, B)
    return a @ B if found is None else found


def add_through(y: Tensor, a: Tensor, B: Tensor) -> Tensor:
    """y + a B, in place."""
    found = cpp_times(a, B)
    return y.addmm_(a, B) if found is None else y.add_(found)


class _Joint(torch.autograd.Function):
    """p = dy U;  dx = sum_i dy_i W_i + (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of h * p."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor, count: int, *rest: Tensor | None
    ) -> tuple[Tensor, ...]:
        Us, weights, biases = rest[:count], rest[count : 2 * count], rest[2 * count :]
        flat, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        h = through(flat, V)
        rows = scale.index_select(0, expert_ids.reshape(-1))
        every = torch.arange(rows.shape[0], device=x.device).view(expert_ids.shape)
        g, ys, start = scale_rows(h, rows, every, lead, 1.0), [], 0
        for U, W, b in zip(Us, weights, biases, strict=True):
            y = linear(x, W, b)
            y.view(-1, y.shape[-1]).addmm_(g[:, start : start + U.shape[1]], U.t())  # one rounding
            ys.append(y)
            start += U.shape[1]
        ctx.set_materialize_grads(False)
        ctx.count, ctx.shape, ctx.table = count, x.shape, (scale.shape, scale.dtype)
        ctx.save_for_backward(V, rows, every, expert_ids, h, *Us, *weights)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        V, rows, every, expert_ids, h, *rest = ctx.saved_tensors
        Us, weights = rest[: ctx.count], rest[ctx.count :]
        need_dx, _, need_dscale = ctx.needs_input_grad[:3]
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        p = [
            h.new_zeros(h.shape[0], U.shape[1]) if dy is None else through(dy, U)
            for dy, U in zip(flat, Us, strict=True)
        ]
        p = p[0] if len(p) == 1 else torch.cat(p, 1)
        dx = dscale = None
        if need_dx:
            for dy, W in zip(flat, weights, strict=True):
                if dy is not None:
                    dx = through(dy, W) if dx is None else add_through(dx, dy, W)
            q = scale_rows(p, rows, every, ctx.shape[:-1], 1.0)
            dx = (q @ V.t() if dx is None else dx.addmm_(q, V.t())).view(ctx.shape)
        if need_dscale:
            shape, dtype = ctx.table
            dscale = dscale_of(h, p, h.new_zeros(shape, dtype=dtype), expert_ids, ctx.shape[:-1])
        return dx, None, dscale, *([None] * (2 + 3 * ctx.count))
