"""The singular value decomposition behind the factors: fp64, from the Gram matrix of the smaller side, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Singular vectors of a pair move by (backward error)/(gap). Among 4096 singular values the closest pair is about 1e-6 sigma_1 apart, where
# an fp32 SVD (error 1e-6) picks any basis; fp64 picks the same one on every machine. In fp64 the eigenvectors of AᵀA cost less than
# LAPACK's SVD in either precision, and lose nothing that fp32 factors could hold: the squared condition number of a trained weight is far
# below 1e16.
# Seconds on two CPU cores (torch 2.13, scipy 1.17), R = 4096, k leading components; residual max||A v - sigma u|| / sigma_1; a power law
# sigma_i = i^-0.5, and 64 spikes on a flat random bulk, which is what trained weights look like:
#                                        k     power law       spiked bulk
#   this, 4096 x 4096                   any    7.0 s  1e-14    6.9 s  3e-15
#   torch.linalg.svd fp32               any    7.7 s  2e-6     7.7 s  1e-6
#   torch.linalg.svd fp64               any   14.1 s  2e-15      -
#   svd_lowrank, 12 iterations, q = 2k  256    3.1 s  7e-6     3.1 s  2e-3  (vectors up to 0.6 off in 1 - cos)
#   scipy propack fp32                  256  1.8-8 s  2e-6     4.0 s  2e-6
#   scipy propack fp64                  256    4.4 s  1e-10    8.0 s  5e-11
#   scipy propack fp32 / fp64          1024  18 / 76 s           -
# For 4096 x 14336: 17 CPU seconds (k = 256) and 30 (all), 2 GiB, measured on a machine that was busy with other work.
# For 1024 x 4096: 0.26 s against 0.83 s (fp32 SVD), 0.35 to 2.5 s (svd_lowrank), 0.5 s (propack), 1.9 s (arpack).
# So one routine serves every rank, is deterministic, needs no iteration count, and runs in threads; a small k saves products, not eigh.

TOLERANCE = 1e-7  # of residual and of orthogonality; fp32 rounds a component by as much
CHECKED = 64  # orthogonality is lost first among the smallest singular values, so the last columns show it
PROBES = 16


class SVD(NamedTuple):
    """U [M, k], sigma [k] descending, Vt [k, N], all fp64; how they were found, and the `residual` that was reached."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor
    algorithm: str
    residual: float


def svd(A: Tensor, k: int) -> SVD:
    """The k leading components of a finite A [M, N], on A's device (CPU where that has no fp64).

    Where the Gram matrix does not give TOLERANCE (rank-deficient or zero A), LAPACK's or cuSOLVER's full SVD in fp64 takes over.
    """
    A = (A.cpu() if A.device.type == "mps" else A).double()
    if A.shape[0] < A.shape[1]:
        V, sigma, Ut, algorithm, reached = _tall(A.t(), k)
        return SVD(Ut.t(), sigma, V.t(), algorithm, reached)
    return _tall(A, k)


def residual(A: Tensor, U: Tensor, sigma: Tensor, Vt: Tensor) -> float:
    """How far from singular triplets: the larger of ||A V - U diag(sigma)|| and ||Aᵀ U - V diag(sigma)||, Frobenius, over sigma_1.

    Estimated on 16 fixed +-1 combinations of the components (within a third of it), which costs as much as 16 components, not k;
    no single component is off by more than the whole.
    """
    probes = torch.stack([signs(sigma.numel(), 3 + i) for i in range(PROBES)], 1).to(A)  # [k, PROBES]
    weighted = sigma[:, None] * probes
    left = A @ (Vt.t() @ probes) - U @ weighted
    right = A.t() @ (U @ probes) - Vt.t() @ weighted
    return (torch.maximum(left.norm(), right.norm()) / PROBES**0.5 / sigma[0].clamp_min(torch.finfo(A.dtype).tiny)).item()


def signs(n: int, seed: int) -> Tensor:
    """[n] of +1 and -1: one bit of a 32-bit integer hash of (position, seed), the same on every machine."""
    h = torch.arange(n, dtype=torch.int64) + seed * 0x9E3779B1
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the "lowbias32" mixing constants
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return 1 - 2 * ((h >> 16) & 1)


def _tall(A: Tensor, k: int) -> SVD:
    found = _from_gram(A, k)
    if found is not None and (reached := residual(A, *found)) <= TOLERANCE:
        return SVD(*found, "gram-eigh-fp64", reached)
    U, sigma, Vt = torch.linalg.svd(A, full_matrices=False)
    U, sigma, Vt = U[:, :k], sigma[:k], Vt[:k]
    return SVD(U, sigma, Vt, "svd-fp64", residual(A, U, sigma, Vt))


def _from_gram(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where eigh does not converge, or sigma is too small against sigma_1 for U = A V / sigma to have orthogonal columns."""
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
