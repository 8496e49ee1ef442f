"""The singular value decomposition behind the factors: in fp64 and checked; the algorithm depends on size and rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .algorithms.leading import leading, pays
from .algorithms.products import both, matmul, signs

__all__ = ["CHECKED", "PROBES", "SAFE", "SVD", "TOLERANCE", "matmul", "residual", "signs", "svd"]

# Why fp64: singular vectors of a pair move by (backward error) / (gap). Among 4096 singular values the closest pair is
# about 1e-6 sigma_1 apart, so an fp32 SVD (error 1e-6) returns any basis of the pair, and fp64 the same one on every
# machine. Sketches (order 1) of 1024 components of random bf16 weights: LAPACK in fp64 moves none by more than 1e-5, in
# fp32 some by 8e-3.
# Why the Gram matrix: eigenvectors of AᵀA square the condition number. fp32 factors lose nothing by that while sigma_R
# is above about 1e-6 sigma_1; below, the check in `_tall` hands over to LAPACK.
# Seconds on one CPU thread (torch 2.13), random matrices, all components (in brackets: R/16 of them):
#                  this          LAPACK fp32   LAPACK fp64
#   1024 x 4096    0.6  (0.35)   1.5           2.3
#   2048 x 2048    2.0  (1.6)    2.0           4.4
#   4096 x 4096   14.6 (12.4)   14.9
# The k = 256 leading components of 4096 x 4096 on two threads, with residual max||A v - sigma u|| / sigma_1. Power law:
# sigma_i = i^-0.5. Spiked bulk: 64 spikes on a flat random bulk, as trained weights have. (scipy 1.17)
#                                         power law        spiked bulk
#   this                                  7.0 s  1e-14     6.9 s  3e-15
#   svd_lowrank, 12 iterations, q = 2k    3.1 s  7e-6      3.1 s  2e-3, vectors off by up to 0.6 in 1 - cos
#   scipy propack fp32                  1.8-8 s  2e-6      4.0 s  2e-6
#   scipy propack fp64                    4.4 s  1e-10     8.0 s  5e-11
# propack is twice as fast at a small k, and slower at k = 1024 (18 s in fp32, 76 s in fp64).
# `algorithms.leading` answers where k <= R/5 and R >= 1024. CPU seconds of two threads with AVX512-BF16, bf16 weights,
# 256 components, in brackets the exact path beside it: power law 4096 x 4096 1.8 (19.6), 14336 x 4096 3.0 (24.1).

TOLERANCE: float = 1e-7  # of residual and of orthogonality; fp32 rounds a component by as much
CHECKED: int = 64  # the last columns: orthogonality is lost first among the smallest singular values
PROBES: int = 16
SAFE: int = 300  # entries between 2^-SAFE and 2^SAFE have sums of squares in fp64


class SVD(NamedTuple):
    """A = U diag(sigma) Vt.

    U: [M, k], sigma: [k] descending, Vt: [k, N], all fp64
    algorithm: "block-lanczos-fp64", "gram-eigh-fp64" or "svd-fp64"
    residual: over sigma_1, Frobenius, as `residual` computes it
    """

    U: Tensor
    sigma: Tensor
    Vt: Tensor
    algorithm: str
    residual: float


def svd(A: Tensor, k: int) -> SVD:
    """The k leading components of a finite A [M, N], on A's device (on the CPU if the device has no fp64).

    Few components of a large matrix come from block Lanczos (`algorithms.leading`), all others from the Gram matrix of
    the smaller side. If that does not reach TOLERANCE (rank-deficient or zero A), LAPACK's or cuSOLVER's full SVD in
    fp64 is used.
    """
    A = A.cpu() if A.device.type == "mps" else A
    if pays(*A.shape, k) and (found := _leading(A, k)) is not None:
        return found
    A = A.double()
    largest = A.abs().max().item()
    if largest and not 2.0**-SAFE < largest < 2.0**SAFE:  # its squares would overflow, or vanish
        unit = 2.0 ** (math.frexp(largest)[1] - 1)  # a power of two: dividing by it is exact
        found = svd(A / unit, k)
        return found._replace(sigma=found.sigma * unit)
    if A.shape[0] < A.shape[1]:
        V, sigma, Ut, algorithm, reached = _tall(A.t(), k)
        return SVD(Ut.t(), sigma, V.t(), algorithm, reached)
    return _tall(A, k)


def residual(A: Tensor, U: Tensor, sigma: Tensor, Vt: Tensor) -> float:
    """Error of singular triplets: max(||A V - U diag(sigma)||, ||Aᵀ U - V diag(sigma)||) / sigma_1, Frobenius.

    Estimated, to within a third, on 16 fixed +-1 combinations of the components: the cost of 16 components, not k. No
    single component is off by more than the result.
    """
    probes = torch.stack([signs(sigma.numel(), 3 + i) for i in range(PROBES)]).to(U)  # [PROBES, k]
    weighted = probes * sigma
    inward, outward = probes @ Vt, probes @ U.t()
    left, right = both(inward, A, outward)
    left, right = left - weighted @ U.t(), right - weighted @ Vt
    return (
        torch.maximum(left.norm(), right.norm()) / PROBES**0.5 / sigma[0].clamp_min(torch.finfo(U.dtype).tiny)
    ).item()


def _leading(A: Tensor, k: int) -> SVD | None:
    """The components by block Lanczos; None if they are not found, or not to TOLERANCE."""
    largest = A.abs().max().item()
    if not largest:
        return None
    unit = 2.0 ** (math.frexp(largest)[1] - 1)  # a power of two: dividing by it is exact
    if not 2.0**-20 < unit < 2.0**10:  # fp32 sums of squares would overflow, or vanish
        A = A.double() / unit
    else:
        unit = 1.0
    wide = A.shape[0] < A.shape[1]
    A = (A.t() if wide else A).contiguous()
    found = leading(A, k)
    if found is None or not (reached := residual(A, *found[:3])) <= TOLERANCE:
        return None
    U, sigma, Vt, _ = found
    return SVD(*((Vt.t(), sigma * unit, U.t()) if wide else (U, sigma * unit, Vt)), "block-lanczos-fp64", reached)


def _tall(A: Tensor, k: int) -> SVD:
    found = _from_gram(A, k)
    if found is not None and (reached := residual(A, *found)) <= TOLERANCE:
        return SVD(*found, "gram-eigh-fp64", reached)
    U, sigma, Vt = torch.linalg.svd(A, full_matrices=False)
    U, sigma, Vt = U[:, :k], sigma[:k], Vt[:k]
    return SVD(U, sigma, Vt, "svd-fp64", residual(A, U, sigma, Vt))


def _from_gram(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, sigma, Vt from AᵀA; None if eigh fails, or if sigma is too small for an orthogonal U = A V / sigma."""
    try:
        _, V = torch.linalg.eigh(A.t() @ A)
    except torch.linalg.LinAlgError:
        return None
    V = V.flip(1)[:, :k]
    AV = A @ V
    sigma = AV.norm(dim=0)
    sigma, order = sigma.sort(descending=True, stable=True)
    if not sigma[-1] > 1e-12 * sigma[0]:
        return None
    U, V = AV[:, order] / sigma, V[:, order]
    last = U[:, -CHECKED:].t() @ U
    last[:, -CHECKED:] -= torch.eye(last.shape[0], dtype=U.dtype, device=U.device)
    if not last.abs().max() <= TOLERANCE:
        return None
    return U, sigma, V.t()
