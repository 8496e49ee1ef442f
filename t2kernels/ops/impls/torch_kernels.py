"""impl="torch": two matmuls around a row scaling, on any device of torch. Deterministic on the CPU.

The general case is a group of matrices that share x: V's side by side along C, one U a member. A single matrix is a
group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from t2kernels.ops.device import Device
from t2kernels.ops.planner import Call, Choice, Path, dense_path
from t2kernels.ops.precision import backward_precision, forward_precision

from .implementation import Added, Expansion, Implementation, InPlace, Operands

ScaleRows = Callable[..., Tensor]
"""A function with the arguments of `scale_rows`."""


class Torch(Implementation):
    """Plain torch as an implementation. It supports every call, so `auto` falls back to it."""

    name = "torch"

    @property
    def row_scaling(self) -> ScaleRows:
        """The row scaling between the two products."""
        return scale_rows

    def unsupported_device(self, device: torch.device) -> str | None:
        """See `Implementation`."""
        return None

    def unsupported(self, call: Call) -> str | None:
        """See `Implementation`."""
        return None

    def path(self, call: Call, device: Device) -> Path:
        """See `Implementation`."""
        return dense_path(call) or Path("mm", "two matmuls around a row scaling")

    def forward(self, choice: Choice, given: Operands) -> list[Tensor]:
        """See `Implementation`."""
        if choice.path == "dense":
            return materialised(*given, choice.experts)
        return forward(*given, self.row_scaling)

    def forward_saving(self, given: Operands) -> tuple[list[Tensor], Tensor]:
        """See `Implementation`."""
        return forward_saving(*given, self.row_scaling)

    def shrink(self, choice: Choice, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
        """See `Implementation`."""
        return shrink(x, V, scale, expert_ids, self.row_scaling)

    def expand(self, choice: Choice, given: Expansion) -> list[Tensor]:
        """See `Implementation`."""
        return expand(*given)

    def prepare(self, V: Tensor, Us: list[Tensor], scale: Tensor) -> InPlace | None:
        """See `Implementation`."""
        return prepare(V, Us, scale, self.row_scaling)

    def backward(
        self, dys: list[Tensor], given: Operands, need_dx: bool, need_dscale: bool, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Implementation`."""
        return backward(dys, *given[:5], need_dx, need_dscale, h)


TORCH = Torch()


def scale_rows(
    h: Tensor, scale: Tensor, expert_ids: Tensor, lead: torch.Size, times: float, out: Tensor | None = None
) -> Tensor:
    """h * scale[expert_ids] * times [T, C], multiplied in scale's precision and rounded once to h's dtype.

    h: [T, C]; scale: [E, C]; lead: x's leading sizes; out: where the result goes, h itself too; None for a new tensor
    """
    ids = expert_ids if expert_ids.dim() == 1 else expert_ids.reshape(-1)
    rows = _floats(scale.index_select(0, ids), scale.dtype, times)  # [ids, C]
    out = torch.empty_like(h) if out is None else out
    if rows.shape[0] in (1, h.shape[0]):
        return torch.mul(h, rows, out=out)
    by_id = (rows.shape[0], -1, h.shape[1]) if h.numel() else (rows.shape[0], 0, h.shape[1])
    torch.mul(h.view(by_id), rows[:, None], out=out.view(by_id))
    return out


def forward(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Added,
    biases: Added,
    row_scaling: ScaleRows = scale_rows,
) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i].

    row_scaling: the row scaling between the two products; here and below
    """
    g = shrink(x, V, scale, expert_ids, row_scaling)
    return expand(g, Us, bases, biases, x.dtype, x.shape[:-1])


def forward_saving(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Added,
    biases: Added,
    row_scaling: ScaleRows = scale_rows,
) -> tuple[list[Tensor], Tensor]:
    """`forward`, and h = x V [T, C] for `backward`."""
    h = through_V(x, V)
    g = row_scaling(h, scale, expert_ids, x.shape[:-1], forward_precision(x.dtype, V.dtype).scale)
    return expand(g, Us, bases, biases, x.dtype, x.shape[:-1]), h


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor, row_scaling: ScaleRows = scale_rows) -> Tensor:
    """g = (x V) * scale[expert_ids] [T, C], in the dtype and units of `forward_precision`."""
    h = through_V(x, V)
    return row_scaling(h, scale, expert_ids, x.shape[:-1], forward_precision(x.dtype, V.dtype).scale, h)


def through_V(x: Tensor, V: Tensor) -> Tensor:
    """h = x V [T, C], in the dtype and units of `forward_precision`."""
    how = forward_precision(x.dtype, V.dtype)
    return _floats(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), how.dtype, how.x) @ _floats(V, how.dtype, how.V)


def through_U(dys: list[Tensor], Us: list[Tensor]) -> Tensor:
    """p = dy U [T, C], in the dtype and units of `backward_precision`."""
    how = backward_precision(dys[0].dtype, Us[0].dtype)
    ps = [dy.reshape(-1, U.shape[0]) @ _floats(U, how.dtype, how.V) for dy, U in zip(dys, Us, strict=True)]
    return ps[0] if len(ps) == 1 else torch.cat(ps, dim=1)


def back_through_V(q: Tensor, V: Tensor, shape: torch.Size) -> Tensor:
    """dx = q Vᵀ, from q = p * scale[expert_ids]."""
    return (q @ _floats(V, q.dtype).t()).reshape(shape)


def unit_of_dscale(x: torch.dtype, factors: torch.dtype) -> float:
    """The factor that turns sums of `through_V` times `through_U` into dscale."""
    there, back = forward_precision(x, factors), backward_precision(x, factors)
    return 1 / (there.x * there.V * back.V)


def expand(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, dtype: torch.dtype, lead: torch.Size
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [*lead, M_i] in `dtype`, the dtype of x, from the g of `shrink`."""
    how = forward_precision(dtype, Us[0].dtype)
    columns = (slice(None),) if len(Us) == 1 else _columns(Us)
    ys = [
        _product(g if len(Us) == 1 else g[:, c], _floats(U, how.dtype), how.y, base, bias, dtype)
        for c, U, base, bias in zip(columns, Us, bases, biases, strict=True)
    ]
    return ys if len(lead) == 1 else [y.reshape(*lead, y.shape[-1]) for y in ys]


def prepare(V: Tensor, Us: list[Tensor], scale: Tensor, row_scaling: ScaleRows = scale_rows) -> InPlace:
    """`forward` in place for one group. New memory for y costs more than the products: 1.5 ms for two members of 1536
    columns and 264 tokens in bf16, 0.3 ms in place (one thread of an AMD EPYC)."""

    def run(x: Tensor, ids: Tensor, bases: list[Tensor], starts: Sequence[int] | None = None) -> bool:
        how = forward_precision(x.dtype, V.dtype)
        if how.y != 1 or not all(y.is_contiguous() and y.dtype == how.dtype for y in bases):
            return False
        g, rows = shrink(x, V, scale, ids, row_scaling), [y.view(-1, y.shape[-1]) for y in bases]
        if starts is not None:
            rows = [rows[0][:, s : s + U.shape[0]] for s, U in zip(starts, Us, strict=True)]
        for y, c, U in zip(rows, _columns(Us), Us, strict=True):
            y.addmm_(g[:, c], _floats(U, how.dtype).t())  # one rounding
        return True

    return run


def materialised(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Added,
    biases: Added,
    experts: Sequence[int] | None = None,
) -> list[Tensor]:
    """`forward` by W' = U diag(scale[e]) Vᵀ, made once for an expert, and x W'ᵀ: fewer operations for an expert with
    over max(M, N) tokens.

    experts: the rows whose W' is made; tokens of other experts go through `forward`. None: the one of all tokens.
    """
    x_, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    bases = [b if b is None else b.reshape(-1, b.shape[-1]) for b in bases]
    if experts is None:
        ys = _through_dense(x_, V, Us, scale.index_select(0, expert_ids.reshape(1)), bases, biases)
    else:
        ids = expert_ids.reshape(-1).repeat_interleave(tokens_per_id(expert_ids, lead))  # [T]
        ys = [x.new_empty(x_.shape[0], U.shape[0]) for U in Us]
        rest = torch.ones_like(ids, dtype=torch.bool)
        for e in [*experts, None]:
            mine = rest.nonzero()[:, 0] if e is None else (ids == e).nonzero()[:, 0]
            rest[mine] = False
            part = x_[mine], V, Us, scale
            added = [b if b is None else b[mine] for b in bases], biases
            found = (
                forward(*part, ids[mine], *added) if e is None else _through_dense(*part[:3], scale[e : e + 1], *added)
            )
            for y, y_e in zip(ys, found, strict=True):
                y[mine] = y_e
    return [y.reshape(*lead, y.shape[-1]) for y in ys]


def _through_dense(x: Tensor, V: Tensor, Us: list[Tensor], row: Tensor, bases: Added, biases: Added) -> list[Tensor]:
    how, ys = forward_precision(x.dtype, V.dtype), []
    row, x_ = row * how.scale, _floats(x, how.dtype, how.x)
    for c, U, base, bias in zip(_columns(Us), Us, bases, biases, strict=True):
        W = (U * row[:, c]).to(how.dtype) @ _floats(V[:, c], how.dtype, how.V).t()  # [M, N]
        ys.append(_product(x_, W, how.y, base, bias, x.dtype))
    return ys


def backward(
    dys: list[Tensor],
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    need_dx: bool,
    need_dscale: bool,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """p = dy U;  dx = (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of (x V) * p, in fp32.

    h: x V as `forward_saving` returned it, or None: computed again. A gradient that is not needed is empty, [0].
    """
    lead, p = x.shape[:-1], through_U(dys, Us)
    dx, dscale = x.new_empty(0), scale.new_empty(0)
    if need_dx:
        dx = back_through_V(
            scale_rows(p, scale, expert_ids, lead, backward_precision(x.dtype, V.dtype).scale), V, x.shape
        )
    if need_dscale:
        h = through_V(x, V) if h is None else h
        dscale = dscale_of(h, p, torch.zeros_like(scale), expert_ids, lead, unit_of_dscale(x.dtype, V.dtype))
    return dx, dscale


def dscale_of(h: Tensor, p: Tensor, zeros: Tensor, expert_ids: Tensor, lead: torch.Size, unit: float = 1.0) -> Tensor:
    """dscale[e] = unit * sum over the tokens of e of h * p [E, C], written into `zeros`, in its dtype. h, p: [T, C]"""
    product, rows, repeat = h.to(zeros.dtype) * p.to(zeros.dtype), expert_ids.numel(), tokens_per_id(expert_ids, lead)
    per_id = product if repeat == 1 else product.reshape(rows, repeat, product.shape[1]).sum(1)
    return zeros.index_add_(0, expert_ids.reshape(-1), per_id, alpha=unit)


def tokens_per_id(expert_ids: Tensor, lead: torch.Size) -> int:
    """The number of consecutive tokens that share one id; the shape of the ids is a leading part of `lead`."""
    count = 1
    for size in lead[expert_ids.dim() :]:
        count *= size
    return count


def _product(
    g: Tensor, U: Tensor, times: float, base: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """base + g Uᵀ * times + bias [T, M] in `dtype`. g = 0 returns base bit for bit."""
    if times != 1:
        y = (g @ U.t()).float() * times
        for added in (base, bias):
            y = y if added is None else y + added.reshape(-1, U.shape[0])
        return y.to(dtype)
    if base is None:
        return g @ U.t() if bias is None else torch.addmm(bias, g, U.t())
    y = torch.addmm(base if base.dim() == 2 else base.reshape(-1, U.shape[0]), g, U.t())  # one rounding
    return y if bias is None else y.add_(bias)


def _floats(t: Tensor, dtype: torch.dtype, times: float = 1.0) -> Tensor:
    if t.dtype == dtype:
        return t if times == 1 else t * times
    return t.to(dtype) if times == 1 else (t.float() * times).to(dtype)


def _columns(Us: list[Tensor]) -> Iterator[slice]:
    start = 0
    for U in Us:
        yield slice(start, start + U.shape[1])
        start += U.shape[1]
