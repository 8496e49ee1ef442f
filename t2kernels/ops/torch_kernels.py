"""impl="torch": two matmuls around a row scaling, on any device that torch has. Deterministic on the CPU.

A group of matrices that share x is the general case: V's side by side along R, one U per member. A single matrix is a group of one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None]
) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i]."""
    lead = x.shape[:-1]
    h = x.reshape(-1, x.shape[-1]) @ V  # [T, R]
    g = _scale_rows(h, scale, expert_ids, lead)
    ys, column = [], 0
    for U, base, bias in zip(Us, bases, biases, strict=True):
        g_i = g if len(Us) == 1 else g[:, column : column + U.shape[1]]
        column += U.shape[1]
        if base is not None:
            y = torch.addmm(base.reshape(-1, U.shape[0]), g_i, U.t())  # one rounding, and g = 0 leaves base's bits alone
            if bias is not None:
                y += bias
        elif bias is not None:
            y = torch.addmm(bias, g_i, U.t())
        else:
            y = g_i @ U.t()
        ys.append(y.reshape(*lead, U.shape[0]))
    return ys


def backward(
    dys: list[Tensor], x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, need_dx: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """p = dy U;  dx = (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of (x V) * p, in fp32. Not needed: empty [0]."""
    lead = x.shape[:-1]
    ps = [dy.reshape(-1, U.shape[0]) @ U for dy, U in zip(dys, Us, strict=True)]
    p = ps[0] if len(ps) == 1 else torch.cat(ps, dim=1)  # [T, R]
    dx, dscale = x.new_empty(0), scale.new_empty(0)
    if need_dx:
        dx = (_scale_rows(p, scale, expert_ids, lead) @ V.t()).reshape(x.shape)
    if need_dscale:
        h = x.reshape(-1, x.shape[-1]) @ V
        product = h.to(scale.dtype) * p.to(scale.dtype)  # [T, R]
        rows, repeat = expert_ids.numel(), _tokens_per_id(expert_ids, lead)
        per_id = product if repeat == 1 else product.reshape(rows, repeat, product.shape[1]).sum(1)
        dscale = torch.zeros_like(scale).index_add_(0, expert_ids.reshape(-1), per_id)
    return dx, dscale


def _scale_rows(h: Tensor, scale: Tensor, expert_ids: Tensor, lead: torch.Size) -> Tensor:
    """h [T, R] * scale[expert_ids], multiplied in scale's precision, returned in h's."""
    rows = scale.index_select(0, expert_ids.reshape(-1))  # [ids, R]
    repeat = _tokens_per_id(expert_ids, lead)
    if repeat == 1:
        return (h * rows).to(h.dtype)
    return (h.reshape(rows.shape[0], repeat, h.shape[1]) * rows[:, None]).reshape(h.shape).to(h.dtype)


def _tokens_per_id(expert_ids: Tensor, lead: torch.Size) -> int:
    count = 1
    for size in lead[expert_ids.dim() :]:
        count *= size
    return count
