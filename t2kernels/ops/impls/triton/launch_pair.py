"""The skinny forward from checked arguments to its launches: copies, tiles, allocations, each launch as data."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.ops.impls.implementation import Added
from t2kernels.ops.tuning.tiles import MEMBERS, Tiles, cdiv, tiles

from .common import INTERPRETED, Launch, capability, options, products, repeat_of, rows_2d, table_of, triton_dtype
from .forward import expand_kernel, shrink_kernel, swiglu_kernel

TilePair = tuple[Tiles, Tiles | None]
"""Tiles of the first and of the second launch; None for those of `tuning.tiles`."""


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] in the dtype and units of `forward_precision`."""
    (Vt,), settled = _factors([V.t()])
    x, scale, ids, repeat = _operands(x, scale, expert_ids)
    arch = capability(x)
    tile = replace(_tiles("shrink", x, [Vt], arch), split=1)
    return _shrink(x, Vt, scale, ids, repeat, tile, arch, settled)


def expand(g: Tensor, Us: list[Tensor], bases: Added, biases: Added, dtype: torch.dtype | None = None) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i], for the g of `shrink`.

    dtype: x's; needed if there is neither a base nor a bias
    """
    dtype = dtype or next((t.dtype for t in (*bases, *biases) if t is not None), g.dtype)
    Us, settled = _factors(_members(Us))
    arch, g = capability(g), g if g.stride(-1) == 1 else g.contiguous()
    tile = tiles(
        "expand", g.shape[0], sum(U.shape[0] for U in Us), max(U.shape[1] for U in Us), dtype, Us[0].dtype, arch
    )
    ys = [g.new_empty(g.shape[0], U.shape[0], dtype=dtype) for U in Us]
    expand_launch(g, Us, *_added(bases, biases, Us, g.shape[0]), ys, tile, arch, settled=settled).run()
    return ys


def forward_pair(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: Added,
    biases: Added, tile_pair: TilePair | None = None
) -> list[Tensor]:  # fmt: skip
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], in two launches.

    V, Us: in x's dtype, in another float or in int8; at most `MEMBERS` members
    tile_pair: the tiles of shrink and expand, to time others than `tuning.tiles` gives
    """
    lead, T, Ms = x.shape[:-1], x.shape[:-1].numel(), [U.shape[0] for U in Us]
    ys = [x.new_empty(T, M) for M in Ms]
    _two_launches("expand", expand_launch, x, V, Us, scale, expert_ids, bases, biases, ys, tile_pair)
    return [y.reshape(*lead, M) for y, M in zip(ys, Ms, strict=True)]


def forward_swiglu(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: Added,
    biases: Added, tile_pair: TilePair | None = None
) -> Tensor:  # fmt: skip
    """silu(y_gate) * y_up, [..., M], for two members of one M. Neither is written to memory.

    y_gate, y_up and silu(y_gate) are rounded to x's dtype, as separate ops would round them: only bits in which two
    exponential functions differ are different.
    """
    if len(Us) != 2 or Us[0].shape[0] != Us[1].shape[0]:
        raise InputError(
            f"forward_swiglu: U is {[list(U.shape) for U in Us]}, wanted two members, gate and up, with one M"
        )
    y = x.new_empty(x.shape[:-1].numel(), Us[0].shape[0])
    _two_launches("swiglu", swiglu_launch, x, V, Us, scale, expert_ids, bases, biases, y, tile_pair)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _two_launches(kernel, second_launch, x, V, Us, scale, expert_ids, bases, biases, out, tile_pair) -> None:
    """Shrink, then `second_launch` into `out`, with no launch between: so the second starts under the first."""
    x, scale, ids, repeat = _operands(x, scale, expert_ids)
    (Vt, *Us), settled = _factors([V.t(), *_members(Us)])
    bases, biases = _added(bases, biases, Us, x.shape[0])
    arch = capability(x)
    first, second = tile_pair or (_tiles("shrink", x, [Vt], arch), None)
    second = second or _tiles(kernel, x, Us, arch, parts=first.split)
    g = _shrink(x, Vt, scale, ids, repeat, first, arch, settled)
    second_launch(g, Us, bases, biases, out, second, arch, scale, ids, repeat, settled).run()


def _operands(x: Tensor, scale: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """x [T, N], scale, flat ids, and the number of tokens that an id covers."""
    return (
        rows_2d(x),
        scale if scale.stride(1) == 1 else scale.contiguous(),
        expert_ids.reshape(-1),
        repeat_of(x, expert_ids),
    )


def _factors(given: list[Tensor]) -> tuple[list[Tensor], bool]:
    """Vᵀ and U, contiguous along the summed size, and whether none of them was copied just now."""
    if len({w.dtype for w in given}) != 1:
        dtypes = [str(w.dtype) for w in given]
        raise InputError(f"the factors are in {dtypes}, wanted one dtype for V and every U")
    return [w.contiguous() for w in given], all(w.is_contiguous() for w in given)


def _members(Us: list[Tensor]) -> list[Tensor]:
    """Us, if one launch can hold them."""
    if len(Us) > MEMBERS:
        raise InputError(f"the Triton expand takes a group of 1 to {MEMBERS} matrices, got {len(Us)}: split the group")
    return Us


def _tiles(kernel: str, x: Tensor, factors: list[Tensor], arch: tuple[int, int], parts: int = 1) -> Tiles:
    rows = factors[0].shape[0] if kernel == "swiglu" else sum(w.shape[0] for w in factors)
    K = max(w.shape[1] for w in factors)
    return tiles(kernel, x.shape[0], rows, K, x.dtype, factors[0].dtype, arch, parts, table_of(x.device))


def _shrink(x, Vt, scale, ids, repeat, tile, arch, settled) -> Tensor:
    T, C = x.shape[0], Vt.shape[0]
    split = (tile.split, T, C)
    g = (
        x.new_empty(T, C, dtype=products(x.dtype, Vt.dtype)[0])
        if tile.split == 1
        else x.new_empty(split, dtype=torch.float32)
    )
    shrink_launch(x, Vt, scale, ids, repeat, g, tile, arch, settled).run()
    return g


def _added(bases, biases, Us: list[Tensor], T: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    bases = [None if b is None else b.reshape(T, U.shape[0]).contiguous() for b, U in zip(bases, Us, strict=True)]
    return bases, [None if b is None else b.contiguous() for b in biases]


# --- launches as data ---------------------------------------------------------------------------------


def _ahead(K: int, tile: Tiles, w_dtype: torch.dtype, split: int = 1, parts: int = 1) -> int:
    """Steps that are loaded by hand before the wait: two, or one if the registers of two would spill."""
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

    settled: False if a factor was just written, so that it must not be read before the wait; here and below
    """
    (T, N), C = x.shape, Vt.shape[0]
    dtype, headroom = products(x.dtype, Vt.dtype)
    chosen = options(tile, arch, pdl=settled)
    return Launch(
        shrink_kernel,
        (cdiv(T, tile.BT), cdiv(C, tile.BR), tile.split),
        dict(
            x_ptr=x, vt_ptr=Vt, scale_ptr=scale, ids_ptr=ids, out_ptr=out, T=T, C=C, N=N, E=scale.shape[0],
            x_row=x.stride(0), scale_row=scale.stride(0), repeat=repeat,
        ),
        dict(
            BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=tile.split, AHEAD=_ahead(N, tile, Vt.dtype, split=tile.split),
            EVEN=N % (tile.BK * tile.split) == 0, HEADROOM=headroom, DTYPE=triton_dtype(dtype),
            PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def expand_launch(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, ys: list[Tensor],
    tile: Tiles, arch: tuple[int, int], scale: Tensor | None = None, ids: Tensor | None = None, repeat: int = 1,
    settled: bool = True
) -> Launch:  # fmt: skip
    """g of the shrink ([T, C] with any row stride, or [split, T, C] with scale and ids) -> ys, each [T, M_i]."""
    split = g.shape[0] if g.dim() == 3 else 1
    T, C = g.shape[-2], g.stride(-2)
    dtype, headroom = products(ys[0].dtype, Us[0].dtype)
    chosen = options(tile, arch, pdl=settled)
    columns = [0, *accumulate(U.shape[1] for U in Us)]

    def four(name: str, values: list) -> dict[str, object]:
        return {f"{name}{i}": v for i, v in enumerate(values + [values[0]] * (MEMBERS - len(values)))}

    def present(given: Added) -> list[Tensor | None]:
        some = next((t for t in given if t is not None), None)  # a masked stand-in for members that have none
        return [some if t is None else t for t in given]

    return Launch(
        expand_kernel,
        (cdiv(T, tile.BT), sum(cdiv(U.shape[0], tile.BR) for U in Us)),
        dict(
            g_ptr=g, scale_ptr=scale, ids_ptr=ids, **four("u", Us), **four("base", present(bases)),
            **four("bias", present(biases)), **four("y", ys),
            **four("M", [U.shape[0] for U in Us]), **four("K", [U.shape[1] for U in Us]),
            **{f"c{i}": columns[i] if i < len(Us) else 0 for i in range(1, MEMBERS)},
            T=T, C=C, E=0 if scale is None else scale.shape[0],
            scale_row=0 if scale is None else scale.stride(0), repeat=repeat,
        ),
        dict(
            MEMBERS=len(Us), BASES=_bits(bases), BIASES=_bits(biases), BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=split,
            AHEAD=min(_ahead(U.shape[1], tile, U.dtype, parts=split) for U in Us),
            EVEN=all(U.shape[1] % tile.BK == 0 for U in Us), HEADROOM=headroom, DTYPE=triton_dtype(dtype),
            PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def swiglu_launch(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, y: Tensor,
    tile: Tiles, arch: tuple[int, int], scale: Tensor | None = None, ids: Tensor | None = None, repeat: int = 1,
    settled: bool = True
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
            g_ptr=g, scale_ptr=scale, ids_ptr=ids, u0=Us[0], u1=Us[1], base0=bases[0], base1=bases[1],
            bias0=biases[0], bias1=biases[1], y_ptr=y, M=y.shape[1], K0=K0, K1=K1, T=T, C=C,
            E=0 if scale is None else scale.shape[0], scale_row=0 if scale is None else scale.stride(0), repeat=repeat,
        ),
        dict(
            BASES=_bits(bases), BIASES=_bits(biases), BR=tile.BR, BT=tile.BT, BK=tile.BK, SPLIT=split,
            AHEAD=min(1, cdiv(K0, tile.BK), cdiv(K1, tile.BK)), EVEN=K0 == K1 and K0 % tile.BK == 0, HEADROOM=headroom,
            DTYPE=triton_dtype(dtype), PDL="launch_pdl" in chosen, INTERPRETED=INTERPRETED,
        ),
        chosen,
    )  # fmt: skip


def _bits(given: Added) -> int:
    """Bit i is set if member i has one."""
    return sum(1 << i for i, t in enumerate(given) if t is not None)
