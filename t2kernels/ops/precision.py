"""The precision of the products of `svf_linear` for all dtypes of x and of the factors, and headroom against overflow.

int8 factors have no scale of their own: it is part of `scale`. Converting them to floats is therefore exact.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

X_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


class Precision(NamedTuple):
    """How two products are computed.

    dtype: of both products
    x, V, scale, y: powers of two that x, V, the scale and the result are multiplied by. Their product is 1.
    """

    dtype: torch.dtype
    x: float = 1.0
    V: float = 1.0
    scale: float = 1.0
    y: float = 1.0


@functools.cache
def forward_precision(x: torch.dtype, factors: torch.dtype) -> Precision:
    """The precision of y = ((x V) * scale) Uᵀ, for the dtypes of x and of the factors.

    | x, factors | products |
    |---|---|
    | fp32 or fp64, any | in x's dtype |
    | any, int8 | in x's dtype |
    | bf16, bf16 | bf16 |
    | one of them fp16 | fp16 |

    The largest number of fp16 is 65504. A bf16 x is therefore divided by 32, so that x, x V and the scaled product may
    reach 2e6. int8 V is divided by 2048 for an fp16 x: its largest entry is 127, so its columns are up to 127 sqrt(N) /
    4 long, while those of V have length 1.
    """
    if x in (torch.float32, torch.float64):
        return Precision(x)
    if x == torch.bfloat16:
        return Precision(torch.float16, x=2.0**-5, y=2.0**5) if factors == torch.float16 else Precision(x)
    return Precision(x, V=2.0**-11, scale=2.0**11) if factors == torch.int8 else Precision(x)


@functools.cache
def backward_precision(x: torch.dtype, factors: torch.dtype) -> Precision:
    """The precision of p = dy U and dx = (p * scale) Vᵀ. The field V stands for U here.

    Products are in x's dtype, because a bf16 gradient may be far below the range of fp16. int8 U is divided by only 64
    for an fp16 x, because gradients are small: over 4096 rows p is then about 30 dy, which fits for dy from 2e-6 to
    2000.
    """
    return Precision(x, V=2.0**-6, scale=2.0**6) if (x, factors) == (torch.float16, torch.int8) else Precision(x)
