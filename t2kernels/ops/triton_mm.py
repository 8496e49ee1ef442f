"""Forward and backward for many tokens: the products are torch.mm's, what is between them is one Triton pass over [T, C]."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_backward import Segments, scale_and_sum, scale_rows
from .triton_common import products, repeat_of, rows_2d


def forward_mm(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None],
    need_h: bool = False,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    lead, repeat = x.shape[:-1], repeat_of(x, expert_ids)
    dtype, headroom = products(x.dtype, V.dtype)
    h = _through_v(rows_2d(x), V)
    g = scale_rows(h, scale, expert_ids, repeat, out=None if need_h else h)
    ys = []
    for g_i, U, base, bias in zip(g.split([U.shape[1] for U in Us], 1), Us, bases, biases, strict=True):
        base = None if base is None else base.reshape(g.shape[0], U.shape[0])
        U = U.to(dtype)
        if headroom != 1.0:
            y = _from_fp16(g_i @ U.t(), 1 / headroom, base, x.dtype)
        elif base is not None:
            y = torch.addmm(base, g_i, U.t())  # one rounding
        elif bias is not None:
            y, bias = torch.addmm(bias, g_i, U.t()), None
        else:
            y = g_i @ U.t()
        if bias is not None:
            y += bias
        ys.append(y.reshape(*lead, U.shape[0]))
    return ys, h if need_h else None


def backward(
    dys: list[Tensor], x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, need_dx: bool, need_dscale: bool,
    h: Tensor | None = None, deterministic: bool = True, parts: Segments | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    repeat, x2 = repeat_of(x, expert_ids), rows_2d(x)
    T, dtype = x2.shape[0], x.dtype
    p = x.new_empty(T, V.shape[1])
    for p_i, dy, U in zip(p.split([U.shape[1] for U in Us], 1), dys, Us, strict=True):
        torch.mm(dy.reshape(T, U.shape[0]), U.to(dtype), out=p_i)
    dx, dscale = x.new_empty(0), scale.new_empty(0)
    if need_dscale:
        h = _through_v(x2, V) if h is None else h
        dscale = scale_and_sum(p, h, scale, expert_ids, repeat, p if need_dx else None, parts, deterministic)
        headroom = products(dtype, V.dtype)[1]
        if headroom != 1.0:
            dscale *= 1 / headroom  # h came times 2^-5
    elif need_dx:
        scale_rows(p, scale, expert_ids, repeat, out=p)
    if need_dx:
        dx = (p @ V.t().to(dtype)).reshape(x.shape)
    return dx, dscale


def _through_v(x: Tensor, V: Tensor) -> Tensor:
    """x V in the dtype of the products, times 2^-5 where fp16 products meet bf16 data. The activations are converted, not the factors."""
    dtype, headroom = products(x.dtype, V.dtype)
    if headroom != 1.0:
        x = x * headroom  # exact: a power of two
    return x.to(dtype) @ V.to(dtype)


def _from_fp16(y: Tensor, factor: float, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """base + factor * y, computed in fp32 and rounded once; without base the factor, a power of two, follows the rounding."""
    if base is None:
        return y.to(dtype).mul_(factor)
    return torch.add(base, y, alpha=factor, out=torch.empty_like(base))
