"""Block Lanczos: a space, in fp32, that holds the leading eigenvectors of a symmetric matrix.

Source: G. Golub and R. Underwood, The block Lanczos method for computing eigenvalues (1977); C. Musco and C. Musco,
Randomized Block Krylov Methods (arXiv 1504.05477).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .products import large, signs

FLOOR: float = 3e-7  # of a residual in fp32, over sqrt(theta_1 theta_i)
LARGEST: float = 0.65  # of N: the largest space. A flat random spectrum needs 0.5 at k = N/16
ABOVE: float = 1e-4  # relative: a singular value this much above sigma_k that the space does not hold is a miss
UNSEEN: tuple[int, int] = (16, 6)  # columns and steps of the search for what the space does not hold


class Space:
    """span{X, G X, G² X, ...}: an orthonormal basis, as rows, and G in it.

    G: [N, N] fp32, symmetric, no eigenvalue far below 0
    start: [b, N] X; fixed: [l, N] orthonormal rows that the space is orthogonal to
    theta, S: [m] eigenvalues of G in the space, descending, and [m, m] their vectors, as columns, after `grow`
    """

    def __init__(self, G: Tensor, start: Tensor, fixed: Tensor | None = None) -> None:
        self.G: Tensor = G
        self.b: int = start.shape[0]
        self.m = 0
        self.locked = 0 if fixed is None else fixed.shape[0]
        self.rows = start.new_empty(self.locked + 2 * self.b, start.shape[1])  # [locked + m + b, N]
        if fixed is not None:
            self.rows[: self.locked] = fixed
        self.T = torch.zeros(0, 0, dtype=torch.float64, device=G.device)  # [m, m], the upper triangle
        # what is added next, and its factor in G times the last rows
        self.next, _, self.last = self._orthogonal(start)
        self.theta: Tensor = self.T.diagonal()
        self.S: Tensor = self.T

    @property
    def Q(self) -> Tensor:
        """[m, N] the basis."""
        return self.rows[self.locked : self.locked + self.m]

    def step(self) -> bool:
        """Add a block. False if there is nothing more to add: the space is invariant."""
        if self.next is None:
            return False
        b, top = self.b, self.locked + self.m
        if top + b > self.rows.shape[0]:
            larger = self.rows.new_empty(2 * self.rows.shape[0], self.rows.shape[1])
            larger[:top] = self.rows[:top]
            self.rows = larger
        self.rows[top : top + b] = self.next
        self.m += b
        self.next, inside, self.last = self._orthogonal(large(self.next, self.G))
        T = self.T.new_zeros(self.m, self.m)
        T[: self.m - b, : self.m - b] = self.T
        T[:, self.m - b :] = inside[self.locked :]
        self.T = T
        return self.next is not None

    def grow(self, k: int, p: int, reach: float) -> bool:
        """Add blocks until the space holds k eigenvectors, as `theta` and `S`. False if it would be too large.

        Vector i is held if its residual is at most `reach` of the distance of theta_i to theta_p, or what fp32 leaves.
        """
        limit = int(LARGEST * self.G.shape[0])
        check = max(3 * k, p + 2 * self.b)
        while self.m < limit:
            whole = not self.step()
            if self.m < check and not whole:
                continue
            if self.m < k + 1:
                return False  # the rank is below k
            values, S = torch.linalg.eigh(self._symmetric().float())
            self.theta, self.S = values.flip(0).clamp_min(0), S.flip(1)
            values = self.theta[:k]
            wanted = (reach * (values - self.theta[min(p, self.m) - 1])).maximum(FLOOR * (values[0] * values).sqrt())
            off = large(self.last.float(), self.S[self.m - self.b :, :k]).norm(dim=0)
            worst = (off / wanted.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
            if whole or worst <= 1:
                return True
            # every factor of ten takes about an eighth of the space that is there
            check = self.m + max(self.b, int(self.m / 8 * min(3.0, math.log10(worst))))
        return False

    def largest(self) -> Tensor:
        """The largest eigenvalue of G on the space."""
        return torch.linalg.eigvalsh(self._symmetric())[-1].clamp_min(0)

    def _symmetric(self) -> Tensor:
        upper = self.T.triu()
        return upper + upper.triu(1).t()

    def _orthogonal(self, W: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(Y, H, B): W = Hᵀ Q + Bᵀ Y with Y [b, N] orthonormal and orthogonal to Q. Y is None if W lies in Q."""
        Q = self.rows[: self.locked + self.m]
        H = large(Q, W.t())
        Y, L = orthonormal(W - large(H.t(), Q))
        if Y is None:
            return None, H.double(), L.t()
        h = large(Q, Y.t())  # what rounding left, relative to W: once more is enough
        Y, again = orthonormal(Y - large(h.t(), Q))
        if Y is None:
            return None, H.double(), L.t()
        return Y, H.double() + h.double() @ L.t(), (L @ again).t()


def orthonormal(W: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Y, L) with W = L Y and orthonormal rows of Y, by Cholesky in fp64; Y is None if rows depend on others."""
    wide = W.double()
    L, failed = torch.linalg.cholesky_ex(wide @ wide.t())
    sizes = L.diagonal()
    if failed.item() or not sizes.min() > 1e-6 * sizes.max():
        return None, torch.zeros_like(L)
    return torch.linalg.solve_triangular(L, wide, upper=False).to(W.dtype), L


def misses(G: Tensor, sigma: Tensor, Vt: Tensor) -> bool:
    """True if G has, orthogonal to the rows of Vt, an eigenvalue above the square of the smallest of `sigma`.

    A block of b columns holds at most b of equal eigenvalues; a fresh block sees the others.
    """
    columns, steps = UNSEEN
    fresh = signs(columns * G.shape[0], 5).reshape(columns, -1).to(G)
    space = Space(G, fresh, Vt.to(G))
    for _ in range(steps):
        if not space.step():
            break
    return bool(space.m and space.largest().sqrt() > (1 + ABOVE) * sigma[-1])
