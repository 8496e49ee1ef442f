"""The kernels of the skinny forward in two launches, for T up to about 200.

    y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i

*shrink* makes g = (x V) * scale[e], [T, C]; *expand* makes every y_i of a group. Each reads a factor once, in rows that
are contiguous along the summed dimension (Vᵀ [C, N], U [M, C]). The factor is the left operand of acc [BR, BT]: with
few tokens it has the long side of the product.

On sm_90 and later the second launch starts under the first (programmatic dependent launch). A block loads its first one
or two tiles of the factor by hand, waits for the previous kernel, and then reads activations, ids and scale. The
previous kernel must therefore not write factors.

`scale` is read as a [BR, BT] tile before the sum starts, at most 64 numbers a thread. The large tiles loop over the
experts of a tile instead: here, where every token may have its own expert, that loop would be BT dependent trips to
memory, longer than the whole kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, choose, put, table_row


@triton.jit
def _factor(ptrs, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs, eviction_policy="evict_first")
    else:
        return tl.load(ptrs, mask=(k < K)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _activations(
    ptrs, scale_ptrs, part, k, K, live, EVEN: tl.constexpr, SPLIT: tl.constexpr, HEADROOM: tl.constexpr,
    DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Activations [BK, BT] in the products' dtype. SPLIT > 1: the partial sums of h, added in order, times scale."""
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
    # A row of zeros must return the base model exactly: +0.0 + base is not base for base = -0.0. A literal -0.0 would
    # not do: Triton 3.6 compiles it to +0.0.
    base = base.to(tl.float32)
    return tl.where(acc == 0.0, base, acc + base)


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


@triton.jit(do_not_specialize=["T", "E", "repeat"])
def shrink_kernel(
    x_ptr, vt_ptr, scale_ptr, ids_ptr, out_ptr, T, C, N, E, x_row, scale_row, repeat,
    BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    HEADROOM: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """SPLIT == 1: out [T, C] = (x V) * scale[e]. SPLIT > 1: out [SPLIT, T, C] fp32; part s is the unscaled sum over its
    piece of N."""
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
        e, known = table_row(ids_ptr + t // repeat, live, E)
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
        acc = tl.where(known[None, :], acc * s, float("nan"))
    put(out_ptr + (part.to(tl.int64) * T + t[None, :]) * C + r[:, None], acc, inside, INTERPRETED)


@triton.jit(do_not_specialize=["T", "E", "repeat"])
def expand_kernel(
    g_ptr, scale_ptr, ids_ptr, u0, u1, u2, u3, base0, base1, base2, base3, bias0, bias1, bias2, bias3, y0, y1, y2, y3,
    M0, M1, M2, M3, K0, K1, K2, K3, c1, c2, c3, T, C, E, scale_row, repeat,
    MEMBERS: tl.constexpr, BASES: tl.constexpr, BIASES: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, HEADROOM: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """y_i [T, M_i] = base_i + g[:, c_i : c_i + K_i] U_iᵀ + bias_i for every member i. A block looks up the member of
    its tile.

    SPLIT == 1: g [T, C], scaled. SPLIT > 1: g [SPLIT, T, C] fp32, as shrink leaves it. BASES, BIASES: bit i is set if
    member i has one.
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
        e, known = table_row(ids_ptr + t // repeat, live, E)
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
    if SPLIT > 1:
        acc = tl.where(known[None, :], acc, float("nan"))
    if HEADROOM != 1.0:
        acc *= 1.0 / HEADROOM
    if BASES:
        acc = _plus_base(acc, base)
    if BIASES:
        acc += bias.to(tl.float32)[:, None]
    put(y_ptr + at, acc, inside, INTERPRETED)


@triton.jit(do_not_specialize=["T", "E", "repeat"])
def swiglu_kernel(
    g_ptr, scale_ptr, ids_ptr, u0, u1, base0, base1, bias0, bias1, y_ptr, M, K0, K1, T, C, E, scale_row, repeat,
    BASES: tl.constexpr, BIASES: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, HEADROOM: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """y [T, M] = silu(y_0) * y_1 with y_i as in expand_kernel. y_0, y_1 and silu are rounded to y's dtype, as three
    separate ops do."""
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
        e, known = table_row(ids_ptr + t // repeat, live, E)
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
    if SPLIT > 1:
        gate = tl.where(known[None, :], gate, float("nan"))
    gate = _finish(gate, base0, bias0, at, r, M, inside, BASES & 1, BIASES & 1, HEADROOM)
    up = _finish(up, base1, bias1, at, r, M, inside, BASES & 2, BIASES & 2, HEADROOM)
    gate = cast(gate, y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    up = cast(up, y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    silu = cast(gate / (1.0 + tl.exp(-gate)), y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    put(y_ptr + at, silu * up, inside, INTERPRETED)
