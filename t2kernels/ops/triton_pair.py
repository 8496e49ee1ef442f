"""The skinny forward from checked arguments to the two launches: what to copy, which tiles, what to allocate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .triton_common import capability, products, repeat_of, rows_2d, table_of
from .triton_forward import MEMBERS, expand_launch, shrink_launch, swiglu_launch
from .tuning import Tiles, tiles


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] in the dtype of the products (in fp16 times 2^-5 for bf16 x and fp16 factors)."""
    x, Vt, scale, ids, repeat = _operands(x, V, scale, expert_ids)
    arch = capability(x)
    return _shrink(x, Vt, scale, ids, repeat, replace(_tiles("shrink", x, [Vt], arch), split=1), arch)


def expand(
    g: Tensor, Us: list[Tensor], bases: list[Tensor | None], biases: list[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i], for g as `shrink` returned it. dtype: x's, where no base and no bias tells it."""
    dtype = dtype or next((t.dtype for t in (*bases, *biases) if t is not None), g.dtype)
    arch = capability(g)
    tile = tiles("expand", g.shape[0], sum(U.shape[0] for U in Us), max(U.shape[1] for U in Us), dtype, Us[0].dtype, arch)
    return _expand(g, Us, bases, biases, dtype, tile, arch)


def forward_pair(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None],
    tile_pair: tuple[Tiles, Tiles] | None = None,
) -> list[Tensor]:  # fmt: skip
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], as two launches. tile_pair: shrink's and expand's."""
    lead = x.shape[:-1]
    x, Vt, scale, ids, repeat = _operands(x, V, scale, expert_ids)
    arch = capability(x)
    first, second = tile_pair or (_tiles("shrink", x, [Vt], arch), None)
    second = second or _tiles("expand", x, Us, arch, parts=first.split)
    g = _shrink(x, Vt, scale, ids, repeat, first, arch)
    return [y.reshape(*lead, y.shape[1]) for y in _expand(g, Us, bases, biases, x.dtype, second, arch, scale, ids, repeat)]


def forward_swiglu(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None],
    tile_pair: tuple[Tiles, Tiles] | None = None,
) -> Tensor:  # fmt: skip
    """silu(y_gate) * y_up, [..., M], for the two members y_i of `forward_pair`: neither is written to memory."""
    if len(Us) != 2 or Us[0].shape[0] != Us[1].shape[0]:
        raise ValueError(f"forward_swiglu: U is {[list(U.shape) for U in Us]}, wanted two members, gate and up, with one M")
    lead, M = x.shape[:-1], Us[0].shape[0]
    x, Vt, scale, ids, repeat = _operands(x, V, scale, expert_ids)
    arch = capability(x)
    first, second = tile_pair or (_tiles("shrink", x, [Vt], arch), None)
    second = second or _tiles("swiglu", x, Us, arch, parts=first.split)
    g = _shrink(x, Vt, scale, ids, repeat, first, arch)
    y = x.new_empty(x.shape[0], M)
    bases, biases = _added(bases, biases, Us, x.shape[0])
    swiglu_launch(g, _contiguous(Us), bases, biases, y, second, arch, scale, ids, repeat).run()
    return y.reshape(*lead, M)


def _operands(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """x [T, N], Vᵀ [C, N], scale, flat ids, tokens an id. A V that is not a view of a contiguous Vᵀ is copied into one."""
    repeat = repeat_of(x, expert_ids)
    return rows_2d(x), V.t().contiguous(), scale if scale.stride(1) == 1 else scale.contiguous(), expert_ids.reshape(-1), repeat


def _tiles(kernel: str, x: Tensor, factors: list[Tensor], arch: tuple[int, int], parts: int = 1) -> Tiles:
    rows, K = (sum(w.shape[0] for w in factors), max(w.shape[1] for w in factors))
    rows = factors[0].shape[0] if kernel == "swiglu" else rows
    return tiles(kernel, x.shape[0], rows, K, x.dtype, factors[0].dtype, arch, parts, table_of(x.device))


def _shrink(x: Tensor, Vt: Tensor, scale: Tensor, ids: Tensor, repeat: int, tile: Tiles, arch: tuple[int, int]) -> Tensor:
    T, C = x.shape[0], Vt.shape[0]
    if tile.split > 1:
        g = x.new_empty(tile.split, T, C, dtype=torch.float32)
    else:
        g = x.new_empty(T, C, dtype=products(x.dtype, Vt.dtype)[0])
    shrink_launch(x, Vt, scale, ids, repeat, g, tile, arch).run()
    return g


def _expand(g, Us, bases, biases, dtype, tile, arch, scale=None, ids=None, repeat=1) -> list[Tensor]:
    if not 1 <= len(Us) <= MEMBERS:
        raise ValueError(f"the Triton expand takes a group of 1 to {MEMBERS} matrices, got {len(Us)}: split the group")
    if len({U.dtype for U in Us}) != 1:
        raise ValueError(f"U is in {[str(U.dtype) for U in Us]}, wanted one dtype for the whole group")
    T, g = g.shape[-2], g if g.stride(-1) == 1 else g.contiguous()
    ys = [g.new_empty(T, U.shape[0], dtype=dtype) for U in Us]
    bases, biases = _added(bases, biases, Us, T)
    expand_launch(g, _contiguous(Us), bases, biases, ys, tile, arch, scale, ids, repeat).run()
    return ys


def _added(bases, biases, Us: list[Tensor], T: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    bases = [None if b is None else b.reshape(T, U.shape[0]).contiguous() for b, U in zip(bases, Us, strict=True)]
    return bases, [None if b is None else b.contiguous() for b in biases]


def _contiguous(Us: list[Tensor]) -> list[Tensor]:
    return [U.contiguous() for U in Us]
