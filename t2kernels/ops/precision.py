"""In which precision the products of `svf_linear` run when x and the factors have different dtypes, and how overflow is kept out.

int8 factors carry no scale of their own: it stands in `scale`, so that turning them into floats is a plain conversion, and exact.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

X_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


class Precision(NamedTuple):
    """dtype: of both products. x, V, scale, y: powers of two that x, V, the scale and the result are multiplied by; their product is 1."""

    dtype: torch.dtype
    x: float = 1.0
    V: float = 1.0
    scale: float = 1.0
    y: float = 1.0


@functools.cache
def forward_precision(x: torch.dtype, factors: torch.dtype) -> Precision:
    """How y = ((x V) * scale) Uᵀ is computed.

    fp32 and fp64 inputs: in their own dtype. int8 factors: in x's. bf16 with bf16: in bf16. Where either is fp16: in fp16, whose largest number
    is 65504: a bf16 x is divided by 32, so that x, x V and the scaled product may reach 2e6; int8 V is divided by 2048, because its columns,
    with a largest entry of 127, are up to 127 sqrt(N) / 4 long where those of V have length 1.
    """
    if x in (torch.float32, torch.float64):
        return Precision(x)
    if x == torch.bfloat16:
        return Precision(torch.float16, x=2.0**-5, y=2.0**5) if factors == torch.float16 else Precision(x)
    return Precision(x, V=2.0**-11, scale=2.0**11) if factors == torch.int8 else Precision(x)


@functools.cache
def backward_precision(x: torch.dtype, factors: torch.dtype) -> Precision:
    """How p = dy U and dx = (p * scale) Vᵀ are computed; here V stands for U. In x's dtype: a bf16 gradient may be far smaller than fp16 can hold.

    int8 U is divided by 64 only, because gradients are small: over 4096 rows p is then about 30 dy, which holds from dy = 2e-6 to 2000.
    """
    return Precision(x, V=2.0**-6, scale=2.0**6) if (x, factors) == (torch.float16, torch.int8) else Precision(x)
