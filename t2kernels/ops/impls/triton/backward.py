"""The passes over [T, C] between two matmuls. Forward: g = h * scale[e]. Backward, from p = dy U and h = x V:

    q[t] = p[t] * scale[e(t)]                  for dx = q Vᵀ
    dscale[e] = sum over the tokens t of e of h[t] * p[t]

`scale` is never gathered as a tile: a loop over the experts of the tile, smallest first, reads one row vector each. A
tile of a sequence has one.

dscale is summed in fp32, in a fixed order, without atomics. Tokens are taken in the stable order of their experts.
Every tile of BT tokens writes one partial sum for each of its experts, and a second kernel adds the partial sums of
each expert. The sum of tile i for the expert of rank j among those present goes to slot i + j: experts come in order,
so slots are distinct, and the slots of an expert follow one another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2kernels import InputError
from t2kernels.ops.tuning.tiles import Tiles, cdiv, tiles

from .common import INTERPRETED, Launch, capability, options, put, table_row

NO_EXPERT = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["T", "E", "repeat"])
def scale_rows_kernel(
    h_ptr, scale_ptr, ids_ptr, out_ptr, T, C, E, h_row, scale_row, out_row, repeat,
    BR: tl.constexpr, BT: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """out[t] = h[t] * scale[ids[t // repeat]]. out may be h."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    inside = (t < T)[:, None] & (r < C)[None, :]
    h = tl.load(h_ptr + t[:, None].to(tl.int64) * h_row + r[None, :], mask=inside, other=0.0).to(tl.float32)
    e, known = table_row(ids_ptr + tl.minimum(t, T - 1) // repeat, t >= 0, E)
    e = e.to(tl.int32)
    g = h
    now = tl.min(e, 0)
    last = tl.max(e, 0)
    while now <= last:
        row = tl.load(scale_ptr + now.to(tl.int64) * scale_row + r, mask=r < C, other=0.0)
        g = tl.where((e == now)[:, None], h * row[None, :], g)
        now = tl.min(tl.where(e > now, e, NO_EXPERT), 0)
    g = tl.where(known[:, None], g, float("nan"))
    put(out_ptr + t[:, None].to(tl.int64) * out_row + r[None, :], g, inside, INTERPRETED)


@triton.jit(do_not_specialize=["T", "repeat"])
def backward_kernel(
    p_ptr, h_ptr, scale_ptr, ids_ptr, order_ptr, rank_ptr, q_ptr, slots_ptr, T, C, p_row, h_row, scale_row, repeat,
    BR: tl.constexpr, BT: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """q[t] = p[t] * scale[e(t)] if q_ptr is given (it may be p_ptr), and the sums of h[t] * p[t], into slots_ptr."""
    tile = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    place = tile * BT + tl.arange(0, BT)
    live = place < T
    place = tl.minimum(place, T - 1)  # places past the end repeat the last expert and add nothing
    at = tl.load(order_ptr + place // repeat)
    t = at.to(tl.int64) * repeat + place % repeat
    e = tl.load(ids_ptr + at).to(tl.int32)
    inside = live[:, None] & (r < C)[None, :]
    p = tl.load(p_ptr + t[:, None] * p_row + r[None, :], mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + t[:, None] * h_row + r[None, :], mask=inside, other=0.0).to(tl.float32)
    product = p * h
    q = p
    now = tl.min(e, 0)
    last = tl.max(e, 0)
    slot = tile + tl.load(rank_ptr + tile * BT // repeat)
    while now <= last:
        mine = (e == now)[:, None]
        total = tl.sum(tl.where(mine, product, 0.0), 0)
        tl.store(slots_ptr + slot.to(tl.int64) * C + r, total, mask=r < C)
        slot += 1
        if q_ptr is not None:
            row = tl.load(scale_ptr + now.to(tl.int64) * scale_row + r, mask=r < C, other=0.0)
            q = tl.where(mine, p * row[None, :], q)
        now = tl.min(tl.where(e > now, e, NO_EXPERT), 0)
    if q_ptr is not None:
        put(q_ptr + t[:, None] * p_row + r[None, :], q, inside, INTERPRETED)


@triton.jit(do_not_specialize=["repeat"])
def sum_slots_kernel(
    slots_ptr, starts_ptr, rank_ptr, dscale_ptr, C, repeat, BT: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr
):
    """dscale[e] = the sum of the slots of e, BS at a time. An expert without tokens gets 0."""
    e = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    start = tl.load(starts_ptr + e).to(tl.int64) * repeat
    end = tl.load(starts_ptr + e + 1).to(tl.int64) * repeat
    rank = tl.load(rank_ptr + e)
    slot = start // BT + rank
    stop = tl.where(end > start, (end - 1) // BT + 1 + rank, slot)
    total = tl.zeros((BR,), tl.float32)
    while slot < stop:
        s = slot + tl.arange(0, BS)
        total += tl.sum(
            tl.load(slots_ptr + s[:, None] * C + r[None, :], mask=(s < stop)[:, None] & (r < C)[None, :], other=0.0), 0
        )
        slot += BS
    tl.store(dscale_ptr + e.to(tl.int64) * C + r, total, mask=r < C)


class Segments(NamedTuple):
    """The tokens in the stable order of their experts.

    order: [ids] int32, positions in expert_ids, sorted by expert
    rank: [ids] int32, rank of the expert of each position of `order` among the experts present
    starts: [E + 1] int32, where the positions of an expert begin in `order`
    expert_rank: [E] int32, rank of an expert among those present
    """

    order: Tensor
    rank: Tensor
    starts: Tensor
    expert_rank: Tensor


def segments(expert_ids: Tensor, E: int) -> Segments:
    """The segments of expert_ids for a table of E rows, made on the device without a sync."""
    ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    starts = torch.searchsorted(ids, torch.arange(E + 1, dtype=ids.dtype, device=ids.device), out_int32=True)
    present = (starts[1:] > starts[:-1]).int()
    expert_rank = (present.cumsum(0) - present).int()
    return Segments(order.int(), expert_rank.index_select(0, ids), starts, expert_rank)


# --- launches as data ---------------------------------------------------------------------------------


def scale_rows_launch(
    h: Tensor, scale: Tensor, ids: Tensor, repeat: int, out: Tensor, tile: Tiles, arch: tuple[int, int]
) -> Launch:
    """h [T, C] -> out = h * scale[ids], a token's id at its place // repeat."""
    T, C = h.shape
    return Launch(
        scale_rows_kernel,
        (cdiv(T, tile.BT), cdiv(C, tile.BR)),
        dict(
            h_ptr=h, scale_ptr=scale, ids_ptr=ids, out_ptr=out, T=T, C=C, E=scale.shape[0], h_row=h.stride(0),
            scale_row=scale.stride(0), out_row=out.stride(0), repeat=repeat,
        ),
        dict(BR=tile.BR, BT=tile.BT, INTERPRETED=INTERPRETED),
        options(tile, arch, pdl=False),
    )  # fmt: skip


def backward_launch(
    p: Tensor, h: Tensor, scale: Tensor, ids: Tensor, repeat: int, parts: Segments, q: Tensor | None, slots: Tensor,
    tile: Tiles, arch: tuple[int, int]
) -> Launch:  # fmt: skip
    """p, h [T, C] -> q, if it is given, and slots [tiles + experts, C] fp32."""
    T, C = p.shape
    return Launch(
        backward_kernel,
        (cdiv(T, tile.BT), cdiv(C, tile.BR)),
        dict(
            p_ptr=p, h_ptr=h, scale_ptr=scale, ids_ptr=ids, order_ptr=parts.order, rank_ptr=parts.rank, q_ptr=q,
            slots_ptr=slots, T=T, C=C, p_row=p.stride(0), h_row=h.stride(0), scale_row=scale.stride(0), repeat=repeat,
        ),
        dict(BR=tile.BR, BT=tile.BT, INTERPRETED=INTERPRETED),
        options(tile, arch, pdl=False),
    )  # fmt: skip


def sum_slots_launch(
    slots: Tensor, parts: Segments, repeat: int, dscale: Tensor, BT: int, arch: tuple[int, int]
) -> Launch:
    """slots of `backward_launch` -> dscale [E, C]. BT: tokens of a tile there."""
    E, C = dscale.shape
    tile = Tiles(BR=64, BT=BT, BK=1, split=1, warps=4, stages=1)
    return Launch(
        sum_slots_kernel,
        (E, cdiv(C, tile.BR)),
        dict(
            slots_ptr=slots, starts_ptr=parts.starts, rank_ptr=parts.expert_rank, dscale_ptr=dscale, C=C, repeat=repeat
        ),
        dict(BT=BT, BR=tile.BR, BS=32),  # 32 slots are 1024 tokens: one trip to memory for each
        options(tile, arch, pdl=False),
    )


# --- called by matmul.py ---------------------------------------------------------------------------------


def scale_rows(h: Tensor, scale: Tensor, expert_ids: Tensor, repeat: int, out: Tensor | None = None) -> Tensor:
    """g[t] = h[t] * scale[expert_ids[t // repeat]], [T, C] in h's dtype; out=h works in place."""
    h = h if h.stride(1) == 1 else h.contiguous()
    out = torch.empty_like(h) if out is None else out
    arch, scale = capability(h), scale if scale.stride(1) == 1 else scale.contiguous()
    tile = tiles("scale_rows", h.shape[0], h.shape[1], 1, h.dtype, h.dtype, arch)
    scale_rows_launch(h, scale, expert_ids.reshape(-1), repeat, out, tile, arch).run()
    return out


def scale_and_sum(p: Tensor, h: Tensor, scale: Tensor, expert_ids: Tensor, repeat: int, q: Tensor | None) -> Tensor:
    """dscale [E, C] fp32, and q[t] = p[t] * scale[e(t)] into q if it is given (it may be p). One pass over p and h."""
    (T, C), E = p.shape, scale.shape[0]
    if T == 0:
        return p.new_zeros(E, C, dtype=torch.float32)
    if q is not None and q.stride() != p.stride():
        raise InputError(f"q's strides are {q.stride()}, wanted p's, {p.stride()}")
    arch, scale, ids = capability(p), scale if scale.stride(1) == 1 else scale.contiguous(), expert_ids.reshape(-1)
    tile, parts = tiles("backward", T, C, 1, p.dtype, p.dtype, arch), segments(ids, E)
    slots = p.new_empty(cdiv(T, tile.BT) + min(E, ids.numel()), C, dtype=torch.float32)
    backward_launch(p, h, scale, ids, repeat, parts, q, slots, tile, arch).run()
    dscale = p.new_empty(E, C, dtype=torch.float32)
    sum_slots_launch(slots, parts, repeat, dscale, tile.BT, arch).run()
    return dscale
