"""impl="cpp": decoding on a CPU, in C++ (csrc/cpu), on torch's own threads. Factors are read once, as they are stored, and widened in registers.

fp32, bf16, fp16 and int8 factors with an x in fp32, bf16 or fp16. x, V and U are widened to fp32, which is exact, and products, sums and
g = (x V) * scale[expert_ids] are fp32; y is rounded once: nothing is rounded that `ops.precision` does not round. A number of y depends on its own
token and row alone, to the last bit: neither the threads, the other tokens nor the other members of a group change the order of a sum.
There is no backward.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
MEMBERS = 8
ISAS = ("portable", "avx2", "avx512")


@functools.cache
def _extension():
    """t2kernels._C with torch's threads, or why it cannot be had."""
    try:
        from t2kernels import _C
    except ImportError as e:
        missing = isinstance(e, ModuleNotFoundError) or "_C" in str(e) and "cannot import name" in str(e)
        return "t2kernels._C is not built: install t2kernels again with a C++ compiler (docs/building.md)" if missing else f"t2kernels._C: {e}"
    _C.cpu_find_threads(torch._C.__file__)
    return _C


def why_not(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run for tensors on a device; None where they can."""
    if device.type != "cpu":
        return f"the C++ kernels are for tensors on the CPU, these are on {device.type}"
    found = _extension()
    return found if isinstance(found, str) else None


@functools.cache
def isa() -> str:
    """The instruction set that runs: the widest of this CPU, or the one that T2KERNELS_CPU_ISA names ("portable", "avx2", "avx512")."""
    return _extension().cpu_isa(os.environ.get("T2KERNELS_CPU_ISA") or None)


def why_not_these(x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, bases: list[Tensor | None] | None) -> str | None:
    """Why a call cannot be run as its tensors lie; None where it can. Sizes, dtypes and devices are right already."""
    if len(Us) > MEMBERS:
        return f"{len(Us)} members, at most {MEMBERS} are taken"
    if V.stride(0) != 1 and V.shape[0] > 1:
        return f"V has strides {tuple(V.stride())}, wanted the view of a contiguous Vᵀ"
    for name, t in (("U", Us), ("scale", [scale])):
        for part in t:
            if part.stride(1) != 1 and part.shape[1] > 1:
                return f"{name} has strides {tuple(part.stride())}, wanted rows that are contiguous"
    for name, t in (("x", x), *(("base", b) for b in bases or () if b is not None)):
        if not _flat(t):
            return f"{name} has sizes {tuple(t.shape)} and strides {tuple(t.stride())}, wanted rows that are contiguous and evenly apart"
    return None


def forward(x, V, Us, scale, expert_ids, bases, biases) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], for tensors that `why_not_these` has nothing against."""
    lead, T = x.shape[:-1], x.shape[:-1].numel()
    ys = [torch.empty((*lead, U.shape[0]), dtype=x.dtype) for U in Us]
    _extension().cpu_svf_linear(
        *_shrunk(x, T, V, scale, expert_ids), _expanded(Us, bases, biases, ys), torch.get_num_threads(), isa()
    )
    return ys


def shrink(x, V, scale, expert_ids) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] fp32: the first half of `forward`."""
    T = x.shape[:-1].numel()
    g = torch.empty((T, V.shape[1]))
    _extension().cpu_shrink(*_shrunk(x, T, V, scale, expert_ids), (g.data_ptr(), V.shape[1]), torch.get_num_threads(), isa())
    return g


def expand(g, Us, bases, biases, dtype, lead) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [*lead, M_i] in `dtype`, from the g [T, C] fp32 of `shrink`: the second half."""
    ys = [torch.empty((*lead, U.shape[0]), dtype=dtype) for U in Us]
    _extension().cpu_expand(
        (g.data_ptr(), *g.shape, g.stride(0)), _expanded(Us, bases, biases, ys), DTYPES[Us[0].dtype], DTYPES[dtype], torch.get_num_threads(), isa()
    )
    return ys


def _shrunk(x, T, V, scale, expert_ids) -> tuple:
    N, C = V.shape
    ids = expert_ids if expert_ids.is_contiguous() else expert_ids.contiguous()
    count = ids.numel()
    return (
        (x.data_ptr(), T, x.stride(-2) if x.dim() > 1 else N, DTYPES[x.dtype]),
        (V.data_ptr(), C, N, V.stride(1), DTYPES[V.dtype]),
        (scale.data_ptr(), scale.shape[0], scale.stride(0)),
        (ids.data_ptr(), count, T // count if count else 1, ids.dtype == torch.int64),
    )


def _expanded(Us, bases, biases, ys) -> tuple:
    return tuple(
        (
            U.data_ptr(),
            *U.shape,
            U.stride(0),
            0 if base is None else base.data_ptr(),
            0 if base is None or base.dim() == 1 else base.stride(-2),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            U.shape[0],
        )
        for U, base, bias, y in zip(Us, bases, biases, ys, strict=True)
    )


def _flat(t: Tensor) -> bool:
    """Whether t [..., n] is rows of n numbers that lie evenly apart in memory."""
    if t.is_contiguous():
        return True
    sizes, strides = t.shape, t.stride()
    if sizes[-1] > 1 and strides[-1] != 1:
        return False
    return all(sizes[i] == 1 or strides[i] == strides[i + 1] * sizes[i + 1] for i in range(t.dim() - 2))
