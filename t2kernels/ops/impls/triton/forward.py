"""The skinny forward, T up to about 200: y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i as two launches.

*shrink* makes g = (x V) * scale[e], [T, C]; *expand* makes every y_i of a group. Both read a factor once, in rows that are contiguous along
the summed dimension (Vᵀ [C, N], U [M, C]), as the left operand of acc [BR, BT]: with few tokens the long side of the product must be the
factor's. On sm_90 and later the second launch starts under the first (programmatic dependent launch): a block loads its first one or two tiles
of the factor by hand, then waits for the kernel before it, then reads activations, ids and scale. Factors must therefore not be written by the
kernel just before.

`scale` is read as a [BR, BT] tile here, 64 numbers a thread at the most and before the sum starts. A loop over the tile's experts, which the
large tiles need, would be BT dependent trips to memory where every token has its own expert: longer than the whole kernel.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2kernels.ops.tuning.tiles import Tiles, cdiv

from .common import INTERPRETED, Launch, cast, choose, options, products, put, triton_dtype

MEMBERS = 4  # q, k, v and one more: what one expand launch can hold


@triton.jit
def _factor(ptrs, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs, eviction_policy="evict_first")
    else:
        return tl.load(ptrs, mask=(k < K)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _activations(
    ptrs, scale_ptrs, part, k, K, live, EVEN: tl.constexpr, SPLIT: tl.constexpr, HEADROOM: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BK, BT] in the dtype of the products. SPLIT > 1: the partial sums of h, added in order, times scale."""
    mask = live[None, :] if EVEN else live[None, :] & (k < K)[:, None]
    a = tl.load(ptrs, mask=mask, other=0.0)
    if SPLIT > 1:
        for s in tl.static_range(1, SPLIT):
            a += tl.load(ptrs + s * part, mask=mask, other=0.0)
        a *= tl.load(scale_ptrs, mask=mask, other=0.0)
    if HEADROOM != 1.0:
        a = a.to(tl.float32) * HEADROOM
    return cast(a, DTYPE, INTERPRETED)


@triton.jit
def _dot(w, a, acc, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    return tl.dot(cast(w, DTYPE, INTERPRETED), a, acc, input_precision="ieee")


@triton.jit
def _plus_base(acc, base):
    # -0.0 + base is base bit for bit; +0.0 + base is not, where base is -0.0. A row of zeros must return the base model exactly.
    return tl.where(acc == 0.0, -0.0, acc) + base.to(tl.float32)


@triton.jit
def _finish(acc, base_ptr, bias_ptr, at, r, M, inside, BASE: tl.constexpr, BIAS: tl.constexpr, HEADROOM: tl.constexpr):
    """base + acc + bias in fp32."""
    if HEADROOM != 1.0:
        acc *= 1.0 / HEADROOM
    if BASE:
        acc = _plus_base(acc, tl.load(base_ptr + at, mask=inside, other=0.0))
    if BIAS:
        acc += tl.load(bias_ptr + r, mask=r < M, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["T", "repeat"])
def shrink_kernel(
    x_ptr, vt_ptr, scale_ptr, ids_ptr, out_ptr, T, C, N, x_row, scale_row, repeat,
    BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    HEADROOM: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """SPLIT == 1: out [T, C] = (x V) * scale[e]. SPLIT > 1: out [SPLIT, T, C] fp32, part s the sum over its piece of N, not scaled."""
    part = tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    steps = tl.cdiv(N, BK * SPLIT)
    k = part * steps * BK + tl.arange(0, BK)
    live = t < T
    # Rows past the end repeat the last one: the factor needs no mask along C, and nothing of them is stored.
    w_ptrs = vt_ptr + tl.minimum(r, C - 1)[:, None].to(tl.int64) * N + k[None, :]
    x_ptrs = x_ptr + t[None, :].to(tl.int64) * x_row + k[:, None]
    if AHEAD > 0:
        w0 = _factor(w_ptrs, k, N, EVEN)
    if AHEAD > 1:
        w1 = _factor(w_ptrs + BK, k + BK, N, EVEN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (r < C)[:, None] & live[None, :]
    if SPLIT == 1:
        e = tl.load(ids_ptr + t // repeat, mask=live, other=0).to(tl.int64)
        s = tl.load(scale_ptr + e[None, :] * scale_row + r[:, None], mask=inside, other=0.0)
    acc = tl.zeros((BR, BT), tl.float32)
    if AHEAD > 0:
        acc = _dot(
            w0,
            _activations(x_ptrs, x_ptrs, 0, k, N, live, EVEN, 1, HEADROOM, DTYPE, INTERPRETED),
            acc,
            DTYPE,
            INTERPRETED,
        )
    if AHEAD > 1:
        a = _activations(x_ptrs + BK, x_ptrs, 0, k + BK, N, live, EVEN, 1, HEADROOM, DTYPE, INTERPRETED)
        acc = _dot(w1, a, acc, DTYPE, INTERPRETED)
    w_ptrs += AHEAD * BK
    x_ptrs += AHEAD * BK
    k += AHEAD * BK
    for _ in range(AHEAD, steps):
        w = _factor(w_ptrs, k, N, EVEN)
        a = _activations(x_ptrs, x_ptrs, 0, k, N, live, EVEN, 1, HEADROOM, DTYPE, INTERPRETED)
        acc = _dot(w, a, acc, DTYPE, INTERPRETED)
        w_ptrs += BK
        x_ptrs += BK
        k += BK
    if SPLIT == 1:
        acc *= s
    put(out_ptr + (part.to(tl.int64) * T + t[None, :]) * C + r[:, None], acc, inside, INTERPRETED)


@triton.jit(do_not_specialize=["T", "repeat"])
def expand_kernel(
    g_ptr, scale_ptr, ids_ptr, u0, u1, u2, u3, base0, base1, base2, base3, bias0, bias1, bias2, bias3, y0, y1, y2, y3,
    M0, M1, M2, M3, K0, K1, K2, K3, c1, c2, c3, T, C, scale_row, repeat,
    MEMBERS: tl.constexpr, BASES: tl.constexpr, BIASES: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, HEADROOM: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y_i [T, M_i] = base_i + g[:, c_i : c_i + K_i] U_iᵀ + bias_i for every member i: a block looks up whose rows its tile holds.

    SPLIT == 1: g [T, C], scaled. SPLIT > 1: g [SPLIT, T, C] fp32 as shrink leaves it. BASES, BIASES: bit i says that member i has one.
    """
    tile = tl.program_id(1)
    n0 = tl.cdiv(M0, BR)
    i = 0
    if MEMBERS > 1:
        n1 = n0 + tl.cdiv(M1, BR)
        n2 = n1 + tl.cdiv(M2, BR) if MEMBERS > 2 else n1
        i = (tile >= n0).to(tl.int32)
        if MEMBERS > 2:
            i += (tile >= n1).to(tl.int32)
        if MEMBERS > 3:
            i += (tile >= n2).to(tl.int32)
        tile -= choose(i, 0, n0, n1, n2, MEMBERS)
    M = choose(i, M0, M1, M2, M3, MEMBERS)
    K = choose(i, K0, K1, K2, K3, MEMBERS)
    u_ptr = choose(i, u0, u1, u2, u3, MEMBERS)
    y_ptr = choose(i, y0, y1, y2, y3, MEMBERS)
    column = choose(i, 0, c1, c2, c3, MEMBERS)

    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tile * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    live = t < T
    w_ptrs = u_ptr + tl.minimum(r, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    g_ptrs = g_ptr + t[None, :].to(tl.int64) * C + column + k[:, None]
    if AHEAD > 0:
        w0 = _factor(w_ptrs, k, K, EVEN)
    if AHEAD > 1:
        w1 = _factor(w_ptrs + BK, k + BK, K, EVEN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (r < M)[:, None] & live[None, :]
    at = t[None, :].to(tl.int64) * M + r[:, None]
    if BASES:  # read before the sum, which hides the latency
        has_base = (r < M * ((BASES >> i) & 1))[:, None] & live[None, :]  # no row, where this member has none
        base = tl.load(choose(i, base0, base1, base2, base3, MEMBERS) + at, mask=has_base, other=0.0)
    if BIASES:
        bias = tl.load(choose(i, bias0, bias1, bias2, bias3, MEMBERS) + r, mask=r < M * ((BIASES >> i) & 1), other=0.0)
    part = T.to(tl.int64) * C
    s_ptrs = g_ptrs
    if SPLIT > 1:
        e = tl.load(ids_ptr + t // repeat, mask=live, other=0).to(tl.int64)
        s_ptrs = scale_ptr + e[None, :] * scale_row + column + k[:, None]
    acc = tl.zeros((BR, BT), tl.float32)
    if AHEAD > 0:
        acc = _dot(
            w0,
            _activations(g_ptrs, s_ptrs, part, k, K, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED),
            acc,
            DTYPE,
            INTERPRETED,
        )
    if AHEAD > 1:
        a = _activations(g_ptrs + BK, s_ptrs + BK, part, k + BK, K, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED)
        acc = _dot(w1, a, acc, DTYPE, INTERPRETED)
    w_ptrs += AHEAD * BK
    g_ptrs += AHEAD * BK
    s_ptrs += AHEAD * BK
    k += AHEAD * BK
    for _ in range(AHEAD, tl.cdiv(K, BK)):
        w = _factor(w_ptrs, k, K, EVEN)
        a = _activations(g_ptrs, s_ptrs, part, k, K, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED)
        acc = _dot(w, a, acc, DTYPE, INTERPRETED)
        w_ptrs += BK
        g_ptrs += BK
        s_ptrs += BK
        k += BK
    if HEADROOM != 1.0:
        acc *= 1.0 / HEADROOM
    if BASES:
        acc = _plus_base(acc, base)
    if BIASES:
        acc += bias.to(tl.float32)[:, None]
    put(y_ptr + at, acc, inside, INTERPRETED)


@triton.jit(do_not_specialize=["T", "repeat"])
def swiglu_kernel(
    g_ptr, scale_ptr, ids_ptr, u0, u1, base0, base1, bias0, bias1, y_ptr, M, K0, K1, T, C, scale_row, repeat,
    BASES: tl.constexpr, BIASES: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr, EVEN: tl.constexpr, HEADROOM: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y [T, M] = silu(y_0) * y_1 with y_i as in expand_kernel, both rounded to y's dtype before and silu after, as three separate ops do."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    live = t < T
    rows = tl.minimum(r, M - 1)[:, None].to(tl.int64)
    gate_ptrs = u0 + rows * K0 + k[None, :]
    up_ptrs = u1 + rows * K1 + k[None, :]
    g_ptrs = g_ptr + t[None, :].to(tl.int64) * C + k[:, None]
    if AHEAD > 0:
        w0 = _factor(gate_ptrs, k, K0, EVEN)
        w1 = _factor(up_ptrs, k, K1, EVEN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (r < M)[:, None] & live[None, :]
    at = t[None, :].to(tl.int64) * M + r[:, None]
    part = T.to(tl.int64) * C
    s_ptrs = g_ptrs
    if SPLIT > 1:
        e = tl.load(ids_ptr + t // repeat, mask=live, other=0).to(tl.int64)
        s_ptrs = scale_ptr + e[None, :] * scale_row + k[:, None]
    gate = tl.zeros((BR, BT), tl.float32)
    up = tl.zeros((BR, BT), tl.float32)
    if AHEAD > 0:
        gate = _dot(
            w0,
            _activations(g_ptrs, s_ptrs, part, k, K0, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED),
            gate,
            DTYPE,
            INTERPRETED,
        )
        a = _activations(g_ptrs + K0, s_ptrs + K0, part, k, K1, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED)
        up = _dot(w1, a, up, DTYPE, INTERPRETED)
    for step in range(AHEAD, tl.cdiv(tl.maximum(K0, K1), BK)):
        at_k = step * BK
        w = _factor(gate_ptrs + at_k, k + at_k, K0, EVEN)
        a = _activations(g_ptrs + at_k, s_ptrs + at_k, part, k + at_k, K0, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED)
        gate = _dot(w, a, gate, DTYPE, INTERPRETED)
        w = _factor(up_ptrs + at_k, k + at_k, K1, EVEN)
        a = _activations(
            g_ptrs + K0 + at_k, s_ptrs + K0 + at_k, part, k + at_k, K1, live, EVEN, SPLIT, 1.0, DTYPE, INTERPRETED
        )
        up = _dot(w, a, up, DTYPE, INTERPRETED)
    gate = _finish(gate, base0, bias0, at, r, M, inside, BASES & 1, BIASES & 1, HEADROOM)
    up = _finish(up, base1, bias1, at, r, M, inside, BASES & 2, BIASES & 2, HEADROOM)
    gate = cast(gate, y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    up = cast(up, y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    silu = cast(gate / (1.0 + tl.exp(-gate)), y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    put(y_ptr + at, silu * up, inside, INTERPRETED)


# --- launches ----------------------------------------------------------------------------------------------------------------------


def _ahead(K: int, tile: Tiles, w_dtype: torch.dtype, split: int = 1, parts: int = 1) -> int:
    """How many steps are loaded by hand before the wait: two, or one where the registers of two, with the sum and scale, would spill."""
    a_bytes = 2 if parts == 1 else 4 * (parts + 1)  # partial sums and scale are fp32, and are all in flight together
    step = tile.BK * (tile.BR * w_dtype.itemsize + tile.BT * a_bytes) // (4 * 32 * tile.warps)  # registers of a thread
    both = tile.BT <= 32 and step <= 48
    return min(2 if both else 1, cdiv(K, tile.BK * split))


def shrink_launch(
    x: Tensor,
    Vt: Tensor,
    scale: Tensor,
    ids: Tensor,
    repeat: int,
    out: Tensor,
    tile: Tiles,
    arch: tuple[int, int],
    settled: bool = True,
) -> Launch:
    """x [T, N], Vt [C, N] -> out: g [T, C] for split 1, else partial sums [split, T, C] in fp32.

    settled: False where a factor was just written, and nothing of it may be read before the wait; here and below
    """
    (T, N), C = x.shape, Vt.shape[0]
    dtype, headroom = products(x.dtype, Vt.dtype)
    chosen = options(tile, arch, pdl=settled)
    return Launch(
        shrink_kernel,
        (cdiv(T, tile.BT), cdiv(C, tile.BR), tile.split),
        dict(
            x_ptr=x, vt_ptr=Vt, scale_ptr=scale, ids_ptr=ids, out_ptr=out, T=T, C=C, N=N, x_row=x.stride(0), scale_row=scale.stride(0),
            repeat=repeat,
        ),
        dict(
            BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=tile.split, AHEAD=_ahead(N, tile, Vt.dtype, split=tile.split), EVEN=N % (tile.BK * tile.split) == 0,
            HEADROOM=headroom, DTYPE=triton_dtype(dtype), PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def expand_launch(
    g: Tensor, Us: list[Tensor], bases: list[Tensor | None], biases: list[Tensor | None], ys: list[Tensor], tile: Tiles, arch: tuple[int, int],
    scale: Tensor | None = None, ids: Tensor | None = None, repeat: int = 1, settled: bool = True,
) -> Launch:  # fmt: skip
    """g as shrink left it ([T, C] with any stride between rows, or [split, T, C] with scale and ids) -> ys, each [T, M_i]."""
    split = g.shape[0] if g.dim() == 3 else 1
    T, C = g.shape[-2], g.stride(-2)
    dtype, headroom = products(ys[0].dtype, Us[0].dtype)
    chosen = options(tile, arch, pdl=settled)
    columns = [0, *accumulate(U.shape[1] for U in Us)]

    def four(name: str, values: list) -> dict[str, object]:
        return {f"{name}{i}": v for i, v in enumerate(values + [values[0]] * (MEMBERS - len(values)))}

    def present(given: list[Tensor | None]) -> list[Tensor | None]:
        some = next((t for t in given if t is not None), None)  # stands in, masked, for a member that has none
        return [some if t is None else t for t in given]

    return Launch(
        expand_kernel,
        (cdiv(T, tile.BT), sum(cdiv(U.shape[0], tile.BR) for U in Us)),
        dict(
            g_ptr=g, scale_ptr=scale, ids_ptr=ids, **four("u", Us), **four("base", present(bases)), **four("bias", present(biases)), **four("y", ys),
            **four("M", [U.shape[0] for U in Us]), **four("K", [U.shape[1] for U in Us]),
            **{f"c{i}": columns[i] if i < len(Us) else 0 for i in range(1, MEMBERS)},
            T=T, C=C, scale_row=0 if scale is None else scale.stride(0), repeat=repeat,
        ),
        dict(
            MEMBERS=len(Us), BASES=_bits(bases), BIASES=_bits(biases), BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=split,
            AHEAD=min(_ahead(U.shape[1], tile, U.dtype, parts=split) for U in Us), EVEN=all(U.shape[1] % tile.BK == 0 for U in Us), HEADROOM=headroom,
            DTYPE=triton_dtype(dtype), PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def swiglu_launch(
    g: Tensor, Us: list[Tensor], bases: list[Tensor | None], biases: list[Tensor | None], y: Tensor, tile: Tiles, arch: tuple[int, int],
    scale: Tensor | None = None, ids: Tensor | None = None, repeat: int = 1, settled: bool = True,
) -> Launch:  # fmt: skip
    """g of the two members gate and up -> y [T, M] = silu(gate) * up."""
    split = g.shape[0] if g.dim() == 3 else 1
    T, C = g.shape[-2:]
    dtype, headroom = products(y.dtype, Us[0].dtype)
    chosen = options(tile, arch, pdl=settled)
    K0, K1 = Us[0].shape[1], Us[1].shape[1]
    return Launch(
        swiglu_kernel,
        (cdiv(T, tile.BT), cdiv(y.shape[1], tile.BR)),
        dict(
            g_ptr=g, scale_ptr=scale, ids_ptr=ids, u0=Us[0], u1=Us[1], base0=bases[0], base1=bases[1], bias0=biases[0], bias1=biases[1],
            y_ptr=y, M=y.shape[1], K0=K0, K1=K1, T=T, C=C, scale_row=0 if scale is None else scale.stride(0), repeat=repeat,
        ),
        dict(
            BASES=_bits(bases), BIASES=_bits(biases), BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=split,
            AHEAD=min(1, cdiv(K0, tile.BK), cdiv(K1, tile.BK)), EVEN=K0 == K1 and K0 % tile.BK == 0, HEADROOM=headroom,
            DTYPE=triton_dtype(dtype), PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def _bits(given: list[Tensor | None]) -> int:
    """Bit i: member i has one."""
    return sum(1 << i for i, t in enumerate(given) if t is not None)
