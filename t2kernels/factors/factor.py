"""`Factor`: U, sigma and V of one matrix, W = U diag(sigma) Vᵀ, how it is computed from W, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels import InputError, T2Error

from . import linalg
from .int8 import Int8Factor, kept_columns


class TooLarge(T2Error, ValueError):
    """A matrix whose singular values do not fit fp32."""


class Factor(NamedTuple):
    """W = U diag(sigma) Vᵀ, or its leading components.

    U: [M, R] left singular vectors, as columns
    sigma: [R] fp32, descending
    V: [N, R] right singular vectors, as columns; a view of contiguous Vᵀ [R, N]
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.sigma.numel()

    def cut(self, rank: int) -> Factor:
        """The leading `rank` components, as views."""
        return Factor(self.U[:, :rank], self.sigma[:rank], self.V[:, :rank])

    def to(self, *args: Any, **kwargs: Any) -> Factor:
        """Apply `Tensor.to` to U and V. sigma follows the device and stays fp32."""
        U, V = self.U.to(*args, **kwargs), self.V.t().to(*args, **kwargs).t()
        return Factor(U, self.sigma.to(U.device), V)

    def columns(self, row: Tensor) -> Tensor:
        """Numbers for columns from numbers for components [..., R]: the same. `Int8Factor` has more columns."""
        return row

    def dense(self, z: Tensor | None = None) -> Tensor:
        """U diag(sigma * z) Vᵀ [M, N] in fp32 or better. z: [R]; None: all ones."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        scale = self.sigma if z is None else self.sigma * z.to(self.sigma.device)
        return linalg.matmul(self.U.to(dtype) * scale.to(dtype), self.V.to(dtype).t())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored and hashed, by the names that they have in a file."""
        return {"U": self.U, "sigma": self.sigma, "Vt": self.V.t()}


def resolve_rank(rank: int | float | None, R: int) -> int:
    """Turn a rank argument into a number of components of R.

    rank: an int: that many, at most R; a float in (0, 1): that fraction, at least 1; None: all
    Raises ValueError for anything else.
    """
    if rank is None:
        return R
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise InputError(
            f"rank={rank!r}: wanted an int (components), a float in (0, 1) (a fraction of them) or None (all)"
        )
    if isinstance(rank, int):
        if rank < 1:
            raise InputError(f"rank={rank}: wanted at least 1 component, or None for all")
        return min(rank, R)
    if not 0 < rank < 1:
        raise InputError(
            f"rank={rank}: a float is a fraction in (0, 1); use an int for a number of components, None for all"
        )
    return max(1, int(rank * R + 1e-9))  # 0.29 * 100 is 28.999...


def svd(W: Tensor, rank: int | float | None = None) -> Factor:
    """Decompose W [M, N] = U diag(sigma) Vᵀ: in fp64 on W's device, returned in fp32.

    rank: as in `resolve_rank`: the leading components only
    Raises ValueError if W is not a finite floating-point matrix, or if its singular values do not fit fp32.
    """
    W = W.detach()
    if W.dim() != 2 or not W.is_floating_point() or 0 in W.shape:
        raise InputError(f"svd: wanted a floating-point matrix [M, N], got {W.dtype} {list(W.shape)}")
    if not torch.isfinite(W).all():
        raise InputError(f"svd: the matrix {list(W.shape)} holds NaN or infinity")
    return keep(linalg.svd(W, resolve_rank(rank, min(W.shape))))


def keep(found: linalg.SVD, dtype: torch.dtype = torch.float32) -> Factor:
    """Turn a decomposition into a `Factor`: U and V in `dtype`, sigma in fp32, U [M, R] and Vᵀ [R, N] contiguous.

    Raises ValueError if sigma is too large for fp32."""
    sigma = found.sigma.float()
    if not torch.isfinite(sigma).all():
        raise TooLarge(
            f"the largest singular value is {found.sigma[0].item():.3g}, more than fp32 holds (3.4e38); "
            "scale the weight first"
        )
    return Factor(found.U.to(dtype).contiguous(), sigma, found.Vt.to(dtype).contiguous().t())


def reconstruction_error(W: Tensor, factor: Factor | Int8Factor) -> float:
    """||W - U diag(sigma) Vᵀ|| / ||W||, Frobenius. For W = 0 the absolute error."""
    wide = torch.float32 if W.device.type == "mps" else torch.float64
    # Rows in blocks: the difference is never held whole in fp64.
    scaled, off, total = factor.V.float() * factor.columns(factor.sigma), 0.0, 0.0
    for rows, u in zip(W.split(1024), factor.U.split(1024), strict=True):
        off += (rows.float() - linalg.matmul(u.float(), scaled.t())).to(wide).square().sum().item()
        total += rows.to(wide).square().sum().item()
    return (off / total) ** 0.5 if total else off**0.5


def read_factor(f: Any, name: str, record: Mapping[str, Any], rank: int) -> Factor | Int8Factor:
    """The leading components of a matrix from its open safetensors file.

    record: of the matrix, in the manifest
    rank: how many components
    """
    U, sigma, Vt = (f.get_slice(f"{name}.{part}") for part in ("U", "sigma", "Vt"))
    if "runs" not in record:
        return Factor(U[:, :rank], sigma[:rank], Vt[:rank].t())
    source, fold = f.get_tensor(f"{name}.source"), f.get_tensor(f"{name}.fold")
    if rank == record["rank"]:
        return Int8Factor(U[:], sigma[:], Vt[:].t(), source, fold, tuple(record["runs"]))
    kept = [slice(*ab) for ab in kept_columns(source, fold, record["runs"], rank)]
    U, Vt = torch.cat([U[:, s] for s in kept], 1), torch.cat([Vt[s] for s in kept])
    source, fold = (torch.cat([t[s] for s in kept]) for t in (source, fold))
    return Int8Factor(U, sigma[:rank], Vt.t(), source, fold, tuple(s.stop - s.start for s in kept)).aligned()
