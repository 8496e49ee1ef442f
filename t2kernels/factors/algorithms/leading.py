"""The leading components of a large matrix: a space from AᵀA in fp32, and its residual in A, in fp64, taken away.

    1. G = AᵀA in fp32 (`gram`), the smaller side of A
    2. a space that holds the leading eigenvectors of G (`krylov`), and X, the k + EXTRA leading ones in it
    3. in fp64: B = A X, C = Aᵀ B, the components U diag(sigma) Vᵀ in X, and the residual r = AᵀA v - sigma² v
    4. for each component, t with (sigma² - G) t = r orthogonal to V, by conjugate gradients: X = V + t
    5. again from 3, until what is left of t moves an expert by less than ENOUGH; U and sigma are those of A X

G is off by 2e-6 of itself, which moves X; r is exact, and a t from this G is exact to 2e-6 of t. So accuracy comes from
3, which is one product with A and one with Aᵀ for every component.

Source of 4: G. Sleijpen and H. van der Vorst, A Jacobi-Davidson iteration method for linear eigenvalue problems (1996).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import gram, halves, times
from .krylov import Space, misses, orthonormal
from .products import both, large, signs

# Columns of a block: N / PER_BLOCK, within bounds. Wider blocks are quicker a column, and need a larger space.
PER_BLOCK: int = 128
SMALLEST, WIDEST = 16, 128
PER_EXTRA, EXTRA = 8, 16  # components beyond k, k / PER_EXTRA and at least EXTRA, so that the last ones have neighbours
REACH: float = 4e-4  # of X: the space is large enough
SOLVE: int = 8  # iterations for t, at most
ENOUGH: float = 1e-8  # ||D' - D|| / ||D|| of D = U diag(sigma (z - 1)) Vᵀ, for a random z. fp32 rounds D by 4e-8
REFINEMENTS: int = 3  # at most; real spectra take one


def pays(M: int, N: int, k: int) -> bool:
    """True if k components of an M x N matrix are a small part of a large one."""
    R = min(M, N)
    return R >= 1024 and 5 * k <= R


def leading(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """U [M, k], sigma [k] and Vt [k, N] in fp64, and the `error`, of a finite A [M, N], M >= N, of moderate size.

    error: an estimate of ||D' - D|| / ||D|| (Frobenius) for what an expert of random z adds to W, D = U diag(sigma
    (z - 1)) Vᵀ, against the exact components; components of equal sigma as one. At most ENOUGH.

    The start is a fixed pattern of signs, so that a machine gives one answer.

    None if the components were not found: a spectrum so flat that the space would be most of R^N, a rank below k, or
    more equal singular values than a block has columns. Take another algorithm then.
    """
    G = gram(A)
    block = min(max(A.shape[1] // PER_BLOCK, SMALLEST), WIDEST)
    space = Space(G, signs(block * A.shape[1], 4).reshape(block, -1).to(G))
    p = min(k + max(EXTRA, k // PER_EXTRA), A.shape[1])
    if not space.grow(k, p, REACH):
        return None
    solver = _Solver(space, min(p, space.m), torch.bfloat16 if halves(A) else torch.float32)
    X = solver.leading.double()
    for _ in range(REFINEMENTS):
        found = _components(A, X)
        if found is None:
            return None
        B, values, V, r = found
        t, error = solver(values, V, r, k)
        X = V + t.double()
        if error <= ENOUGH:
            break
    else:
        return None
    # A t is small: fp32 is enough
    B += times(t, A).double()
    found = _rotated(B, X)
    if found is None:
        return None
    S, sigma, V = found
    U = (S[:, :k].t() @ B) / sigma[:k, None]
    return None if misses(G, sigma[:k], V[:k]) else (U.t(), sigma[:k], V[:k], error)


def _components(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """B = V Aᵀ [p, M], sigma² [p], V [p, N] and r [p, N] = V AᵀA - sigma² V: of the components of A in span X, fp64."""
    X, _ = orthonormal(X)
    if X is None:
        return None
    B, C = both(X, A)
    found = _rotated(B, X)
    if found is None:
        return None
    S, sigma, V = found
    values = sigma.square()
    return S.t() @ B, values, V, S.t() @ C - values[:, None] * V


def _rotated(B: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """S [p, p], sigma [p] and V = Sᵀ X [p, N] of orthonormal rows: B = X Aᵀ [p, M] becomes Sᵀ B = diag(sigma) Uᵀ.

    None if rows of X depend on each other, or of A X.
    """
    L, failed = torch.linalg.cholesky_ex(X @ X.t())
    if failed.item():
        return None
    H = torch.linalg.solve_triangular(L, B @ B.t(), upper=False)
    H = torch.linalg.solve_triangular(L, H.t(), upper=False)
    values, S = torch.linalg.eigh((H + H.t()) / 2)
    sigma, S = values.flip(0).clamp_min(0).sqrt(), S.flip(1)
    if not sigma[-1] > 1e-6 * sigma[0]:
        return None
    S = torch.linalg.solve_triangular(L.t(), S, upper=True)
    return S, sigma, S.t() @ X


class _Solver:
    """t with (lambda - G) t = r for each component, orthogonal to V. The space gives the preconditioner.

    In the space 1 / (lambda - theta) is known for each direction; outside of it theta is about its mean there.
    """

    def __init__(self, space: Space, p: int, dtype: torch.dtype) -> None:
        self.G, self.Q, self.p = space.G, space.Q, p
        self.half = space.Q.to(dtype)
        theta, N = space.theta, space.G.shape[0]
        self.inner = theta[p:]  # [m - p]
        self.others = space.S[:, p:].to(dtype).contiguous()  # [m, m - p]
        self.outside = ((space.G.diagonal().sum() - theta.sum()) / max(1, N - space.m)).clamp_min(0)
        self.leading: Tensor = large(space.S[:, :p].t(), space.Q)  # [p, N]

    def __call__(self, values: Tensor, V: Tensor, r: Tensor, k: int) -> tuple[Tensor, float]:
        """t [p, N] fp32, of which the last p - k are rough, and by how much an expert would be off with V + t."""
        unit = r.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        values, V, rest = values.float()[:, None], V.float(), (r / unit).float()
        t = self._near(values, V, rest)
        # The others are left so: their lambda may be below eigenvalues of G that V does not hold.
        values, rest, z = values[:k], rest[:k], t[:k].clone()
        tiny = torch.finfo(torch.float32).tiny
        first = rest.norm(dim=1).clamp_min(tiny)
        x, direction, before = torch.zeros_like(rest), torch.zeros_like(rest), torch.ones_like(values)
        weight = (values[:, 0] / values.sum()).sqrt()
        lacks, at = torch.ones_like(first), 0  # what each solution lacks; those before number `at` are done
        for n in range(SOLVE):
            z = self._near(values[at:], V, rest[at:]) if n else z
            size = (z * rest[at:]).sum(1, keepdim=True)
            d = z + direction[at:] * (size / before[at:])
            image = values[at:] * d - large(d, self.G)
            image -= large(large(image, V.t()), V)
            length = (d * image).sum(1, keepdim=True)
            step = torch.where(length > 0, size / length, 0)
            # lambda - G is singular to this G's accuracy: a component that gets worse stays as it is
            after = rest[at:] - step * image
            good = (after.norm(dim=1) <= 4 * first[at:])[:, None]
            x[at:] += torch.where(good, step * d, 0)
            rest[at:] = torch.where(good, after, rest[at:])
            direction[at:] = torch.where(good, d, 0)
            before[at:] = size.clamp_min(tiny)
            lacks[at:] = rest[at:].norm(dim=1) / first[at:]
            turned = x.norm(dim=1) * unit.float()
            off = turned * (lacks + turned.max()) * weight  # turned.max(): what is of second order
            error = off.norm().item()
            if error <= ENOUGH:
                break
            at += int((off[at:] > ENOUGH / (2 * k**0.5)).int().argmax())
        t[:k] = x
        return t * unit.float(), error

    def _near(self, values: Tensor, V: Tensor, r: Tensor) -> Tensor:
        """The preconditioner: about r / (lambda - G), orthogonal to V."""
        least = 1e-3 * values.min()
        far = (values - self.outside).clamp_min(least)
        inside = self._times(self._times(r, self.half.t()), self.others)  # [p, m - p]
        inside = inside / (values - self.inner).clamp_min(least) - inside / far
        z = r / far + self._times(self._times(inside, self.others.t()), self.half)
        return z - large(large(z, V.t()), V)

    def _times(self, X: Tensor, Y: Tensor) -> Tensor:
        """X Y in fp32, rounded to bf16 where that is quicker: a preconditioner needs no more."""
        return large(X, Y) if Y.dtype == torch.float32 else (X.bfloat16() @ Y).float()
