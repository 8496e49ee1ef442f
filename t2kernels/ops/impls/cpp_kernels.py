"""impl="cpp": decoding on a CPU in C++ (csrc/cpu), on torch's own threads.

Each factor is read once, as it is stored. Factors in fp32, bf16, fp16 or int8, x in fp32, bf16 or fp16. x, V and U are
widened to fp32 in registers, which is exact. With AVX-512's bf16 instructions x and V in bf16 are multiplied as they
are, as exactly, but subnormal numbers count as 0; in calls of more than `FEW` tokens they also multiply U with g in
bf16, rounded once. Otherwise g = (x V) * scale[expert_ids] is fp32, as products and sums are, and y is rounded once. It
rounds nowhere where `ops.precision` does not. Each number of y depends on its own token and row alone, and on whether
the tokens are few, to the last bit: threads, other tokens and other members do not change the order of a sum. There is
no backward.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path as Files

import torch
from torch import Tensor

from t2kernels.ops.device import Device
from t2kernels.ops.planner import Call, Choice, Path, dense_path
from t2kernels.ops.tuning.tables import read_cpu_table

from . import extension
from .implementation import Added, Expansion, Implementation, InPlace, Operands

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
MEMBERS = 8
TUNED = 64  # `t2 tune` times no more tokens
FEW = 32  # as in csrc/cpu/svf_cpu.h
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
TIMES = 128  # tokens from which `times` is ahead
COPIED = 512, 2**22  # if B is copied: tokens from which it is, and numbers of B that stay in the cache (16 MB)
# Up to this many tokens it is ahead of torch by 5 % or more on every shape of benchmarks/cpp.py, for an instruction set
# and the dtypes of x and of the factors; for other dtypes it never is. torch converts factors of another dtype whole
# before it multiplies. Measured on an AMD EPYC; `t2 tune --device cpu` writes this machine's own numbers into a table,
# which is read instead. fp32 with AVX-512: 0.47 to 0.94 of torch's time from 32 to 1024 tokens for 36 to 2048 columns,
# on 1 and 2 threads; behind (81 us, torch 58) is rank 16 of a 128-wide model with 2 threads.
TOKENS: dict[tuple[str, torch.dtype, torch.dtype], int] = {
    ("avx512", torch.float32, torch.float32): 1024,
    ("avx512", torch.bfloat16, torch.bfloat16): 64,
    ("avx2", torch.float32, torch.float32): 4,
    ("avx2", torch.bfloat16, torch.bfloat16): 16,
    **{
        (isa, x, factors): 16
        for isa in ("avx512", "avx2")
        for x, factors in (
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
            (torch.float32, torch.int8),
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.int8),
            (torch.float16, torch.float16),
            (torch.float16, torch.int8),
        )
    },
    # torch widens all of these factors in each call: C++ takes 0.20 to 0.86 of its time at T = 64, on 1 and 2 threads.
    **{("avx512", torch.float32, factors): 64 for factors in (torch.bfloat16, torch.float16, torch.int8)},
}


# For bf16 alone torch has instructions of its own with AVX-512, twice as fast as widening; what it pays is fixed, 40 us
# for a call of small products, 65 us for two members, 80 us for three. Above 4 tokens C++ is ahead up to this many
# tokens times numbers in the factors, for the first member and for each further one. Both in place, one thread of an
# AMD EPYC. With two threads torch's products take half.
# avx512, q, k, v / o / gate and up / down of a 576-wide model: even at 17 M, 9 M, 9 M and 8 M.
# avx512_bf16, one member: 0.71 of torch's time at 11 M, 0.85 at 16 M, 1.1 at 34 M; two: 0.71 at 8 M, 0.85 at 10 M, 1.2
# at 19 M; three: 0.47 at 6 M, 0.96 at 25 M.
BF16_WORK = {"avx512": (6e6, 3e6), "avx512_bf16": (10e6, 4e6)}
# With g in bf16 it is ahead from 33 to so many tokens, up to these in_features and columns of a member: 0.2 to 0.98 of
# torch's time for 128 to 2048 in_features and 16 to 256 columns, in place, one thread. Above them 0.9 to 1.3.
BF16_MANY = {"avx512_bf16": (2048, 2048, 256)}


class Cpp(Implementation):
    """The C++ kernels as an implementation."""

    name = "cpp"
    merit = "measured to be faster than torch on"
    strict = True
    shares_g = False

    def unsupported_device(self, device: torch.device) -> str | None:
        """See `Implementation`."""
        if device.type != "cpu":
            return f"the C++ kernels are for tensors on the CPU, these are on {device.type}"
        return extension.unsupported()

    def probe(self, device: torch.device, found: Device) -> Device:
        """See `Implementation`."""
        if reason := self.unsupported_device(device):
            return found.without(self.name, reason)
        table = read_cpu_table(cpu_name()) or {"stream_tokens": {}}
        measured = tuple(sorted(table["stream_tokens"].items()))
        found = found._replace(name=f"{found.name} ({isa()})", isa=isa(), stream_tokens=measured)
        return found.distrusting(self.name, "without AVX2 it is slower than torch") if isa() == "portable" else found

    def unsupported(self, call: Call) -> str | None:
        """See `Implementation`."""
        if call.grad:
            return "it has no backward: call it under torch.no_grad()"
        if reason := super().unsupported(call):
            return reason
        return None if call.factors in DTYPES else f"V's dtype is {call.factors}"

    def unsupported_layout(self, x: Tensor, V: Tensor | None, Us: list[Tensor]) -> str | None:
        """Why factors do not lie in memory as the kernels read them, or None. Layers keep them so that they do."""
        if len(Us) > MEMBERS:
            return f"{len(Us)} members, at most {MEMBERS} are taken"
        if V is not None and V.stride(0) != 1 and V.shape[0] > 1:  # a size of 1 may have any stride
            return f"V has strides {tuple(V.stride())}, wanted the transpose of a Vᵀ whose rows are contiguous"
        for i, U in enumerate(Us):
            if U.stride(1) != 1 and U.shape[1] > 1:
                return f"U[{i}] has strides {tuple(U.stride())}, wanted contiguous rows"
        return None

    def slower(self, call: Call, device: Device) -> str | None:
        """See `Implementation`."""
        if device.kind != "cpu":
            return "it is for CPUs"
        here = dict(device.stream_tokens).get(f"{call.x} {call.factors}".replace("torch.", ""))
        most = TOKENS.get((device.isa.removesuffix("_bf16"), call.x, call.factors), 0)
        if here is not None and not TUNED <= here < most:  # up to the last one that is tuned means: at least so many
            most = here
        if call.T > TUNED and dense_path(call) is not None:
            return "W' made once takes fewer operations"
        bf16 = call.x == call.factors == torch.bfloat16
        if bf16 and most >= TUNED and FEW < call.T and _ahead_of_many(call, device.isa):
            return None
        if 0 < call.T <= most:
            work = call.T * sum(C * (call.N + M) for M, C in zip(call.M, call.C, strict=True))
            first, further = BF16_WORK.get(device.isa, (0, 0))
            if here is None and call.T > 4 and bf16 and first and work > first + further * (len(call.M) - 1):
                return f"in bfloat16 torch is ahead in calls as large as this ({call.T} tokens)"
            return None
        formats = f"{call.x} with {call.factors} factors on {device.isa}".replace("torch.", "")
        return f"faster up to {most} tokens only ({formats})" if most else f"not measured to be faster ({formats})"

    def path(self, call: Call, device: Device) -> Path:
        """See `Implementation`."""
        if call.T > FEW and device.isa == "avx512_bf16" and call.x == call.factors == torch.bfloat16:
            return Path("stream", "factors read once, multiplied in bf16")
        return Path("stream", "factors read once, widened in registers")

    def forward(self, choice: Choice, given: Operands) -> list[Tensor]:
        """See `Implementation`."""
        return forward(*given)

    def shrink(self, choice: Choice, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
        """See `Implementation`; g is fp32."""
        return shrink(x, V, scale, expert_ids)

    def expand(self, choice: Choice, given: Expansion) -> list[Tensor]:
        """See `Implementation`."""
        return expand(*given)

    def prepare(self, V: Tensor, Us: list[Tensor], scale: Tensor) -> InPlace | None:
        """See `Implementation`."""
        return prepare(V, Us, scale)


CPP = Cpp()


def _ahead_of_many(call: Call, isa: str) -> bool:
    T, N, C = BF16_MANY.get(isa, (0, 0, 0))
    return call.T <= T and call.N <= N and max(call.C) <= C


@functools.cache
def isa() -> str:
    """The instruction set that runs: the widest of this CPU, or the one of `ISAS` that T2KERNELS_CPU_ISA names."""
    return extension.load().cpu_isa(os.environ.get("T2KERNELS_CPU_ISA") or None)


def cpu_name() -> str:
    """The name of this CPU and of the instruction set that runs."""
    try:
        lines = Files("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()} {isa()}"


def forward(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: Added, biases: Added
) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], for calls that `CPP` supports."""
    held, first = _first_half(x, V, scale, expert_ids)
    lead = x.shape[:-1]
    ys = [x.new_empty((*lead, U.shape[0])) for U in Us]
    held_too, second = _second_half(Us, bases, biases, ys)
    extension.load().cpu_svf_linear(first, second, torch.get_num_threads(), isa())
    del held, held_too  # their memory was read until here
    return ys


def prepare(V: Tensor, Us: list[Tensor], scale: Tensor) -> InPlace | None:
    """`forward` in place for one group. Its tensors must live as long as the result, and change in place only."""
    if scale.stride(1) != 1:
        return None
    N, C = V.shape
    first = V.data_ptr(), C, N, V.stride(1), DTYPES[V.dtype], scale.data_ptr(), scale.shape[0], scale.stride(0)
    group = extension.load().CpuGroup(first, tuple((U.data_ptr(), *U.shape, U.stride(0)) for U in Us), isa())
    add, threads, int64, lies, at = group.add, torch.get_num_threads, torch.int64, Tensor.is_contiguous, Tensor.data_ptr

    def run(x: Tensor, ids: Tensor, bases: list[Tensor], starts: Sequence[int] | None = None) -> bool:
        if not (lies(x) and lies(ids) and all(map(lies, bases))):
            return False
        if starts is None:
            ys, stride = list(map(at, bases)), 0
        else:
            (y,) = bases
            first, size, stride = y.data_ptr(), y.element_size(), y.shape[-1]
            ys = [first + size * s for s in starts]
        add(
            *(x.data_ptr(), x.numel() // N, DTYPES[x.dtype], ids.data_ptr(), ids.numel(), ids.dtype is int64),
            *(threads(), ys, stride),
        )
        return True

    return run


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C] fp32: the first half of `forward`."""
    g = x.new_empty((x.shape[:-1].numel(), V.shape[1]), dtype=torch.float32)
    held, first = _first_half(x, V, scale, expert_ids)
    extension.load().cpu_shrink(first, g.data_ptr(), torch.get_num_threads(), isa())
    del held
    return g


def times(a: Tensor, B: Tensor) -> Tensor | None:
    """a B [T, C] for a [T, K] and B [K, C]; None where torch is as fast.

    In fp32 with AVX-512 it takes 0.46 to 0.68 of torch's time for 512 and 4096 tokens and 8 to 1024 columns. A B whose
    columns are not contiguous is copied: 0.6 to 0.83 for 512 and 2048 tokens and matrices of up to 11.5 MB, 1.0 for
    64 MB, and up to 1.5 for 128 tokens. In bf16 torch is level with it (one thread of an AMD EPYC).
    """
    copied = B.stride(0) != 1
    small = a.shape[0] < (COPIED[0] if copied else TIMES) or (copied and B.numel() > COPIED[1])
    if small or not a.dtype is B.dtype is torch.float32 or not a.is_cpu:
        return None
    if extension.unsupported() is not None or not isa().startswith("avx512"):
        return None
    if copied:
        B = B.t().contiguous().t()
    return shrink(a, B, a.new_ones(1, B.shape[1]), a.new_zeros(1, dtype=torch.int64))


def expand(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, dtype: torch.dtype, lead: Sequence[int]
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [*lead, M_i] in `dtype`, from the g of `shrink`: the second half."""
    ys = [torch.empty((*lead, U.shape[0]), dtype=dtype) for U in Us]
    held, second = _second_half(Us, bases, biases, ys)
    where = g.data_ptr(), *g.shape, g.stride(0), DTYPES[Us[0].dtype], DTYPES[dtype]
    extension.load().cpu_expand(where, second, torch.get_num_threads(), isa())
    del held
    return ys


def _first_half(x: Tensor, V: Tensor, scale: Tensor, ids: Tensor) -> tuple[tuple, tuple]:
    """Tensors to hold while their addresses are used, and the numbers of x, Vᵀ, scale and ids for the extension."""
    x, (N, C) = _rows(x), V.shape
    if scale.stride(1) != 1 or not ids.is_contiguous():  # no table of a bank is like that
        scale, ids = scale.index_select(0, ids.reshape(-1)), torch.arange(ids.numel())
    return (x, scale, ids), (
        *(x.data_ptr(), x.shape[0], x.stride(0), DTYPES[x.dtype]),
        *(V.data_ptr(), C, N, V.stride(1), DTYPES[V.dtype]),
        *(scale.data_ptr(), scale.shape[0], scale.stride(0)),
        *(ids.data_ptr(), ids.numel(), ids.dtype == torch.int64),
    )


def _second_half(Us: list[Tensor], bases: Added, biases: Added, ys: list[Tensor]) -> tuple[list, tuple]:
    """The same for U, base, bias and y of each member."""
    rows = [None if base is None else _rows(base) for base in bases]
    return rows, tuple(
        (
            *(U.data_ptr(), *U.shape, U.stride(0)),
            *((0, 0) if base is None else (base.data_ptr(), base.stride(0))),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
        for U, base, bias, y in zip(Us, rows, biases, ys, strict=True)
    )


def _rows(t: Tensor) -> Tensor:
    """t [..., n] as [T, n] with contiguous rows; copied only if it does not lie so."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
