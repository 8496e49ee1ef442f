"""impl="triton": what `svf_linear` calls. This file imports without Triton; a function that runs a kernel imports it.

Dtypes. Products are made in x's dtype, sums in fp32, `scale` is multiplied in fp32, one rounding each for g and for y. int8 factors convert to
x's dtype exactly. fp16 factors with bf16 x: the products are made in fp16, x and g times 2^-5, the sum times 2^5, so that nothing below 65504 *
32, about 2e6, overflows; of an x or g under 2^-9 the last bits are lost (an error of 2^-20 at the most). bf16 factors with fp16 x convert to
fp16; any factors with fp32 x convert to fp32, without tf32. A row of `scale` that is zero returns base bit for bit.

Factors are read along their contiguous size: V as the view of a contiguous Vᵀ [C, N], U_i contiguous [M_i, C_i]; others are copied first.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from t2kernels.ops.impls import torch_kernels


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run for tensors on a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 't2kernels[gpu]'"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton needs a GPU; tensors on the CPU run only in its interpreter, for tests (TRITON_INTERPRET=1)"
        return None
    if device.type != "cuda":
        return f"the Triton kernels are written for NVIDIA GPUs, not for {device.type}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here"
    if torch.version.hip:
        return "the Triton kernels are written for NVIDIA GPUs, and this torch is built for AMD"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: Triton runs on the CPU only"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0 (A100) or later; {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return None


def forward_pair(x, V, Us, scale, expert_ids, bases, biases, tiles=None) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i, each [..., M_i], as two launches; for T up to about 200.

    tiles: (shrink's, expand's) `tuning.Tiles`, where the choice is not to be `tuning.tiles`'. The rest as in `svf_linear_group`, with at most
    four members, and factors in x's dtype, in another float or in int8.
    """
    from .pair import forward_pair

    return forward_pair(x, V, Us, scale, expert_ids, bases, biases, tiles)


def forward_swiglu(x, V, Us, scale, expert_ids, bases, biases, tiles=None) -> Tensor:
    """silu(y_gate) * y_up, [..., M], for two members U = [U_gate, U_up] of one M; else as `forward_pair`.

    y_gate, y_up and silu(y_gate) are rounded to x's dtype, as they would be by separate ops, so that fusing changes no bit but those in which
    two exponential functions differ.
    """
    from .pair import forward_swiglu

    return forward_swiglu(x, V, Us, scale, expert_ids, bases, biases, tiles)


def shrink(x, V, scale, expert_ids) -> Tensor:
    """g = (x V) * scale[expert_ids], [T, C]: the first half of `forward_pair`, for a base product that another library makes meanwhile."""
    from .pair import shrink

    return shrink(x, V, scale, expert_ids)


def shrink_mm(x, V, scale, expert_ids) -> Tensor:
    """`shrink` for many tokens: torch.mm and one pass of `scale_rows`."""
    from .matmul import row_scaling

    return torch_kernels.shrink(x, V, scale, expert_ids, scale_rows=row_scaling)[0]


def expand(g, Us, bases, biases, dtype=None) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i, each [T, M_i]: the second half. dtype: x's, where neither a base nor a bias tells it."""
    from .pair import expand

    return expand(g, Us, bases, biases, dtype)


def forward_mm(x, V, Us, scale, expert_ids, bases, biases, need_h=False) -> tuple[list[Tensor], Tensor | None]:
    """(y_i, h): as `forward_pair` for many tokens, with the two products by torch.mm and one pass of `scale_rows` between them.

    Factors in int8 or in another float than x's are converted whole before the product, except fp16 factors with bf16 x, where x is.
    h: x V as `backward` takes it, or None where need_h is False.
    """
    from .matmul import row_scaling

    return torch_kernels.forward(x, V, Us, scale, expert_ids, bases, biases, need_h, row_scaling)


def scale_rows(h, scale, expert_ids, repeat, out=None) -> Tensor:
    """g[t] = h[t] * scale[expert_ids[t // repeat]] for h [T, C], multiplied in fp32, in h's dtype. out: where to, h itself too."""
    from .backward import scale_rows

    return scale_rows(h, scale, expert_ids, repeat, out)


def segments(expert_ids, E):
    """The order of the tokens by expert that `backward` needs: made on the device, without a sync, once for all layers of a step."""
    from .backward import segments

    return segments(expert_ids, E)


def backward(
    dys, x, V, Us, scale, expert_ids, need_dx, need_dscale, h=None, deterministic=True, segments=None
) -> tuple[Tensor, Tensor]:
    """p = dy U;  dx = (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of (x V) * p, [E, C] fp32. Not needed: empty [0].

    h: what `forward_mm` returned, else x V is made again. Products of gradients are made in x's dtype, whatever the factors'.
    deterministic: the same bits in every run, in any order of tokens the same to fp32 rounding; False: fp32 atomics, no sort.
    segments: what `segments` returned for these expert_ids, else they are sorted here. An expert without tokens gets exactly 0.
    """
    from .matmul import backward

    return backward(dys, x, V, Us, scale, expert_ids, need_dx, need_dscale, h, deterministic, segments)
