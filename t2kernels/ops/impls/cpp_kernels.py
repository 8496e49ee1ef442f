"""impl="cpp": decoding on a CPU, in C++ (csrc/cpu), on torch's own threads. Factors are read once, as they are stored, and widened in registers.

fp32, bf16, fp16 and int8 factors with an x in fp32, bf16 or fp16. x, V and U are widened to fp32, which is exact, and products, sums and
g = (x V) * scale[expert_ids] are fp32; y is rounded once: nothing is rounded that `ops.precision` does not round. A number of y depends on its own
token and row alone, to the last bit: neither the threads, the other tokens nor the other members of a group change the order of a sum.
There is no backward.
"""

from __future__ import annotations

import functools
import importlib
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
        _C = importlib.import_module("t2kernels._C")
    except ModuleNotFoundError:
        return "t2kernels._C is not built: install t2kernels again where there is a C++ compiler (docs/howto/build.md)"
    except ImportError as e:
        return f"t2kernels._C cannot be loaded: {e}"
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


def why_not_these(V: Tensor, Us: list[Tensor]) -> str | None:
    """Why factors cannot be read as they lie in memory; None where they can. Layers keep them so that they can."""
    if len(Us) > MEMBERS:
        return f"{len(Us)} members, at most {MEMBERS} are taken"
    if V.dtype not in DTYPES:
        return f"V's dtype is {V.dtype}"
    if V.stride(0) != 1 and V.shape[0] > 1:  # a size of 1 may have any stride
        return f"V has strides {tuple(V.stride())}, wanted the transpose of a Vᵀ whose rows are contiguous"
    for i, U in enumerate(Us):
        if U.stride(1) != 1 and U.shape[1] > 1:
            return f"U[{i}] has strides {tuple(U.stride())}, wanted contiguous rows"
    return None


def forward(x, V, Us, scale, expert_ids, bases, biases) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], for factors that `why_not_these` has nothing against."""
    held, first = _first_half(x, V, scale, expert_ids)
    lead = x.shape[:-1]
    ys = [x.new_empty((*lead, U.shape[0])) for U in Us]
    held_too, second = _second_half(Us, bases, biases, ys)
    _extension().cpu_svf_linear(first, second, torch.get_num_threads(), isa())
    del held, held_too  # until here their memory was read
    return ys


def shrink(x, V, scale, expert_ids) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] fp32: the first half of `forward`."""
    g = torch.empty((x.shape[:-1].numel(), V.shape[1]))
    held, first = _first_half(x, V, scale, expert_ids)
    _extension().cpu_shrink(first, g.data_ptr(), torch.get_num_threads(), isa())
    del held
    return g


def expand(g, Us, bases, biases, dtype, lead) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [*lead, M_i] in `dtype`, from the g [T, C] of `shrink`: the second half."""
    ys = [torch.empty((*lead, U.shape[0]), dtype=dtype) for U in Us]
    held, second = _second_half(Us, bases, biases, ys)
    where = g.data_ptr(), *g.shape, g.stride(0), DTYPES[Us[0].dtype], DTYPES[dtype]
    _extension().cpu_expand(where, second, torch.get_num_threads(), isa())
    del held
    return ys


def _first_half(x, V, scale, ids) -> tuple[tuple, tuple]:
    """Tensors that must live as long as their addresses are used, and what the extension is told of x, Vᵀ, scale and expert_ids."""
    x, (N, C) = _rows(x), V.shape
    if (
        scale.stride(1) != 1 or not ids.is_contiguous()
    ):  # as no table of a bank is: the rows in question, in the order of the tokens
        scale, ids = scale.index_select(0, ids.reshape(-1)), torch.arange(ids.numel())
    return (x, scale, ids), (
        *(x.data_ptr(), x.shape[0], x.stride(0), DTYPES[x.dtype]),
        *(V.data_ptr(), C, N, V.stride(1), DTYPES[V.dtype]),
        *(scale.data_ptr(), scale.shape[0], scale.stride(0)),
        *(ids.data_ptr(), ids.numel(), ids.dtype == torch.int64),
    )


def _second_half(Us, bases, biases, ys) -> tuple[list, tuple]:
    """The same of U, base, bias and y of each member."""
    bases = [None if base is None else _rows(base) for base in bases]
    return bases, tuple(
        (
            *(U.data_ptr(), *U.shape, U.stride(0)),
            *((0, 0) if base is None else (base.data_ptr(), base.stride(0))),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
        for U, base, bias, y in zip(Us, bases, biases, ys, strict=True)
    )


def _rows(t: Tensor) -> Tensor:
    """t [..., n] as [T, n] with contiguous rows; copied only where it does not lie so."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
