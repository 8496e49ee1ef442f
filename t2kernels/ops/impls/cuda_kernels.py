"""impl="cuda": the decode kernel of csrc/cuda for T <= 32 tokens, without gradients, through the extension `t2kernels._C`.

One kernel does everything: a row of y = base + times * ((x Wᵀ) * scale[e]) + bias, for up to eight W a launch. x V is a launch with W = Vᵀ, the
expand one with W = U_i of every member; the second starts under the first and has its weights on the way when the first is done. Products,
dtypes and headroom are those of `ops.precision`, as in `triton_kernels`: sums in fp32, `scale` multiplied in fp32, one rounding each for g and
for y; a row of `scale` that is zero returns base bit for bit.

W, V and U are read before the wait for the kernel before: they must not be written by the kernel just before. They are never copied: what does
not lie as the kernel reads it is refused (`misfit`). A row of scale that is not there gives NaN.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from t2kernels.ops.precision import forward_precision

FP16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
# Above 8 tokens, blocks in clusters of 4 share the sums of 4 tiles, so that x is read a fourth as often (csrc/cuda/cluster.cuh), where a row is
# long enough to give 16 of their 32 warps a chunk of 128 bytes. Computed from bytes, not measured.
CLUSTER, CLUSTER_TOKENS, CLUSTER_BYTES = 4, 9, 2048


class Variant(NamedTuple):
    """How to launch; what is not the default is for measuring.

    dependent: each kernel may start under the one before; fused: both halves in one cooperative launch with a grid barrier, T <= 8
    blocks: at most so many thread blocks, 0 for as many as are resident; depth: chunks in flight a warp, 0 for the usual
    cluster: thread blocks that share the sums of a tile, 1 or 4 (T > 8, sm_90 and later); 0 for what suits the sizes
    """

    dependent: bool = True
    fused: bool = False
    blocks: int = 0
    depth: int = 0
    cluster: int = 0


class Problem(NamedTuple):
    """y [T, R] = base + times * ((x Wᵀ) * scale[e]) + bias for W [R, K], x [T, K]; shift: log2(times)."""

    W: Tensor
    x: Tensor
    y: Tensor
    scale: Tensor | None = None
    base: Tensor | None = None
    bias: Tensor | None = None
    shift: int = 0


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the CUDA kernel cannot run for tensors on a device; None where it can."""
    if device.type != "cuda":
        return f"the CUDA kernel is for NVIDIA GPUs, not for {device.type}"
    if why := why_not_built():
        return why
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here"
    if torch.version.hip:
        return "the CUDA kernel is written for NVIDIA GPUs, and this torch is built for AMD"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return (
            f"the CUDA kernel needs compute capability 8.0 (A100) or later; {name} has {capability[0]}.{capability[1]}"
        )
    return None


@functools.cache
def why_not_built() -> str | None:
    """Why the extension holds no CUDA kernel, or None."""
    try:
        from t2kernels import _C
    except ModuleNotFoundError:
        return "t2kernels._C is not built: install t2kernels again where there are a C++ compiler and nvcc (docs/howto/build.md)"
    except ImportError as e:
        return f"t2kernels._C cannot be loaded: {e}"
    return (
        None
        if _C.has_cuda
        else "t2kernels._C was built without CUDA: install t2kernels again where there is nvcc (docs/howto/build.md)"
    )


def misfit(x: Tensor, V: Tensor | None, Us: list[Tensor]) -> str | None:
    """Why tensors do not lie in memory as the kernel reads them, or None. Sizes and dtypes are `planner.why_no_decode`'s to judge."""
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


def forward(x, V, Us, scale, expert_ids, bases, biases, variant=Variant()) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i]; arguments as in `svf_linear_group`, T <= 32."""
    ys = [x.new_empty(*x.shape[:-1], U.shape[0]) for U in Us]
    _two_phases(x, [], V, Us, scale, expert_ids, bases, biases, ys, variant)
    return ys


def forward_swiglu(x, V, Us, scale, expert_ids, bases, biases, variant=Variant()) -> Tensor:
    """silu(y_gate) * y_up, [..., M], for two members U = [U_gate, U_up] of one M; y_gate, y_up and silu(y_gate) are rounded to x's dtype."""
    y = x.new_empty(*x.shape[:-1], Us[0].shape[0])
    _two_phases(x, [], V, Us, scale, expert_ids, bases, biases, [y], variant)
    return y


def forward_over(
    x, Ws, V, Us, scale, expert_ids, biases, row_scales=None, swiglu=False, variant=Variant()
) -> list[Tensor]:
    """y_i = x W_iᵀ + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i with the base layers read in the same launch as V, each [..., M_i].

    Ws: [M_i, N] contiguous, in x's dtype, or int8 with row_scales: fp32 [M_i] each, W_i = int8 * row_scale[:, None]
    swiglu: [silu(y_gate) * y_up] for two members. The rest as in `forward`. Raises ValueError on weights that the kernel does not read.
    """
    how = forward_precision(x.dtype, V.dtype)
    row_scales = row_scales or [None] * len(Ws)
    for W, rows, U in zip(Ws, row_scales, Us, strict=True):
        if W.dtype not in (how.dtype, INT8) or how.dtype != x.dtype or (W.dtype == INT8) != (rows is not None):
            raise ValueError(
                f"forward_over: W is {W.dtype} for x in {x.dtype} and V in {V.dtype}, wanted x's dtype, or int8 with row_scales"
            )
        if (
            W.shape != (U.shape[0], x.shape[-1])
            or W.shape[1] * W.element_size() % 16
            or not W.is_contiguous()
            or W.data_ptr() % 16
        ):
            raise ValueError(
                f"forward_over: W is {list(W.shape)}, wanted [M, N] contiguous, on 16 bytes, its rows a multiple of 16 bytes"
            )
    bases = [x.new_empty(*x.shape[:-1], U.shape[0]) for U in Us]
    ys = bases[:1] if swiglu else bases  # the second phase adds to what the first has left there
    over = [Problem(W, x, b, rows) for W, b, rows in zip(Ws, bases, row_scales, strict=True)]
    _two_phases(x, over, V, Us, scale, expert_ids, bases, biases, ys, variant)
    return ys


def dense(x, Ws, row_scales=None, variant=Variant()) -> list[Tensor]:
    """y_i = x W_iᵀ, the base layers of `forward_over` without experts: what the kernel itself costs beside a library's, for measuring."""
    ys = [x.new_empty(*x.shape[:-1], W.shape[0]) for W in Ws]
    _launch(
        [Problem(W, x, y, r) for W, y, r in zip(Ws, ys, row_scales or [None] * len(Ws), strict=True)], None, x, variant
    )
    return ys


def shrink(x, V, scale, expert_ids, variant=Variant()) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C], in the dtype and units of `forward_precision`: for a base product that another library makes."""
    g = x.new_empty(x.shape[:-1].numel(), V.shape[1], dtype=forward_precision(x.dtype, V.dtype).dtype)
    _launch([Problem(V.t(), x, g, scale)], expert_ids, x, variant)
    return g


def expand(g, Us, bases, biases, dtype, variant=Variant()) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i] in `dtype`, x's, for g as `shrink` returned it."""
    ys = [g.new_empty(g.shape[0], U.shape[0], dtype=dtype) for U in Us]
    _launch(_expanding(g, Us, bases, biases, ys, dtype), None, g, variant)
    return ys


def _two_phases(x, over: list[Problem], V, Us, scale, expert_ids, bases, biases, ys, variant) -> None:
    g = x.new_empty(x.shape[:-1].numel(), V.shape[1], dtype=forward_precision(x.dtype, V.dtype).dtype)
    first = [Problem(V.t(), x, g, scale), *over]
    second = _expanding(g, Us, bases, biases, ys, x.dtype)
    pair = len(ys) < len(Us)
    if variant.fused:
        _launch([*first, *second], expert_ids, x, variant, len(first), pair)
    else:
        _launch(first, expert_ids, x, variant)
        _launch(second, None, x, variant, pair=pair)


def _expanding(g: Tensor, Us, bases, biases, ys, dtype: torch.dtype) -> list[Problem]:
    shift = int(forward_precision(dtype, Us[0].dtype).y).bit_length() - 1
    found, column = [], 0
    for i, (U, base, bias) in enumerate(zip(Us, bases, biases, strict=True)):
        found.append(Problem(U, g[:, column : column + U.shape[1]], ys[min(i, len(ys) - 1)], None, base, bias, shift))
        column += U.shape[1]
    return found


# --- one launch --------------------------------------------------------------------------------------------------------------------


def _launch(
    problems: list[Problem],
    expert_ids: Tensor | None,
    x: Tensor,
    variant: Variant,
    first: int | None = None,
    pair: bool = False,
) -> None:
    """problems of one launch; first: how many of them make the first of two phases; pair: the last two are gate and up."""
    device, kept = x.device, []
    T = problems[0].x.shape[:-1].numel()
    products = {FP16, BF16} & {p.W.dtype for p in problems}
    product = products.pop() if products else FP16 if x.dtype == FP16 else BF16  # int8 alone: in x's dtype
    if products:
        raise ValueError("the CUDA kernel takes bf16 or fp16 weights in a launch, not both")
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    barrier = _barrier(device, stream) if variant.fused else None
    words = [
        product == FP16,
        T,
        0 if expert_ids is None else _keep(kept, expert_ids.reshape(-1).contiguous()).data_ptr(),
        expert_ids is not None and expert_ids.dtype == torch.int64,
        1 if expert_ids is None else max(1, T // max(1, expert_ids.numel())),
        max((p.scale.shape[0] for p in problems if p.scale is not None and p.scale.dim() == 2), default=1),
        len(problems) if first is None else first,
        len(problems) - 2 if pair else -1,
        0 if barrier is None else barrier.data_ptr(),
        variant.dependent,
        variant.fused,
        variant.cluster or _cluster(problems, T, variant, device),
        variant.blocks,
        variant.depth,
        _multiprocessors(device),
        stream,
    ]
    for p in problems:
        words += _words(p, T, product, kept)
    packed = struct.pack(f"={len(words)}q", *words)
    if on_gpu and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            _send(packed)
    else:
        _send(packed)


def _words(p: Problem, T: int, product: torch.dtype, kept: list[Tensor]) -> list[int]:
    """A problem as csrc/cuda/problem.h's `Word` orders it. Copies that are made on the way are kept until the launch."""
    R, K = p.W.shape
    y, x = p.y.view(T, R), p.x.view(T, K)
    base = None if p.base is None else _keep(kept, p.base.reshape(T, R))
    base = base if base is None or base.stride(1) == 1 else _keep(kept, base.contiguous())
    bias = p.bias if p.bias is None or p.bias.stride(0) == 1 else _keep(kept, p.bias.contiguous())
    scale = p.scale if p.scale is None or p.scale.stride(-1) == 1 else _keep(kept, p.scale.contiguous())
    return [
        p.W.data_ptr(), x.data_ptr(), _address(scale), _address(bias), _address(base), y.data_ptr(), R, K, x.stride(0) if T > 1 else K, y.stride(0),
        0 if base is None else base.stride(0), 0 if scale is None or scale.dim() == 1 else scale.stride(0), p.shift,
        p.W.dtype == INT8, product == FP16 and x.dtype == BF16, y.dtype == FP16,
    ]  # fmt: skip


def _cluster(problems: list[Problem], T: int, variant: Variant, device: torch.device) -> int:
    """How many blocks should share their sums."""
    if T < CLUSTER_TOKENS or variant.fused or variant.depth or len({p.W.dtype for p in problems}) > 1:
        return 1
    short = min(p.W.shape[1] * p.W.element_size() for p in problems) < CLUSTER_BYTES
    return 1 if short or _architecture(device) < 90 else CLUSTER


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _keep(kept: list[Tensor], t: Tensor) -> Tensor:
    kept.append(t)
    return t


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def _architecture(device: torch.device) -> int:
    """For which architecture the code that runs on a device was compiled: 80, 90, 100. The emulator's has everything."""
    if device.type != "cuda":
        return 90
    from t2kernels import _C

    with torch.cuda.device(device):
        return _C.cuda_architecture()


@functools.cache
def _barrier(device: torch.device, stream: int) -> Tensor:
    """{arrived, generation} of the grid barrier. Two launches that run at one time must not share it, hence one a stream."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def _send(packed: bytes) -> None:
    from t2kernels import _C

    _C.cuda_launch(packed)
