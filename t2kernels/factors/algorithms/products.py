"""Products of full precision, and fixed patterns of signs."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B of fp32 or fp64 matrices, in A's dtype, with no fewer bits under any global setting.

    Autocast and `torch.set_float32_matmul_precision` make an fp32 product of fewer bits. They leave fp64 alone.
    """
    narrow = torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled(A.device.type)
    if not narrow or A.device.type == "mps":
        return A @ B
    return (A.double() @ B.double()).to(A.dtype)


def signs(n: int, seed: int) -> Tensor:
    """[n] of +1 and -1: one bit of a 32-bit integer hash of (position, seed), the same on every machine."""
    h = torch.arange(n, dtype=torch.int64, device="cpu") + seed * 0x9E3779B1
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the "lowbias32" mixing constants
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return 1 - 2 * ((h >> 16) & 1)
