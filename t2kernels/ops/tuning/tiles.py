"""Every tile of the Triton kernels, with its reason. Pure: no GPU, no Triton, no tuning while serving.

`tiles` answers from a table made offline for one GPU (`read_table`) and, where there is none, from the rules below. The rules follow from bytes,
registers and shared memory, and were checked by compiling for sm_80, sm_90 and sm_100; no figure here was measured on a GPU.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple, dataclass
from itertools import product
from math import log2
from pathlib import Path

import torch

KERNELS = ("shrink", "expand", "swiglu", "scale_rows", "backward")
TABLES = Path(__file__).parent / "tuned"
SMS = {8: 108, 9: 132, 10: 148}  # A100; H100 and H200; B200
_SHARED_KB = {
    (8, 0): 163,
    (8, 7): 163,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
}  # a block at the most; others, such as (8, 9): 99
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
MAX_CANDIDATES = 40


@dataclass(frozen=True)
class Tiles:
    """BR rows of the factor by BT tokens a block, BK of the summed size a step; split: blocks that share one sum (shrink only)."""

    BR: int
    BT: int
    BK: int
    split: int
    warps: int
    stages: int


def tiles(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int],
    parts: int = 1, table: dict | None = None,
) -> Tiles:  # fmt: skip
    """The tiles of one launch: from the table of this GPU (nearest T, as a ratio), else by rule.

    kernel: one of KERNELS; T: tokens; rows: rows of the factors in all (C for shrink, the sum of M_i for expand); K: the size summed over
    x_dtype, w_dtype: of the activations and of the factors; capability: (major, minor) of the GPU
    parts: how many partial sums an expand adds up, the shrink's split; table: what `read_table` returned
    """
    if kernel not in KERNELS:
        raise ValueError(f"tiles: kernel is {kernel!r}, wanted one of {', '.join(KERNELS)}")
    rows, K, T = max(1, rows), max(1, K), max(1, T)
    if table and parts == 1:
        tuned = table["tiles"].get(_key(kernel, rows, K, x_dtype, w_dtype))
        if tuned:
            return Tiles(*tuned[min(tuned, key=lambda at: (abs(log2(int(at) / T)), int(at)))])
    if kernel == "scale_rows":
        # Elementwise: 16 tokens share one row of scale where they share an expert; 256 columns are 16 bytes a lane in 16-bit floats.
        return Tiles(BR=256, BT=16, BK=1, split=1, warps=4, stages=1)
    if kernel == "backward":
        # 32 tokens a slot keep the slots under 1/16 of the bytes that are read; more tokens would put more experts into one tile.
        return Tiles(BR=128, BT=32, BK=1, split=1, warps=4, stages=1)
    return _skinny(kernel, T, rows, K, x_dtype, w_dtype, capability, parts)


def _skinny(kernel, T, rows, K, x_dtype, w_dtype, capability, parts) -> Tiles:
    sms = SMS.get(capability[0], 132)
    BT = min(
        max(16, 1 << (T - 1).bit_length()), 32 if x_dtype == torch.float32 else 128
    )  # 16: the least a tensor core takes
    # A factor's row segment of 256 bytes a step, whatever the dtype: long enough for the memory, short enough for several stages.
    BK = 64 if x_dtype == torch.float32 or BT >= 64 else 256 // w_dtype.itemsize
    # On sm_90 the products of BR >= 64 rows are wgmma, with int8 read 8 bytes a lane instead of 16; mma.sync on 32 rows reads 16.
    narrow = x_dtype == torch.float32 or (w_dtype == torch.int8 and capability[0] == 9)
    # BR rows of the factor against BT tokens: as many bytes of activations are read as of factors where BR = BT, so BR grows with BT.
    least = 32 if narrow else {16: 32, 32: 64}.get(BT, 64)
    largest = 32 if narrow else {16: 64, 32: 64}.get(BT, 64 if kernel == "swiglu" else 128)
    if kernel == "shrink" and rows * cdiv(T, BT) < 16 * sms and BT <= 32 and x_dtype != torch.float32:
        least = 16  # the delta form's few rows: more blocks before more parts of a sum
    BR = next((b for b in (128, 64, 32) if least <= b <= largest and cdiv(rows, b) * cdiv(T, BT) >= 0.9 * sms), least)
    # 32 numbers of the sum a thread, 64 at the most; two narrow int8 factors of 64 columns are 16 bytes a lane for four warps.
    warps = 8 if BT == 128 and not (narrow and kernel == "swiglu") else 4
    if narrow and BT >= 64 and w_dtype == torch.int8:
        BK = 128  # 32 rows of 64 bytes would be 8 bytes a lane
    if BR == 16 and w_dtype.itemsize == 2:
        BK = 256
    if kernel == "swiglu":
        BK = min(BK, 128 if BT <= 32 else 64)  # two factors
    if parts > 1:
        BK = (
            64 if BT <= 32 else 32
        )  # the parts and scale are summed in registers: parts + 1 fp32 numbers for each of BK * BT
    BK = min(BK, max(32, 1 << (K - 1).bit_length()))
    split = 1
    if kernel == "shrink":
        # Blocks to fill the chip, as long as every block of the expand can read all parts in about the time of its own factor (64 KiB) and
        # every part has at least four steps.
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


def candidates(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int]
) -> list[Tiles]:
    """What an offline tuner should time: at most 40, the rule's own choice first, then by distance from it."""
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

    return [first, *sorted((t for t in found if t != first), key=lambda t: (distance(t), astuple(t)))][:MAX_CANDIDATES]


def _sensible(t: Tiles, kernel, T, rows, K, x_dtype, w_dtype, capability) -> bool:
    """Fits, does not spill, and leaves no part of a sum empty."""
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


def _fits(t: Tiles, kernel, x_dtype, w_dtype, capability) -> bool:
    """Shared memory: the stages, and on sm_90 and later one step more, for what is loaded by hand."""
    step = (2 if kernel == "swiglu" else 1) * t.BK * (t.BR * w_dtype.itemsize + t.BT * max(2, x_dtype.itemsize))
    return (t.stages + (capability[0] >= 9)) * step <= shared_bytes(capability)


def shared_bytes(capability: tuple[int, int]) -> int:
    """The most shared memory that a block may have."""
    return _SHARED_KB.get(tuple(capability), 99) * 1024


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# --- tables made offline ---------------------------------------------------------------------------------------------------------------


def user_folder() -> Path:
    """Where `t2 tune` keeps what it finds: tuned/ in t2kernels' directory under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2kernels" / "tuned"


def table_path(device_name: str, triton_version: str, folder: Path = TABLES) -> Path:
    """Where the table of a GPU lies: its name, and Triton's major.minor, since another compiler is another machine."""
    return Path(folder) / f"{_file_name(device_name)}-triton{'.'.join(triton_version.split('.')[:2])}.json"


def cuda_table_path(device_name: str, folder: Path = TABLES) -> Path:
    """Where what is known of the CUDA kernel on a GPU lies."""
    return Path(folder) / f"{_file_name(device_name)}-cuda.json"


def read_table(device_name: str, triton_version: str, folder: Path | None = None) -> dict | None:
    """The table of this GPU and this Triton: the user's own, else the package's; None where nobody has made one.

    Raises ValueError for a file that is not a table.
    """
    return _read([table_path(device_name, triton_version, f) for f in _folders(folder)], "tiles", dict)


def read_cuda_table(device_name: str, folder: Path | None = None) -> dict | None:
    """{"checked": ..., "decode_tokens": ...} of the CUDA kernel on this GPU, as `read_table` finds it."""
    return _read([cuda_table_path(device_name, f) for f in _folders(folder)], "decode_tokens", list)


def write_table(
    device_name: str, triton_version: str, best: dict[tuple, Tiles], folder: Path = TABLES, **facts
) -> Path:
    """best: (kernel, T, rows, K, x_dtype, w_dtype) -> the tiles that were fastest there. facts: what else stands in it, such as the checks."""
    found: dict[str, dict[str, tuple]] = {}
    for (kernel, T, rows, K, x_dtype, w_dtype), t in best.items():
        found.setdefault(_key(kernel, rows, K, x_dtype, w_dtype), {})[str(T)] = astuple(t)
    path = table_path(device_name, triton_version, folder)
    return _write(path, {"device": device_name, "triton": triton_version, **facts, "tiles": found})


def write_cuda_table(device_name: str, decode_tokens: tuple[int, int], folder: Path = TABLES, **facts) -> Path:
    """decode_tokens: up to how many tokens the kernel is the fastest, for factors of 16 and of 8 bits. facts: the checks, and what was timed."""
    return _write(
        cuda_table_path(device_name, folder), {"device": device_name, **facts, "decode_tokens": list(decode_tokens)}
    )


def _file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in device_name)


def _folders(folder: Path | None) -> list[Path]:
    return [folder] if folder else [user_folder(), TABLES]


def _read(paths: list[Path], field: str, kind: type) -> dict | None:
    for path in paths:
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                if isinstance(found[field], kind):
                    return found
            except (ValueError, KeyError, TypeError):
                pass
            raise ValueError(f"{path} is not a table of what was tuned: delete it, and run `t2 tune` again")
    return None


def _write(path: Path, what: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(what, indent=1) + "\n")
    return temporary.replace(path)


def _key(kernel: str, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> str:
    return f"{kernel}/{_NAMES[x_dtype]}/{_NAMES[w_dtype]}/{rows}x{K}"
