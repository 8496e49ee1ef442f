"""The skinny forward from checked arguments to the two launches: what to copy, which tiles, what to allocate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from t2kernels.ops.tuning.tiles import Tiles, tiles

from .common import capability, products, repeat_of, rows_2d, table_of
from .forward import MEMBERS, expand_launch, shrink_launch, swiglu_launch


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] in the dtype of the products (in fp16 times 2^-5 for bf16 x and fp16 factors)."""
    Vt, _, settled = _factors(V, [])
    x, scale, ids, repeat = _operands(x, scale, expert_ids)
    arch = capability(x)
    tile = replace(_tiles("shrink", x, [Vt], arch), split=1)
    return _shrink(x, Vt, scale, ids, repeat, tile, arch, settled)


def expand(
    g: Tensor,
    Us: list[Tensor],
    bases: list[Tensor | None],
    biases: list[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i], for g as `shrink` returned it. dtype: x's, where no base and no bias tells it."""
    dtype = dtype or next((t.dtype for t in (*bases, *biases) if t is not None), g.dtype)
    _, Us, settled = _factors(None, Us)
    arch, g = capability(g), g if g.stride(-1) == 1 else g.contiguous()
    tile = tiles(
        "expand", g.shape[0], sum(U.shape[0] for U in Us), max(U.shape[1] for U in Us), dtype, Us[0].dtype, arch
    )
    ys = [g.new_empty(g.shape[0], U.shape[0], dtype=dtype) for U in Us]
    expand_launch(g, Us, *_added(bases, biases, Us, g.shape[0]), ys, tile, arch, settled=settled).run()
    return ys


def forward_pair(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None],
    tile_pair: tuple[Tiles, Tiles | None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], as two launches. tile_pair: shrink's and expand's."""
    lead, T, Ms = x.shape[:-1], x.shape[:-1].numel(), [U.shape[0] for U in Us]
    ys = [x.new_empty(T, M) for M in Ms]
    _two_launches("expand", expand_launch, x, V, Us, scale, expert_ids, bases, biases, ys, tile_pair)
    return [y.reshape(*lead, M) for y, M in zip(ys, Ms, strict=True)]


def forward_swiglu(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: list[Tensor | None], biases: list[Tensor | None],
    tile_pair: tuple[Tiles, Tiles | None] | None = None,
) -> Tensor:  # fmt: skip
    """silu(y_gate) * y_up, [..., M], for the two members y_i of `forward_pair`: neither is written to memory."""
    if len(Us) != 2 or Us[0].shape[0] != Us[1].shape[0]:
        raise ValueError(
            f"forward_swiglu: U is {[list(U.shape) for U in Us]}, wanted two members, gate and up, with one M"
        )
    y = x.new_empty(x.shape[:-1].numel(), Us[0].shape[0])
    _two_launches("swiglu", swiglu_launch, x, V, Us, scale, expert_ids, bases, biases, y, tile_pair)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _two_launches(kernel, second_launch, x, V, Us, scale, expert_ids, bases, biases, out, tile_pair) -> None:
    """Shrink, then `second_launch` into `out`, with nothing launched between the two: the second starts under the first."""
    x, scale, ids, repeat = _operands(x, scale, expert_ids)
    Vt, Us, settled = _factors(V, Us)
    bases, biases = _added(bases, biases, Us, x.shape[0])
    arch = capability(x)
    first, second = tile_pair or (_tiles("shrink", x, [Vt], arch), None)
    second = second or _tiles(kernel, x, Us, arch, parts=first.split)
    g = _shrink(x, Vt, scale, ids, repeat, first, arch, settled)
    second_launch(g, Us, bases, biases, out, second, arch, scale, ids, repeat, settled).run()


def _operands(x: Tensor, scale: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """x [T, N], scale, flat ids, and how many tokens an id covers."""
    return (
        rows_2d(x),
        scale if scale.stride(1) == 1 else scale.contiguous(),
        expert_ids.reshape(-1),
        repeat_of(x, expert_ids),
    )


def _factors(V: Tensor | None, Us: list[Tensor]) -> tuple[Tensor | None, list[Tensor], bool]:
    """Vᵀ and U contiguous along what is summed over, and whether none of them had to be copied now."""
    given = [w for w in (V if V is None else V.t(), *Us) if w is not None]
    if len({w.dtype for w in given}) != 1:
        raise ValueError(f"the factors are in {[str(w.dtype) for w in given]}, wanted one dtype for V and every U")
    if len(Us) > MEMBERS:
        raise ValueError(f"the Triton expand takes a group of 1 to {MEMBERS} matrices, got {len(Us)}: split the group")
    made = [w.contiguous() for w in given]
    settled = all(w.is_contiguous() for w in given)
    return (None, made, settled) if V is None else (made[0], made[1:], settled)


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
