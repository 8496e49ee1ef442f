"""AᵀA to fp32's accuracy, and products with A to 2e-6, from bf16 products where the CPU has them.

The compiled products (`compiled`) are taken where they are; torch's otherwise, in which bf16 products are rounded to
bf16, and a second one brings what that left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import fits, product
from .products import matmul

TILE: int = 512  # columns of A whose products with those right of them are one call
ROWS: int = 4096  # of A that are widened at a time


def halves(A: Tensor) -> bool:
    """Whether products are of bf16 numbers: A is in bf16 on a CPU with instructions for it.

    bf16 products of one core of an AMD EPYC with AVX512-BF16 do 430e9 operations a second, fp32 95e9 (torch 2.13).
    """
    if A.dtype != torch.bfloat16 or A.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def gram(A: Tensor) -> Tensor:
    """G = AᵀA [N, N] in fp32 of A [M, N]; each number is off by about 2e-6 of itself. One triangle is computed."""
    N = A.shape[1]
    G = torch.empty(N, N, dtype=torch.float32, device=A.device)
    narrow = A if A.dtype == torch.bfloat16 and (fits(A, A) or halves(A)) else A.float()
    if fits(narrow, narrow):
        product(narrow.t(), narrow.t(), G, upper=True)
        for at in range(0, N, TILE):
            end = min(at + TILE, N)
            corner = G[at:end, at:end].triu()
            G[at:end, at:end] = corner + corner.triu(1).t()
            G[end:, at:end] = G[at:end, end:].t()
        return G
    rows = narrow.t().contiguous() if halves(A) else narrow.t()  # [N, M]
    for at in range(0, N, TILE):
        end = min(at + TILE, N)
        G[at:end, at:] = _product(rows[at:end], rows[at:])
        G[end:, at:end] = G[at:end, end:].t()
    return G


def times(X: Tensor, A: Tensor) -> Tensor:
    """X Aᵀ [p, M] in fp32, to about 4e-6 of |X| |A|, of fp32 X [p, N]."""
    if fits(X, A):
        return product(X, A)
    if not halves(A):
        return torch.cat([matmul(X, a.float().t()) for a in A.split(ROWS)], 1)
    unit = X.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    X = X / unit
    high = X.bfloat16()
    return (_product(high, A) + ((X - high).bfloat16() @ A.t()).float()) * unit


def _product(X: Tensor, Y: Tensor) -> Tensor:
    """X Yᵀ in fp32. bf16 products are summed in fp32 and rounded; a second one brings what rounding left."""
    if X.dtype == torch.float32:
        return matmul(X, Y.t())
    with torch.autocast(X.device.type, enabled=False):
        high = X @ Y.t()
        return high.float() + torch.addmm(high, X, Y.t(), beta=-1).float()
