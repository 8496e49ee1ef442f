"""`Int8Factor`: frozen factors in int8. `fold` holds the quantisation steps; the op's `scale` includes them.

    W = Σ_c fold_c sigma_s(c) u_c v_cᵀ,  s = source        u_c [M], v_c [N] int8

Each component has a main column. The few components with a large rounding error have up to two *residual columns* too:
(V, U_lo) and (V_lo, U) hold the rounding errors of U and V, again in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linalg import matmul

LEVELS: int = 127  # -127 ... 127: symmetric, so that no zero point is needed
ALIGN: int = 16  # columns: each row of U then begins at a multiple of 16 bytes, the widest load of a GPU thread


class Int8Factor(NamedTuple):
    """Columns of one matrix W, or of its leading components: R main columns first, then residual columns.

    U: [M, C] int8
    sigma: [R] fp32, descending, as it was before rounding
    V: [N, C] int8; a view of contiguous Vᵀ [C, N]
    source: [C] int64, the component of each column
    fold: [C] fp32, (step of the U column) * (step of the V column); 0 in padding columns
    runs: column layout (R, n1, n2, pad): R main columns, first residual columns, second residual columns, padding up to
        ALIGN. `source` ascends within each run
    """

    U: Tensor
    sigma: Tensor
    V: Tensor
    source: Tensor
    fold: Tensor
    runs: tuple[int, ...]

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.sigma.shape[-1]

    def columns(self, row: Tensor) -> Tensor:
        """Turn numbers for components [..., R] into numbers for columns: fold * row[source], [..., C]."""
        return spread(row, self.source, self.fold, self.runs)

    def cut(self, rank: int) -> Int8Factor:
        """The leading `rank` components with their residual columns."""
        if rank >= self.rank:
            return self
        U, V, source, fold = self.U, self.V, self.source, self.fold
        kept = kept_columns(source, fold, self.runs, rank)
        take = lambda t, dim=0: torch.cat([t.narrow(dim, a, b - a) for a, b in kept], dim)  # noqa: E731
        runs = tuple(b - a for a, b in kept)
        return Int8Factor(take(U, 1), self.sigma[:rank], take(V.t()).t(), take(source), take(fold), runs).aligned()

    def aligned(self) -> Int8Factor:
        """The same with columns of zeros up to a multiple of ALIGN."""
        return self.widened((*self.runs, -sum(self.runs) % ALIGN))

    def widened(self, runs: Sequence[int]) -> Int8Factor:
        """The same with columns of zeros at the end of each run. runs: the new lengths, none shorter than before."""
        have = (*self.runs, *[0] * (len(runs) - len(self.runs)))
        if tuple(have) == tuple(runs):
            return self._replace(runs=tuple(runs))
        fill = lambda t, dim: torch.cat(  # noqa: E731
            [
                pad(p, (0, 0) * (t.dim() - 1 - dim) + (0, b - a))
                for p, a, b in zip(t.split(have, dim), have, runs, strict=True)
            ],
            dim,
        )
        return Int8Factor(
            fill(self.U, 1), self.sigma, fill(self.V.t(), 0).t(), fill(self.source, 0), fill(self.fold, 0), tuple(runs)
        )

    def to(self, device: torch.device | str) -> Int8Factor:
        """The same on another device; dtypes stay."""
        tensors = (t.to(device) for t in (self.U, self.sigma, self.V.t(), self.source, self.fold))
        U, sigma, Vt, source, fold = tensors
        return Int8Factor(U, sigma, Vt.t(), source, fold, self.runs)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored and hashed, by the names that they have in a file."""
        return {"U": self.U, "sigma": self.sigma, "Vt": self.V.t(), "source": self.source, "fold": self.fold}

    def dense(self, z: Tensor | None = None) -> Tensor:
        """The matrix [M, N] in fp32, with its components scaled by z [R] (None: all ones)."""
        scale = self.sigma if z is None else self.sigma * z.to(self.sigma)
        return matmul(self.U.float() * self.columns(scale), self.V.float().t())


def stack(factors: Sequence[Int8Factor]) -> Int8Factor:
    """Factors of X equally shaped matrices as one, with a leading X in every tensor: U [X, M, C], V [X, N, C]."""
    depth = max(len(f.runs) for f in factors)
    lengths = [(*f.runs, *[0] * (depth - len(f.runs))) for f in factors]
    runs = [max(n) for n in zip(*lengths, strict=True)]
    runs.append(-sum(runs) % ALIGN)
    wide = [f.widened(runs) for f in factors]
    U, sigma, Vt, source, fold = (
        torch.stack(t) for t in zip(*[(f.U, f.sigma, f.V.t(), f.source, f.fold) for f in wide], strict=True)
    )
    return Int8Factor(U, sigma, Vt.mT, source, fold, tuple(runs))


def kept_columns(source: Tensor, fold: Tensor, runs: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """The columns of the leading `rank` components as ranges (start, stop), one for each run that has any."""
    kept: list[tuple[int, int]] = []
    start = 0
    for length in runs:
        run = slice(start, start + length)
        count = int(((source[run] < rank) & (fold[run] != 0)).sum())
        if count:
            kept.append((start, start + count))
        start += length
    return kept


def spread(row: Tensor, source: Tensor, fold: Tensor, runs: Sequence[int]) -> Tensor:
    """fold * row[source]: numbers for columns [..., C] from row [..., R]. Differentiable in row.

    Run by run: a run holds a component once (padding apart), so the backward adds in the same order on every device.
    """
    parts = [row.gather(-1, s.expand(*row.shape[:-1], s.shape[-1])) for s in source.split(list(runs), -1)]
    return torch.cat(parts, -1) * fold


def round_columns(X: Tensor) -> tuple[Tensor, Tensor]:
    """Round X [L, C] to integers of at most LEVELS, in X's dtype.

    Returns them and the step of each column [C], 1 for a column of zeros.
    """
    step = X.abs().amax(0) / LEVELS
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (X / step).round_().clamp_(-LEVELS, LEVELS), step
