"""Shared by the Triton kernels: the dtype of the products, conversions, a launch as data. It imports Triton."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2kernels import InputError
from t2kernels.ops.precision import forward_precision
from t2kernels.ops.tuning.tables import read_table
from t2kernels.ops.tuning.tiles import Tiles

# True if kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET was 1 when Triton was imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data, so that tests compile ahead of time exactly what a GPU launches.

    args: tensors, sizes, None
    meta: constexprs
    options: num_warps, num_stages, launch_pdl
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    meta: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the device of the tensors; an empty grid launches nothing."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.args.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.args, **self.meta, **self.options)


def products(x_dtype: torch.dtype, w_dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """The dtype in which x meets the factors, and the power of two that x is multiplied by first."""
    if x_dtype not in _TL:
        raise InputError(f"the Triton kernels take x in float32, bfloat16 or float16; got {x_dtype}: use impl='torch'")
    if w_dtype not in (*_TL, torch.int8):
        raise InputError(f"the Triton kernels take factors in float32, bfloat16, float16 or int8; got {w_dtype}")
    how = forward_precision(x_dtype, w_dtype)
    return how.dtype, how.x


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a float dtype."""
    return _TL[dtype]


def capability(t: Tensor) -> tuple[int, int]:
    """(major, minor) of t's GPU; (9, 0) for the interpreter and for tensors without data."""
    return torch.cuda.get_device_capability(t.device) if t.device.type == "cuda" else (9, 0)


@functools.cache
def table_of(device: torch.device) -> dict[str, Any] | None:
    """The table that was tuned for this GPU, or None."""
    return read_table(torch.cuda.get_device_name(device), triton.__version__) if device.type == "cuda" else None


def options(tiles: Tiles, capability: tuple[int, int], pdl: bool) -> dict[str, Any]:
    """The launch options of a kernel; dependent launch (PDL) exists from sm_90 on."""
    made: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if pdl and capability >= (9, 0) and not INTERPRETED:
        made["launch_pdl"] = True
    return made


def rows_2d(x: Tensor) -> Tensor:
    """x [..., N] as [T, N] with its last size contiguous: a view if possible, else a copy."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def repeat_of(x: Tensor, expert_ids: Tensor) -> int:
    """The number of consecutive tokens of x [..., N] that one entry of expert_ids covers."""
    return max(1, x.shape[:-1][expert_ids.dim() :].numel())


# --- device functions ---------------------------------------------------------------------------------


@triton.jit
def int8_as_bf16(a):
    """Bits of two bf16 with difference a: 128 + (a & 127), and 128 or, for negative a, 256, which is one bit away."""
    a = a.to(tl.int16)
    return (a & 0x7F) | 0x4300, (a & 0x80) | 0x4300


@triton.jit
def cast(a, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """a rounded to nearest in DTYPE. In the interpreter the rounded values stay in fp32: its bf16 casts truncate, and
    its bf16 products and int8 to bf16 casts are wrong (numpy has no bf16)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        if DTYPE == tl.bfloat16:
            bits = a.to(tl.int32, bitcast=True)
            a = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        elif DTYPE == tl.float16:
            a = a.to(tl.float16).to(tl.float32)
        return a
    elif a.dtype == tl.int8 and DTYPE == tl.float16:
        # 1024 + (a + 128) is the fp16 whose last bits are a + 128. A conversion would be one weight a lane at a quarter
        # of the rate.
        return ((a.to(tl.int16) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif a.dtype == tl.int8 and DTYPE == tl.bfloat16:
        low, high = int8_as_bf16(a)
        return low.to(tl.bfloat16, bitcast=True) - high.to(tl.bfloat16, bitcast=True)
    elif a.dtype == tl.bfloat16 and DTYPE == tl.float16:
        return a.to(tl.float32).to(tl.float16)  # packed conversion; the direct one is done one weight at a time
    else:
        return a.to(DTYPE)


@triton.jit
def put(ptrs, a, mask, INTERPRETED: tl.constexpr):
    """Store a with one rounding to the nearest."""
    tl.store(ptrs, cast(a, ptrs.dtype.element_ty, INTERPRETED).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def table_row(ptrs, live, E):
    """(row of the table, whether there is one) of each token: an id outside of [0, E) reads row 0, and its token gets
    NaN. Nobody looks at the ids of a GPU before a launch."""
    e = tl.load(ptrs, mask=live, other=0).to(tl.int64)
    known = (e >= 0) & (e < E)
    return tl.where(known, e, 0), known


@triton.jit
def choose(i, a0, a1, a2, a3, MEMBERS: tl.constexpr):
    """Member i of up to four: pointers or sizes."""
    a = a0
    if MEMBERS > 1:
        a = tl.where(i == 1, a1, a)
    if MEMBERS > 2:
        a = tl.where(i == 2, a2, a)
    if MEMBERS > 3:
        a = tl.where(i == 3, a3, a)
    return a
