"""impl="cuda": the decode kernel of csrc/cuda for T <= 32 tokens, without gradients.

One kernel does everything: rows of y = base + times * ((x Wᵀ) * scale[e]) + bias, for up to eight W a launch. The first
launch has W = Vᵀ and gives g; the second has W = U_i of every member. The second starts under the first and has its
weights on the way when the first is done. Products, dtypes and headroom are those of `ops.precision`, as in Triton's
kernels: sums in fp32, `scale` multiplied in fp32, g and y rounded once each. A row of `scale` that is zero returns base
bit for bit. A row of scale that is not there gives NaN.

V and U are read before the previous kernel has ended: that kernel must not write them. They are never copied: a layout
that the kernel does not read is refused (`Cuda.unsupported_layout`).
"""

from __future__ import annotations

import functools
import struct
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from t2kernels.ops.device import Device
from t2kernels.ops.planner import Call, Choice, Path
from t2kernels.ops.precision import forward_precision
from t2kernels.ops.tuning.tables import read_cuda_table

from . import extension
from .implementation import Added, Expansion, Implementation, Operands

FP16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
TOKENS, MEMBERS = 32, 8
DTYPES = ((BF16, BF16), (BF16, INT8), (BF16, FP16), (FP16, FP16), (FP16, INT8))
"""The dtypes (x, factors) that the kernel multiplies."""
# Above 8 tokens, blocks in clusters of 4 share the sums of 4 tiles, so that x is read a fourth as often
# (csrc/cuda/cluster.cuh). A row must be long enough to give 16 of their 32 warps a chunk of 128 bytes. Computed from
# bytes, not measured.
CLUSTER, CLUSTER_TOKENS, CLUSTER_BYTES = 4, 9, 2048


class Variant(NamedTuple):
    """How to launch. Other values than the default are for tests.

    dependent: each kernel may start under the previous one
    cluster: thread blocks that share the sums of a tile, 1 or 4 (T > 8, sm_90 and later); 0 for the number that suits
        the sizes
    """

    dependent: bool = True
    cluster: int = 0


class Problem(NamedTuple):
    """y [T, R] = base + times * ((x Wᵀ) * scale[e]) + bias for W [R, K] and x [T, K]; shift: log2(times)."""

    W: Tensor
    x: Tensor
    y: Tensor
    scale: Tensor | None = None
    base: Tensor | None = None
    bias: Tensor | None = None
    shift: int = 0


class Cuda(Implementation):
    """The CUDA kernel as an implementation."""

    name = "cuda"
    strict = True
    fused_paths: ClassVar[tuple[str, ...]] = ("decode",)

    def unsupported_device(self, device: torch.device) -> str | None:
        """See `Implementation`."""
        if device.type != "cuda":
            return f"the CUDA kernel is for NVIDIA GPUs, not for {device.type}"
        if reason := extension.unsupported(cuda=True):
            return reason
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU here"
        if torch.version.hip:
            return "the CUDA kernel is written for NVIDIA GPUs, and this torch is built for AMD"
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"the CUDA kernel needs compute capability 8.0 (A100) or later; {name} has {major}.{minor}"
        return None

    def probe(self, device: torch.device, found: Device) -> Device:
        """See `Implementation`; `auto` trusts it on a GPU whose table says that it was checked there."""
        if reason := self.unsupported_device(device):
            return found.without(self.name, reason)
        if device.type != "cuda":
            return found
        table = read_cuda_table(found.name)
        if table is None or not table.get("checked"):
            reason = "its kernel has not been checked on this kind of GPU; `t2 tune` does that"
            return found.distrusting(self.name, reason)
        wide, narrow = table.get("decode_tokens", found.decode_tokens)
        return found._replace(decode_tokens=(wide, narrow))

    def unsupported(self, call: Call) -> str | None:
        """See `Implementation`."""
        if call.grad:
            return "the decode kernel has no backward"
        if not 1 <= call.T <= TOKENS:
            return f"{_tokens(call.T)}, the decode kernel takes 1 to {TOKENS}"
        if reason := super().unsupported(call):
            return reason
        if (call.x, call.factors) not in DTYPES:
            return f"the decode kernel does not multiply x in {_dtype(call.x)} by factors in {_dtype(call.factors)}"
        if not 1 <= len(call.M) <= MEMBERS:
            return f"{len(call.M)} matrices, the decode kernel takes {MEMBERS}"
        step = 16 // call.factors.itemsize
        for name, size in (("N", call.N), *(("the number of columns", c) for c in call.C)):
            if size < 1 or size % step:
                return f"{name} is {size}, the decode kernel wants a multiple of {step} in {_dtype(call.factors)}"
        return "a member has no rows" if min(call.M) < 1 else None

    def unsupported_layout(self, x: Tensor, V: Tensor | None, Us: list[Tensor]) -> str | None:
        """See `Implementation`."""
        if x.dim() and (x.stride(-1) != 1 or not (x.dim() == 2 or x.is_contiguous())):
            return "x is not contiguous"
        if x.data_ptr() % 16 or (x.dim() == 2 and x.shape[0] > 1 and x.stride(0) % 8):
            return "a row of x does not begin on 16 bytes"
        for name, w in [("Vᵀ", None if V is None else V.t()), *((f"U[{i}]", U) for i, U in enumerate(Us))]:
            if w is not None and not w.is_contiguous():
                return f"{name} is not contiguous"
            if w is not None and w.data_ptr() % 16:
                return f"{name} does not begin on 16 bytes"
        return None

    def slower(self, call: Call, device: Device) -> str | None:
        """See `Implementation`."""
        most = device.decode_tokens[call.factors.itemsize == 1]
        return None if call.T <= most else f"{_tokens(call.T)}, the decode kernel is preferred up to {most}"

    def path(self, call: Call, device: Device) -> Path:
        """See `Implementation`."""
        return Path("decode", f"{_tokens(call.T)}: each factor streamed once")

    def forward(self, choice: Choice, given: Operands) -> list[Tensor]:
        """See `Implementation`."""
        return forward(*given)

    def shrink(self, choice: Choice, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
        """See `Implementation`."""
        return shrink(x, V, scale, expert_ids)

    def expand(self, choice: Choice, given: Expansion) -> list[Tensor]:
        """See `Implementation`."""
        return [y.reshape(*given.lead, y.shape[-1]) for y in expand(*given[:5])]

    def swiglu(self, given: Operands) -> Tensor:
        """See `Implementation`."""
        return forward_swiglu(*given)


CUDA = Cuda()


def forward(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Added,
    biases: Added,
    variant: Variant = Variant(),
) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], for calls that `CUDA` supports."""
    ys = [x.new_empty(*x.shape[:-1], U.shape[0]) for U in Us]
    g = shrink(x, V, scale, expert_ids, variant)
    _launch(_expanding(g, Us, bases, biases, ys, x.dtype), None, x, variant)
    return ys


def forward_swiglu(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Added,
    biases: Added,
    variant: Variant = Variant(),
) -> Tensor:
    """silu(y_gate) * y_up, [..., M], for two members of one M. y_gate, y_up and silu are rounded to x's dtype."""
    y = x.new_empty(*x.shape[:-1], Us[0].shape[0])
    g = shrink(x, V, scale, expert_ids, variant)
    _launch(_expanding(g, Us, bases, biases, [y], x.dtype), None, x, variant, gated=True)
    return y


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor, variant: Variant = Variant()) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C], in the dtype and units of `forward_precision`: the first launch alone."""
    g = x.new_empty(x.shape[:-1].numel(), V.shape[1], dtype=forward_precision(x.dtype, V.dtype).dtype)
    _launch([Problem(V.t(), x, g, scale)], expert_ids, x, variant)
    return g


def expand(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, dtype: torch.dtype, variant: Variant = Variant()
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i] in x's dtype, for the g of `shrink`: the second launch alone."""
    ys = [g.new_empty(g.shape[0], U.shape[0], dtype=dtype) for U in Us]
    _launch(_expanding(g, Us, bases, biases, ys, dtype), None, g, variant)
    return ys


def _expanding(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, ys: list[Tensor], dtype: torch.dtype
) -> list[Problem]:
    shift = int(forward_precision(dtype, Us[0].dtype).y).bit_length() - 1
    found, column = [], 0
    for i, (U, base, bias) in enumerate(zip(Us, bases, biases, strict=True)):
        found.append(Problem(U, g[:, column : column + U.shape[1]], ys[min(i, len(ys) - 1)], None, base, bias, shift))
        column += U.shape[1]
    return found


# --- one launch --------------------------------------------------------------------------------------------


def _launch(
    problems: list[Problem], expert_ids: Tensor | None, x: Tensor, variant: Variant, gated: bool = False
) -> None:
    """One launch of problems whose W have one dtype. gated: the last two are gate and up."""
    device, held = x.device, []
    T, W = problems[0].x.shape[:-1].numel(), problems[0].W
    product = W.dtype if W.dtype != INT8 else FP16 if x.dtype == FP16 else BF16  # int8: in x's dtype
    on_gpu = device.type == "cuda"
    words = [
        product == FP16,
        T,
        0 if expert_ids is None else _hold(held, expert_ids.reshape(-1).contiguous()).data_ptr(),
        expert_ids is not None and expert_ids.dtype == torch.int64,
        1 if expert_ids is None else max(1, T // max(1, expert_ids.numel())),
        max((p.scale.shape[0] for p in problems if p.scale is not None), default=1),
        len(problems) - 2 if gated else -1,
        variant.dependent,
        variant.cluster or _cluster(problems, T, device),
        multiprocessors(device),
        torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
    ]
    for p in problems:
        words += _words(p, T, product, held)
    packed = struct.pack(f"={len(words)}q", *words)
    if on_gpu and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            send(packed)
    else:
        send(packed)


def _words(p: Problem, T: int, product: torch.dtype, held: list[Tensor]) -> list[int]:
    """A problem in the order of `Word` in csrc/cuda/problem.h. Copies that are made here are held until the launch."""
    R, K = p.W.shape
    y, x = p.y.view(T, R), p.x.view(T, K)
    base = None if p.base is None else _hold(held, p.base.reshape(T, R))
    base = base if base is None or base.stride(1) == 1 else _hold(held, base.contiguous())
    bias = p.bias if p.bias is None or p.bias.stride(0) == 1 else _hold(held, p.bias.contiguous())
    scale = p.scale if p.scale is None or p.scale.stride(-1) == 1 else _hold(held, p.scale.contiguous())
    return [
        p.W.data_ptr(), x.data_ptr(), _address(scale), _address(bias), _address(base), y.data_ptr(), R, K,
        x.stride(0) if T > 1 else K, y.stride(0), 0 if base is None else base.stride(0),
        0 if scale is None else scale.stride(0), p.shift, p.W.dtype == INT8, product == FP16 and x.dtype == BF16,
        y.dtype == FP16,
    ]  # fmt: skip


def _cluster(problems: list[Problem], T: int, device: torch.device) -> int:
    """How many thread blocks should share their sums."""
    if T < CLUSTER_TOKENS:
        return 1
    short = min(p.W.shape[1] * p.W.element_size() for p in problems) < CLUSTER_BYTES
    return 1 if short or architecture(device) < 90 else CLUSTER


def _tokens(T: int) -> str:
    return f"{T} token{'' if T == 1 else 's'}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _hold(held: list[Tensor], t: Tensor) -> Tensor:
    held.append(t)
    return t


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 3 for the emulator of csrc/emulator."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture (80, 90, 100) that the code on a device was compiled for; 90 for the emulator."""
    if device.type != "cuda":
        return 90
    with torch.cuda.device(device):
        return extension.load().cuda_architecture()


def send(packed: bytes) -> None:
    """Launch: the words of csrc/cuda/problem.h, in the order of the host. Tests replace it by the emulator."""
    extension.load().cuda_launch(packed)
