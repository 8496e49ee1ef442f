"""Products of large matrices in wide sums, by the compiled extension: csrc/cpu/products.h."""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels.ops.impls import extension

SUMS: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}
"""X's dtype, and what sums it: bf16 products in fp32, fp32 and fp64 ones in themselves."""
NUMBERS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def fits(X: Tensor, Y: Tensor) -> bool:
    """Whether `product` takes X and Y on this machine."""
    if X.device.type != "cpu" or Y.device.type != "cpu" or X.dtype not in SUMS:
        return False
    if Y.dtype not in NUMBERS or Y.dtype.itemsize > X.dtype.itemsize:
        return False
    return extension.unsupported() is None and extension.load().cpu_can_multiply(SUMS[X.dtype])


def product(X: Tensor, Y: Tensor, out: Tensor | None = None, add: bool = False, upper: bool = False) -> Tensor:
    """X Yᵀ [p, n], summed in X's dtype, in fp32 of bf16; Y is not rounded. No global setting makes it narrower.

    X: [p, K] bf16, fp32 or fp64, of any strides; Y: [n, K] of X's dtype, or narrower
    out: [p, n] of contiguous rows: where to; add: to what is there
    upper: X is Y, and only what is on and above the diagonal is wanted; the rest of `out` is undefined

    Call it if X and Y `fit`.
    """
    (p, K), n = X.shape, Y.shape[0]
    if out is None:
        out = torch.empty(p, n, dtype=torch.float32 if X.dtype == torch.bfloat16 else X.dtype)
    x, y = ((t.data_ptr(), NUMBERS[t.dtype], *(t.shape[0], *t.stride())) for t in (X, Y))
    threads = torch.get_num_threads()
    extension.load().cpu_multiply(SUMS[X.dtype], x, y, K, out.data_ptr(), out.stride(0), add, upper, threads)
    return out
