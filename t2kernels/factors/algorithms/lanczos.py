"""The leading components of a large matrix by block Lanczos: a space in fp32, the components in it in fp64.

Source: C. Musco and C. Musco, Randomized Block Krylov Methods (arXiv 1504.05477); G. Golub and R. Underwood, The block
Lanczos method for computing eigenvalues (1977).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import matmul, signs

# Columns of a block: N / PER_BLOCK, within bounds. At 32 columns a core does 45e9 operations a second, at 64 65e9, at
# 128 80e9; but at twice the columns the space has to be a third larger.
PER_BLOCK: int = 64
SMALLEST, WIDEST = 16, 128
INNER: float = 3e-7  # of the residual in fp32, over sigma_1 sigma_i: the space is large enough
LARGEST: float = 0.65  # of N: the largest space. A flat random spectrum needs 0.55 at k = N/16
EXTRA: int = 16  # components beyond k that are refined with them, so that the last ones have neighbours
ROWS: int = 2048  # of A that are in fp64 at a time
UNSEEN: tuple[int, int] = (16, 6)  # columns and steps of the search for what the space does not hold
ENOUGH: float = 1e-7  # of the residual in fp64, over sigma_1, all k components together
REFINEMENTS: int = 4  # at most; two or three reach it, each with two products in fp64
ABOVE: float = 1e-4  # relative: a value this much above sigma_k that the space does not hold is a miss


def pays(M: int, N: int, k: int) -> bool:
    """True if k components of an M x N matrix are a small part of a large one."""
    R = min(M, N)
    return R >= 1024 and 5 * k <= R


def leading(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """U [M, k], sigma [k] and Vt [k, N] in fp64, and their residual, of a finite A [M, N], M >= N, of moderate size.

    The residual is ||Aᵀ U - V diag(sigma)|| / sigma_1, Frobenius. The start is a fixed pattern of signs, so that a
    machine gives one answer.

    None if the components were not found: a spectrum so flat that the space would be most of R^N, a rank below k, or
    more equal singular values than a block has columns. Take another algorithm then.
    """
    A32 = A.float()
    block = min(max(A.shape[1] // PER_BLOCK, SMALLEST), WIDEST)
    start = signs(block * A.shape[1], 4).reshape(block, -1).to(A32)
    space = _Space(A32, start)
    if not space.grow(k):
        return None
    found = _refined(A, space, k)
    if found is None or found[3] > ENOUGH or misses(A32, found[1], found[2]):
        return None
    return found


class _Space:
    """span{X, AᵀA X, (AᵀA)² X, ...}: an orthonormal basis, as rows, and AᵀA in it.

    start: [b, N] X; fixed: [l, N] orthonormal rows that the space is orthogonal to
    """

    def __init__(self, A: Tensor, start: Tensor, fixed: Tensor | None = None) -> None:
        self.A: Tensor = A
        self.b: int = start.shape[0]
        self.locked = 0 if fixed is None else fixed.shape[0]
        rows = self.locked + 2 * self.b
        self.Q = start.new_empty(rows, start.shape[1])  # [locked + m + b, N]
        if fixed is not None:
            self.Q[: self.locked] = fixed
        self.T = torch.zeros(0, 0, dtype=torch.float64, device=A.device)  # [m, m], the upper triangle
        self.m = 0
        # what is added next, and its factor in AᵀA times the last rows
        self.next, _, self.last = self._orthogonal(start)
        self.theta: Tensor = self.T.diagonal()  # [m] eigenvalues, descending, and [m, N] vectors: see `grow`
        self.ritz: Tensor = self.Q[:0]

    def step(self) -> bool:
        """Add a block. False if there is nothing more to add: the space is invariant."""
        if self.next is None:
            return False
        b, top = self.b, self.locked + self.m
        if top + b > self.Q.shape[0]:
            larger = self.Q.new_empty(2 * self.Q.shape[0], self.Q.shape[1])
            larger[:top] = self.Q[:top]
            self.Q = larger
        self.Q[top : top + b] = self.next
        self.m += b
        W = matmul(matmul(self.next, self.A.t()), self.A)  # [b, N]
        self.next, inside, self.last = self._orthogonal(W)
        T = self.T.new_zeros(self.m, self.m)
        T[: self.m - b, : self.m - b] = self.T
        T[:, self.m - b :] = inside[self.locked :]
        self.T = T
        return self.next is not None

    def grow(self, k: int) -> bool:
        """Add blocks until it holds k components, as `theta` and `ritz`. False if it would be too large."""
        limit = int(LARGEST * self.Q.shape[1])
        check = max(2 * k, k + EXTRA)
        while self.m < limit:
            whole = not self.step()
            if self.m < check and not whole:
                continue
            check = self.m + max(2 * self.b, self.m // 8)
            if self.m < k + 1:
                return False  # the rank is below k
            values, S = torch.linalg.eigh(self._symmetric().float())
            values, S = values.flip(0).clamp_min(0), S.flip(1)
            off = matmul(self.last.float(), S[self.m - self.b :, :k]).norm(dim=0)
            if whole or bool((off <= INNER * (values[0] * values[:k]).sqrt()).all()):
                self.theta, self.ritz = values, matmul(S.t(), self.Q[: self.m])
                return True
        return False

    def largest(self) -> Tensor:
        """The largest singular value of A on the space."""
        return torch.linalg.eigvalsh(self._symmetric())[-1].clamp_min(0).sqrt()

    def _symmetric(self) -> Tensor:
        upper = self.T.triu()
        return upper + upper.triu(1).t()

    def _orthogonal(self, W: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(Y, H, B): W = Hᵀ Q + Bᵀ Y with Y [b, N] orthonormal and orthogonal to Q. Y is None if W lies in Q."""
        Q = self.Q[: self.locked + self.m]
        H = matmul(Q, W.t())
        Y, L = _orthonormal(W - matmul(H.t(), Q))
        if Y is None:
            return None, H.double(), L.t()
        h = matmul(Q, Y.t())  # what rounding left, relative to W: once more is enough
        Y, again = _orthonormal(Y - matmul(h.t(), Q))
        if Y is None:
            return None, H.double(), L.t()
        return Y, H.double() + h.double() @ L.t(), (L @ again).t()


def _orthonormal(W: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Y, L) with W = L Y and orthonormal rows of Y, by Cholesky in fp64; Y is None if rows depend on others."""
    wide = W.double()
    L, failed = torch.linalg.cholesky_ex(wide @ wide.t())
    sizes = L.diagonal()
    if failed.item() or not sizes.min() > 1e-6 * sizes.max():
        return None, torch.zeros_like(L)
    return torch.linalg.solve_triangular(L, wide, upper=False).to(W.dtype), L


def _refined(A: Tensor, space: _Space, k: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The components in fp64, from those of the space, and ||Aᵀ U - V diag(sigma)|| / sigma_1, Frobenius.

    What fp32 left over is r = AᵀA v - lambda v, of which 1 / (lambda - theta) is missing in a direction of the
    eigenvalue theta. The space knows theta of its own directions; outside of it, theta is about its mean there.
    """
    theta, rows = space.theta, space.ritz  # [m], [m, N]
    p = min(k + EXTRA, theta.numel())
    outside = (space.A.square().sum() - theta.sum()).clamp_min(0) / max(1, rows.shape[1] - theta.numel())
    X = rows[:p].double()
    for _ in range(REFINEMENTS):
        X, _ = _orthonormal(X)
        if X is None:
            return None
        B = torch.cat([a.double() @ X.t() for a in A.split(ROWS)])  # [M, p]
        found = _by_size(B)
        if found is None:
            return None
        U, sigma, S = found
        V = S.t() @ X  # [p, N]
        C = sum((u.t() @ a.double() for a, u in zip(A.split(ROWS), U.split(ROWS), strict=True)), U.new_zeros(()))
        R = C - sigma[:, None] * V  # [p, N]
        reached = (R[:k].norm() / sigma[0]).item()
        values = sigma.square()
        r = (R * sigma[:, None]).float()
        inside = matmul(r, rows[p:].t())  # [p, m - p]
        gap = (values[:, None].float() - theta[p:]).clamp_min(1e-3 * values[-1].item())
        far = (values.float() - outside).clamp_min(1e-3 * values[-1].item())[:, None]
        t = r / far + matmul(inside / gap - inside / far, rows[p:])
        X = V + t.double()
        if reached <= ENOUGH:
            break
    return U[:, :k], sigma[:k], X[:k], reached


def _by_size(B: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """B = P diag(sigma) Sᵀ for a tall B of moderate condition; None if it is not."""
    values, S = torch.linalg.eigh(B.t() @ B)
    sigma, S = values.flip(0).clamp_min(0).sqrt(), S.flip(1)
    if not sigma[-1] > 1e-6 * sigma[0]:
        return None
    return B @ S / sigma, sigma, S


def misses(A: Tensor, sigma: Tensor, Vt: Tensor) -> bool:
    """True if A has, orthogonal to what was found, a singular value above the smallest of `sigma`.

    A block of b columns holds at most b of equal singular values; a fresh block sees the others.
    """
    columns, steps = UNSEEN
    fresh = signs(columns * A.shape[1], 5).reshape(columns, -1).to(A)
    space = _Space(A, fresh, Vt.to(A))
    for _ in range(steps):
        if not space.step():
            break
    return bool(space.m and space.largest() > (1 + ABOVE) * sigma[-1])
