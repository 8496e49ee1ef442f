"""Forward and backward for many tokens: the matmuls of impl="torch", and one Triton pass over [T, C] between them."""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels.ops.impls import torch_kernels
from t2kernels.ops.precision import backward_precision

from .backward import scale_and_sum, scale_rows


def row_scaling(
    h: Tensor, scale: Tensor, expert_ids: Tensor, lead: torch.Size, times: float, out: Tensor | None = None
) -> Tensor:
    """h [T, C] * scale[expert_ids] * times: the Triton pass with the arguments of `torch_kernels.scale_rows`."""
    repeat = torch_kernels.tokens_per_id(expert_ids, lead)
    return scale_rows(h, scale if times == 1 else scale * times, expert_ids, max(1, repeat), out)


def backward(
    dys: list[Tensor], x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, need_dx: bool,
    need_dscale: bool, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p = dy U;  dx = (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of (x V) * p, [E, C] fp32.

    h: x V of the forward, or None: computed again

    Products are made in x's dtype for factors of any dtype. The bits are the same in every run, and in any order of
    tokens the same to fp32 rounding. An expert without tokens gets exactly 0. A gradient that is not
    needed is empty, [0].
    """
    p, lead, times = torch_kernels.through_U(dys, Us), x.shape[:-1], backward_precision(x.dtype, V.dtype).scale
    dx, dscale = x.new_empty(0), scale.new_empty(0)
    if need_dscale:
        h = torch_kernels.through_V(x, V) if h is None else h
        rows = scale if times == 1 else scale * times
        repeat = max(1, torch_kernels.tokens_per_id(expert_ids, lead))
        dscale = scale_and_sum(p, h, rows, expert_ids, repeat, p if need_dx else None)
        unit = torch_kernels.unit_of_dscale(x.dtype, V.dtype)
        dscale = dscale if unit == 1 else dscale.mul_(unit)
    elif need_dx:
        row_scaling(p, scale, expert_ids, lead, times, out=p)
    if need_dx:
        dx = torch_kernels.back_through_V(p, V, x.shape)
    return dx, dscale
