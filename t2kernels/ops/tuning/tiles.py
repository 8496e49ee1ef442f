"""Every tile of the Triton kernels, with its reason. Pure: no GPU, no Triton, no tuning while serving.

`tiles` answers from a table made offline for one GPU (tables.py), or from the rules below. The rules follow from bytes,
registers and shared memory, and were checked by compiling for sm_80, sm_90 and sm_100. No number here was measured on a
GPU.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from itertools import product
from math import log2
from typing import Any

import torch

from t2kernels import InputError

KERNELS = ("shrink", "expand", "swiglu", "scale_rows", "backward")
SMS = {8: 108, 9: 132, 10: 148}
"""Multiprocessors by major capability: A100; H100 and H200; B200."""
# KB of shared memory that a block may have, by capability; 99 for others, such as (8, 9).
_SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in _NAMES.items()}
"""{name in the key of a table: dtype}."""
MEMBERS = 4  # matrices of one launch of the skinny expand: q, k, v and one more


@dataclass(frozen=True)
class Tiles:
    """The tile of one launch.

    BR, BT: rows of the factor and tokens of a block
    BK: numbers of the summed size in one step
    split: blocks that share one sum (shrink only)
    warps, stages: of a block
    """

    BR: int
    BT: int
    BK: int
    split: int
    warps: int
    stages: int


def tiles(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int],
    parts: int = 1, table: dict[str, Any] | None = None
) -> Tiles:  # fmt: skip
    """The tiles of one launch: from the table of this GPU at the nearest T (as a ratio), else by rule.

    kernel: one of KERNELS
    T: tokens; rows: rows of all factors (C for shrink, the sum of M_i for expand); K: the summed size
    x_dtype, w_dtype: of the activations and of the factors
    capability: (major, minor) of the GPU
    parts: the number of partial sums that an expand adds up, which is the split of the shrink
    table: from `tables.read_table`
    """
    if kernel not in KERNELS:
        raise InputError(f"tiles: kernel is {kernel!r}, wanted one of {', '.join(KERNELS)}")
    rows, K, T = max(1, rows), max(1, K), max(1, T)
    if table and parts == 1:
        tuned = table["tiles"].get(key(kernel, rows, K, x_dtype, w_dtype))
        if tuned:
            return Tiles(*tuned[min(tuned, key=lambda at: (abs(log2(int(at) / T)), int(at)))])
    if kernel == "scale_rows":
        # Elementwise: 16 tokens share one row of scale where they share an expert; 256 columns are 16 bytes a lane in
        # 16-bit floats.
        return Tiles(BR=256, BT=16, BK=1, split=1, warps=4, stages=1)
    if kernel == "backward":
        # 32 tokens a slot keep the slots under 1/16 of the bytes that are read; more tokens would put more experts into
        # one tile.
        return Tiles(BR=128, BT=32, BK=1, split=1, warps=4, stages=1)
    return _skinny(kernel, T, rows, K, x_dtype, w_dtype, capability, parts)


def _skinny(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype,
    capability: tuple[int, int], parts: int
) -> Tiles:  # fmt: skip
    sms = SMS.get(capability[0], 132)
    # A tensor core takes 16 tokens or more.
    BT = min(max(16, 1 << (T - 1).bit_length()), 32 if x_dtype == torch.float32 else 128)
    # 256 bytes of a factor's row a step, for every dtype: long enough for the memory, short enough for several stages.
    BK = 64 if x_dtype == torch.float32 or BT >= 64 else 256 // w_dtype.itemsize
    # On sm_90 the products of BR >= 64 rows are wgmma, with int8 read 8 bytes a lane instead of 16; mma.sync on 32 rows
    # reads 16.
    narrow = x_dtype == torch.float32 or (w_dtype == torch.int8 and capability[0] == 9)
    # With BR = BT as many bytes of activations are read as of factors, so BR grows with BT.
    least = 32 if narrow else {16: 32, 32: 64}.get(BT, 64)
    largest = 32 if narrow else {16: 64, 32: 64}.get(BT, 64 if kernel == "swiglu" else 128)
    if kernel == "shrink" and rows * cdiv(T, BT) < 16 * sms and BT <= 32 and x_dtype != torch.float32:
        least = 16  # the few rows of the delta form: more blocks are better than more parts of a sum
    BR = next((b for b in (128, 64, 32) if least <= b <= largest and cdiv(rows, b) * cdiv(T, BT) >= 0.9 * sms), least)
    # 32 numbers of the sum a thread, 64 at most. Two narrow int8 factors of 64 columns are 16 bytes a lane for four
    # warps.
    warps = 8 if BT == 128 and not (narrow and kernel == "swiglu") else 4
    if narrow and BT >= 64 and w_dtype == torch.int8:
        BK = 128  # 32 rows of 64 bytes would be 8 bytes a lane
    if BR == 16 and w_dtype.itemsize == 2:
        BK = 256
    if kernel == "swiglu":
        BK = min(BK, 128 if BT <= 32 else 64)  # two factors
    if parts > 1:  # parts and scale are summed in registers: parts + 1 fp32 numbers for each of BK * BT
        BK = 64 if BT <= 32 else 32
    BK = min(BK, max(32, 1 << (K - 1).bit_length()))
    split = 1
    if kernel == "shrink":
        # Enough blocks to fill the chip, as long as a block of the expand reads all parts in about the time of its own
        # factor (64 KiB), and every part has at least four steps.
        while (
            split < 8
            and cdiv(rows, BR) * cdiv(T, BT) * split * 2 <= sms
            and T * rows * 4 * split * 2 <= 65536
            and K >= BK * split * 2 * 4
        ):
            split *= 2
    stages = 2 if parts > 1 else 4
    made = Tiles(BR, BT, BK, split, warps, stages)
    while stages > 2 and not _fits(made, kernel, x_dtype, w_dtype, capability):
        stages -= 1
        made = Tiles(BR, BT, BK, split, warps, stages)
    return made


def choices(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int]
) -> list[Tiles]:
    """Every tile that fits and does not spill: the rule's choice first, others by their distance from it."""
    first = tiles(kernel, T, rows, K, x_dtype, w_dtype, capability)
    if kernel in ("scale_rows", "backward"):
        found = [
            Tiles(BR, BT, 1, 1, warps, 1) for BR, BT, warps in product((64, 128, 256, 512), (8, 16, 32, 64), (4, 8))
        ]
        found = [t for t in found if 4 <= t.BR * t.BT // (32 * t.warps) <= 64]
    else:
        found = [
            made
            for BR, BT, BK, split, warps, stages in product(
                (16, 32, 64, 128),
                {first.BT, max(16, first.BT // 2)},
                (64, 128, 256),
                (1, 2, 4, 8),
                (4, 8),
                (2, 3, 4, 5, 6),
            )
            if _sensible(
                made := Tiles(BR, BT, BK, split, warps, stages), kernel, T, rows, K, x_dtype, w_dtype, capability
            )
        ]

    def distance(t: Tiles) -> float:
        return sum(abs(log2(a / b)) for a, b in zip(astuple(t), astuple(first), strict=True))

    return [first, *sorted((t for t in found if t != first), key=lambda t: (distance(t), astuple(t)))]


def _sensible(
    t: Tiles, kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype,
    capability: tuple[int, int]
) -> bool:  # fmt: skip
    """True if the tile fits, does not spill, and leaves no part of a sum empty."""
    factors = 2 if kernel == "swiglu" else 1
    sums = factors * t.BR * t.BT // (32 * t.warps)
    return (
        _fits(t, kernel, x_dtype, w_dtype, capability)
        and 1 <= sums <= 64
        and t.BK * max(factors * t.BR * w_dtype.itemsize, t.BT * x_dtype.itemsize) // (128 * t.warps) <= 64
        and (t.split == 1 or (kernel == "shrink" and t.split * t.BK * 2 <= K and T * rows * 4 * t.split <= 262144))
        and cdiv(rows, t.BR) * t.split * cdiv(T, t.BT) >= min(SMS.get(capability[0], 132), cdiv(rows, 16)) // 2
        and t.BK < 2 * K
    )


def _fits(t: Tiles, kernel: str, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """True if shared memory holds the stages, and on sm_90 and later one more step, which is loaded by hand."""
    held = t.stages + (capability[0] >= 9)
    return held * step_bytes(t, kernel, x_dtype, w_dtype) <= shared_bytes(capability)


def step_bytes(t: Tiles, kernel: str, x_dtype: torch.dtype, w_dtype: torch.dtype) -> int:
    """Bytes of shared memory that one step of the sum takes."""
    return (2 if kernel == "swiglu" else 1) * t.BK * (t.BR * w_dtype.itemsize + t.BT * max(2, x_dtype.itemsize))


def shared_bytes(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have."""
    return _SHARED_KB.get(capability, 99) * 1024


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def key(kernel: str, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> str:
    """The key of a shape in a table: the arguments of `tiles` but T and the capability."""
    return f"{kernel}/{_NAMES[x_dtype]}/{_NAMES[w_dtype]}/{rows}x{K}"


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in a key. Raises KeyError."""
    return DTYPES[name]
