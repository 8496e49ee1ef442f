"""Products of full precision, and fixed patterns of signs."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import fits, product

ROWS: int = 1024  # of A that are in fp64 at a time


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B of fp32 or fp64 matrices, in A's dtype, with no fewer bits under any global setting.

    Autocast and `torch.set_float32_matmul_precision` make an fp32 product of fewer bits. They leave fp64 alone.
    """
    narrow = torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled(A.device.type)
    if not narrow or A.device.type == "mps":
        return A @ B
    return (A.double() @ B.double()).to(A.dtype)


def large(A: Tensor, B: Tensor) -> Tensor:
    """`matmul` of large matrices on their way to components: by the compiled product, where this machine has it."""
    return product(A, B.t()) if A.dtype != torch.bfloat16 and fits(A, B) else matmul(A, B)


def both(X: Tensor, A: Tensor, Y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X Aᵀ [p, M] and Y A [p, N] in fp64 of X [p, N] and Y [p, M], both fp64, for A [M, N] in any dtype.

    Y: None is X Aᵀ. A is widened a part at a time, and read once.
    """
    if fits(X, A):
        B = product(X, A)
        return B, product(B if Y is None else Y, A.t())
    B, C = X.new_empty(X.shape[0], A.shape[0]), torch.zeros_like(X)
    wide = X.new_empty(min(ROWS, A.shape[0]), A.shape[1])  # new memory for each part would cost more than the product
    for at in range(0, A.shape[0], ROWS):
        part = A[at : at + ROWS]
        rows = wide[: part.shape[0]].copy_(part)
        B[:, at : at + ROWS] = X @ rows.t()
        C.addmm_((B if Y is None else Y)[:, at : at + ROWS], rows)
    return B, C


def signs(n: int, seed: int) -> Tensor:
    """[n] of +1 and -1: one bit of a 32-bit integer hash of (position, seed), the same on every machine."""
    h = torch.arange(n, dtype=torch.int64, device="cpu") + seed * 0x9E3779B1
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the "lowbias32" mixing constants
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return 1 - 2 * ((h >> 16) & 1)
