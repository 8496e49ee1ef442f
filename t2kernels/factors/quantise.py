"""int8 quantisation of factors: round one factor, refit the other by least squares, then add residual columns.

Rounding both factors independently costs sqrt(2) of what rounding W costs, and far more if singular vectors are spiky:
the step of a column is its largest entry / 127. Two measures bring the error down to that of rounding W. Neither costs
the kernel anything.

*Compensation.* Of U [M, R] and V [N, R] with R = min(M, N), one is square. It is rounded first: B̂ = B + F. The other
one, A, is then replaced by the least-squares solution of A' diag(sigma) B̂ᵀ = W and rounded. The solution is exact,
because B̂ spans everything. If z differs between components, sigma_r (z_r - z_s) (F_r · B_s) remains: nothing for
z = 1, in the mean 2 var(z) of the energy of F.

*Residual columns* (`int8`) go where they remove the most error. The energies of the rounding errors e and f in W are
sigma_r² (|e_r|², |f_r|²). They add up exactly, since the singular vectors of the other side are orthogonal.

Output errors on hidden states over those of int8 W with one step per row (36 linear layers of all-MiniLM-L6-v2), and
1 - cos of its embeddings, which is 4.3e-4 with int8 W (benchmarks/formats.py):

                                median   maximum   1 - cos
    independent rounding        1.7      11.5      6.0e-3
    compensated                 1.2       2.3      7.1e-4
    and 6 % residual columns    0.8       1.0      1.9e-4
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels import InputError

from .int8 import ALIGN, LEVELS, Int8Factor, round_columns
from .linalg import matmul

SPREAD: float = 0.25  # of z around 1: the experts of the built-in model have 0.10 to 0.35 in a matrix
# The error aimed at, times that of int8 W. At 1.1 MiniLM takes 2 % fewer columns, but the logits of the built-in model
# are further off than with int8 W.
ENOUGH: float = 1.0
INDEPENDENT: float = math.sqrt(2)  # the cost of two roundings in place of one, for vectors that are not spiky
MOST: int = 8  # at most R / 8 residual columns unless max_error asks for more
# A column with a rounding error above this share of its length is spiky (a Gaussian column of 4096 entries has 0.009).
# It gets a residual column, because compensation corrects it at z = 1 only: on MiniLM the largest output error with z
# of SPREAD fell from 1.5e-2 to 9e-3 for 1 % more columns.
SPIKY: float = 0.02
MEASURED: str = (
    f"||W(z) - W'(z)|| / ||W(z)||, Frobenius, root mean square over z = 1 +- {SPREAD}, of the kept components"
)


class Rounded(NamedTuple):
    """The result of `quantise`.

    factor: the int8 factors
    error: relative error of W as int8 factors (MEASURED)
    dense: relative error of W as an int8 matrix with one step per row
    residual: number of residual columns
    compensated: True if one factor was refitted to cancel the rounding error of the other
    """

    factor: Int8Factor
    error: float
    dense: float
    residual: int
    compensated: bool

    def record(self) -> dict[str, Any]:
        """The facts for a manifest."""
        facts = {"columns": len(self.factor.fold), "residual_columns": self.residual, "compensated": self.compensated}
        return facts | {"format_error": self.error, "dense_int8_error": self.dense, "measured": MEASURED}


def quantise(
    U: Tensor, sigma: Tensor, V: Tensor, max_error: float | None = None, compensate: bool | None = None
) -> Rounded:
    """W = U diag(sigma) Vᵀ in int8, with residual columns until the error is small enough.

    U: [M, R], sigma: [R], V: [N, R], floating point
    max_error: largest relative error (MEASURED). None: ENOUGH times that of an int8 W with one step per row (times
        sqrt(2) without compensation), with at most R / MOST residual columns
    compensate: None: if R = min(M, N). Must be False for the delta form: its rows sigma (z - 1) are 0 for unchanged
        components, which then cannot compensate

    Returns C columns, a multiple of ALIGN. Raises ValueError if max_error cannot be reached, with the error that can.
    """
    if max_error is not None and not max_error > 0:
        raise InputError(f"max_error={max_error}: wanted a positive relative error, such as 0.01, or None")
    U, sigma, V = U.float(), sigma.float(), V.float()
    (M, R), N = U.shape, V.shape[0]
    compensate = R == min(M, N) if compensate is None else compensate
    if compensate and R < min(M, N):
        raise InputError(f"compensation needs all {min(M, N)} components of the matrix {[M, N]}, got {R}")
    dense = _dense_int8_error(matmul(U * sigma, V.t()))
    limit = max_error or ENOUGH * dense * (1 if compensate else INDEPENDENT)
    most = 2 * R if max_error else -(-R // MOST)
    work = Rounding(V, sigma, U, compensate) if M >= N else Rounding(U, sigma, V, compensate)
    extra = _aligned(R, work.wanted(limit, most))
    while True:
        factor, error = work.build(extra)
        if error <= limit or extra >= most:
            break
        extra = _aligned(R, extra + 1)
    if max_error is not None and error > max_error:
        raise InputError(
            f"int8 factors of this {[M, N]} matrix reach {error:.2g} with every residual column, "
            f"not max_error={max_error:.2g}; allow more, or use another format"
        )
    if M < N:
        factor = factor._replace(U=factor.V.contiguous(), V=factor.U.t().contiguous().t())
    return Rounded(factor, error, dense, min(extra, 2 * R), compensate)


class Rounding:
    """Rounds W = second diag(sigma) firstᵀ: `first` [L1, R], then `second` [L2, R].

    compensate: refit `second` after `first` was rounded
    gain: [2 R] the squared error that a residual column removes: of `second` for each component, then of `first`
    spiky: [2 R] which columns need a residual column in any case
    order: [2 R] in which order residual columns are added
    """

    def __init__(self, first: Tensor, sigma: Tensor, second: Tensor, compensate: bool) -> None:
        self.first: Tensor = first
        self.sigma: Tensor = sigma
        self.second: Tensor = second
        self.compensate: bool = compensate
        self.W: Tensor = matmul(second * sigma, first.t())
        self.total: float = (1 + SPREAD**2) * sigma.double().square().sum().item()
        one = 1 + SPREAD**2
        f, _ = left_over(first)
        target = self.target(first - f)
        e, length = left_over(target)
        f2, e2, energy = f.square().sum(0), e.square().sum(0), sigma.square()
        self.gain: Tensor = torch.cat([one * energy * e2, (2 * SPREAD**2 if compensate else one) * energy * f2])
        self.spiky: Tensor = torch.cat([e2 > (SPIKY * length) ** 2, f2 > SPIKY**2])
        gain = self.gain.double()
        self.order: Tensor = torch.argsort(gain + self.spiky * 2 * gain.sum(), descending=True, stable=True)

    def wanted(self, limit: float, most: int) -> int:
        """Number of residual columns that brings the error to `limit` and covers every spiky column, at most `most`."""
        removed = self.gain.double()[self.order].cumsum(0)
        left = (removed[-1] - removed).clamp_min(0)
        enough = int((left > limit**2 * self.total).sum()) + 1 if removed[-1] > limit**2 * self.total else 0
        return min(most, max(enough, int(self.spiky.sum())))

    def build(self, extra: int) -> tuple[Int8Factor, float]:
        """Round with U = second, V = first and `extra` residual columns (padding if that is more than 2 R).

        Returns the factors and their error.
        """
        R, sigma = len(self.sigma), self.sigma
        chosen = self.order[:extra]
        of_second, of_first = chosen[chosen < R].sort().values, chosen[chosen >= R].sort().values - R
        b, b_step = round_columns(self.first)
        b_low, b_low_step = round_columns((self.first - b * b_step)[:, of_first])
        B = (b * b_step).index_add(1, of_first, b_low * b_low_step)
        target = self.target(B)
        a, a_step = round_columns(target)
        a_low, a_low_step = round_columns((target - a * a_step)[:, of_second])
        A = (a * a_step).index_add(1, of_second, a_low * a_low_step)
        source = torch.cat([of_second, of_first])
        columns = torch.cat([a_low, a[:, of_first]], 1), torch.cat([b[:, of_second], b_low], 1)
        fold = torch.cat([a_low_step * b_step[of_second], a_step[of_first] * b_low_step])
        # A component's first residual column goes into the first run, its second one into the second.
        source, by_source = source.sort(stable=True)
        again = torch.zeros_like(source, dtype=torch.bool)
        again[1:] = source[1:] == source[:-1]
        place = torch.cat([by_source[~again], by_source[again]])
        runs = R, int((~again).sum()), int(again.sum())
        factor = Int8Factor(
            torch.cat([a, columns[0][:, place]], 1).to(torch.int8),
            sigma,
            torch.cat([b, columns[1][:, place]], 1).to(torch.int8).t().contiguous().t(),
            torch.cat([torch.arange(R, device=sigma.device), source[~again], source[again]]),
            torch.cat([a_step * b_step, fold[place]]),
            runs,
        ).aligned()
        return factor, self._error(factor, A - self.second, B - self.first)

    def target(self, B: Tensor) -> Tensor:
        """The matrix that is rounded in place of `second`: the least-squares solution A of A diag(sigma) Bᵀ = W.

        `second` itself without compensation.
        """
        if not self.compensate:
            return self.second
        gram = matmul(B.t(), B)
        scaled = torch.linalg.solve(gram, matmul(self.first.t(), B).t()).t()  # (firstᵀ B) (Bᵀ B)⁻¹, near 1
        small = self.sigma > 1e-6 * self.sigma[:1]  # below, compensation would be all of the column
        solved = matmul(self.second * self.sigma, scaled) / self.sigma.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(small, solved, self.second)

    def _error(self, factor: Int8Factor, e: Tensor, f: Tensor) -> float:
        if not self.total:
            return 0.0
        together = (factor.dense() - self.W).square().sum(dtype=torch.float64)
        # |(a + e)(b + f)ᵀ - a bᵀ|² = |e (b + f)ᵀ + a fᵀ|² for each component, without the product of the two terms,
        # which is of a higher order.
        each = e.square().sum(0) * (self.first + f).square().sum(0) + f.square().sum(0)
        apart = (each.double() * self.sigma.double().square()).sum()
        return math.sqrt(((together + SPREAD**2 * apart) / self.total).item())


def left_over(X: Tensor) -> tuple[Tensor, Tensor]:
    """The rounding errors of X [L, C], and the lengths [C] of its columns."""
    q, step = round_columns(X)
    return X - q * step, X.norm(dim=0)


def _dense_int8_error(W: Tensor) -> float:
    """||W - int8(W)|| / ||W|| with one step per row."""
    step = (W.abs().amax(1, keepdim=True) / LEVELS).clamp_min(torch.finfo(W.dtype).tiny)
    size = W.norm()
    return ((W - (W / step).round() * step).norm() / size).item() if size else 0.0


def _aligned(R: int, extra: int) -> int:
    """`extra` rounded up, so that R + extra is a multiple of ALIGN: columns that are read anyway are used."""
    return extra + -(R + extra) % ALIGN
