"""Which factors are these? Fingerprints, sketches, and the checks that use them.

Singular vectors of near-equal singular values differ between algorithms, machines and dtypes. An expert therefore
belongs to the factors that it was trained on. Two things identify factors: a *fingerprint*, equal only for the same
bytes, and a *sketch*, one number per component, which recognises factors that were computed again elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from t2kernels import InputError, MissingFileError, T2Error

from . import linalg
from .factor import Factor
from .int8 import Int8Factor

# A sketch is of order 1. fp32 against fp64 moves it by 1e-6, fp16 storage by 5e-4 of itself, bf16 factors by about
# 1e-3. Two unrelated components agree to 2e-2 about once in thirty.
TOLERANCE = 2e-2
# Singular values closer than this (relative) may come out as another basis of the same space.
NEAR = 1e-3
# Longer runs of differing components are other weights, not a degenerate space: the sum over a run is one number and
# would prove little.
LONGEST_RUN = 8
# ||W v_1 - sigma_1 u_1|| / sigma_1 that rounding explains. Rounding a random matrix to bf16 gives 2e-3, to 4 bits 0.15
# (measured on Gaussian 512 x 512); foreign factors give about 1. An int8 column without its residual column is off by
# 0.01 of itself, a spiky one by 0.08 (measured on MiniLM).
LEADING_OFF = 0.02
LEADING_OFF_QUANTISED = 0.3


class FactorsError(T2Error, ValueError):
    """Factors, or their files, that cannot be used: damaged, not finite, or not those that their manifest names."""


class FactorsMissing(FactorsError, MissingFileError):
    """A directory of factors, or one of its files, that is not there."""


class ExpertError(T2Error, ValueError):
    """An expert, or its file, that cannot be used."""


class ExpertMismatch(ExpertError):
    """A sound expert on a model, or factors, that it was not made for."""


# --- names for factors


def sketch(factor: Factor | Int8Factor) -> Tensor:
    """One number per component: (u_i · a)(v_i · b). [R] fp32, of order 1.

    a [M] and b [N] are fixed patterns of +1 and -1, from an integer hash of the position: the same on every machine.
    The product does not depend on the sign that the decomposition gave u_i and v_i. Its sum over components that share
    a singular value does not depend on the basis chosen among them: it is aᵀ(Σ u_i v_iᵀ)b.
    """
    a = linalg.signs(factor.U.shape[0], 1).to(factor.U.device)
    b = linalg.signs(factor.V.shape[0], 2).to(factor.V.device)
    dtype = torch.promote_types(factor.U.dtype, torch.float32)
    each = linalg.matmul(a.to(dtype), factor.U.to(dtype)) * linalg.matmul(b.to(dtype), factor.V.to(dtype))
    if isinstance(factor, Int8Factor):
        each = torch.zeros_like(factor.sigma).index_add_(0, factor.source, each * factor.fold)
    return each.float()


def fingerprint(factor: Factor | Int8Factor) -> str:
    """sha256 of shape, dtype and bytes of U, sigma and Vᵀ; of int8 factors also of source and fold."""
    h = hashlib.sha256(f"{list(factor.U.shape)} {list(factor.V.shape)} {factor.U.dtype}".encode())
    for t in factor.tensors().values():
        h.update(_bytes(t))
    return h.hexdigest()


def combine_fingerprints(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint for all matrices: sha256 of their names and fingerprints in the order of the names."""
    return hashlib.sha256("\n".join(f"{n} {fingerprints[n]}" for n in sorted(fingerprints)).encode()).hexdigest()


def weight_hash(W: Tensor) -> str:
    """sha256 of dtype, shape and bytes of a weight as it is stored."""
    h = hashlib.sha256(f"{list(W.shape)} {W.dtype}".encode())
    h.update(_bytes(W))
    return h.hexdigest()


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


# --- do factors belong to a weight


def leading_pair(factor: Factor | Int8Factor) -> tuple[Tensor, Tensor]:
    """u_1 [M] and v_1 [N] in fp32, of length 1 (int8 columns have another length)."""
    u, v = factor.U[:, 0].float(), factor.V[:, 0].float()
    return (u / u.norm(), v / v.norm()) if isinstance(factor, Int8Factor) else (u, v)


def check_weight(name: str, factor: Factor | Int8Factor, got: Tensor, wanted: Tensor, quantised: bool) -> None:
    """Cheap check that factors belong to a weight: W v_1 must equal sigma_1 u_1 within rounding.

    name: of the matrix, for the message
    got: W v_1 [M], or the rows of it that this process has, computed with v_1 of `leading_pair`
    wanted: u_1 [M] of `leading_pair`, or the same rows of it
    quantised: whether W is stored in a quantised format, which allows a larger difference
    Raises ValueError if the factors are of other weights.
    """
    sigma = factor.sigma[0].to(got)
    off = (got - sigma * wanted.to(got)).norm().item()
    # A rank may have a small part of u_1: below 0.05 of it, the difference is compared with 0.05.
    size = (sigma * wanted.norm().clamp_min(0.05)).item()
    allowed = LEADING_OFF_QUANTISED if quantised or isinstance(factor, Int8Factor) else LEADING_OFF
    if not off <= allowed * size:
        raise InputError(
            f"{name}: these factors are of other weights (||W v_1 - sigma_1 u_1|| = {off / size if size else off:.2g} "
            f"sigma_1, {allowed} is allowed); decompose the model that is used"
        )


# --- are factors those of an expert's training


class Compared(NamedTuple):
    """One matrix on two sets of factors.

    zs: the vectors [<= R] that are to be applied
    mine, theirs: [R] sketches, of the expert and of the factors at hand
    sigma: [R], or None if it is not known
    """

    zs: tuple[Tensor, ...]
    mine: Tensor
    theirs: Tensor
    sigma: Tensor | None = None


def check_components(who: str, matrices: Mapping[str, Compared]) -> None:
    """Compare factors in the components that these z change.

    who: the expert, for the message
    Raises ExpertMismatch that lists the worst matrices and components where they differ.
    """
    found = {name: d for name, c in matrices.items() if (d := differences(c))}
    if not found:
        return
    worst = sorted(found, key=lambda n: -max(found[n].values()))
    lines = []
    for name in worst[:3]:
        top = sorted(found[name].items(), key=lambda item: -item[1])
        listed = ", ".join(f"{i} by {off:.2g}" for i, off in top[:4])
        lines.append(f"{name}: {len(top)} components ({listed}{', ...' if len(top) > 4 else ''})")
    raise ExpertMismatch(
        f"{who}: trained with a different decomposition of the model; {len(found)} of {len(matrices)} matrices differ. "
        f"{'; '.join(lines)} (sketches are of order 1, {TOLERANCE} is allowed). Use the factors, or the weights, of "
        "its training"
    )


def differences(c: Compared) -> dict[int, float]:
    """{component: difference of its sketches} for the components in which applying z would change W wrongly."""
    n = min(max(len(z) for z in c.zs), len(c.mine), len(c.theirs))
    zs = torch.stack([torch.nn.functional.pad(z[:n].double(), (0, n - len(z[:n])), value=1.0) for z in c.zs])
    change = (zs - 1).abs().amax(0)
    if n == 0 or change.max() < 1e-6:
        return {}
    sigma = None if c.sigma is None else c.sigma[:n].double()
    weight = change if sigma is None else change * sigma  # spectral size of what each component adds to W
    weight = weight / weight.max().clamp_min(torch.finfo(torch.float64).tiny)
    mine, theirs = c.mine[:n].double(), c.theirs[:n].double()
    off = (mine - theirs).abs()
    allowed = TOLERANCE * mine.abs().clamp_min(1)
    differs = ~(off <= allowed)
    wrong = differs & ~(off * weight <= allowed)
    if sigma is not None:
        for run in _runs(differs):
            if _harmless(run, zs, sigma, mine, theirs):
                wrong[run] = False
    return {i: off[i].item() for i in wrong.nonzero().flatten().tolist()}


def _runs(differs: Tensor) -> list[slice]:
    """Runs of differing components. A component that agrees between two that differ belongs to the run: a rotation may
    leave one alone."""
    d = differs.tolist()
    joined = [x or (0 < i < len(d) - 1 and d[i - 1] and d[i + 1]) for i, x in enumerate(d)]
    runs, start = [], None
    for i, x in enumerate([*joined, False]):
        if x and start is None:
            start = i
        elif not x and start is not None:
            runs.append(slice(start, i))
            start = None
    return runs


def _harmless(run: slice, zs: Tensor, sigma: Tensor, mine: Tensor, theirs: Tensor) -> bool:
    """True if the run is another basis of one singular space and each z treats the space as a whole.

    U z Vᵀ over the space is then the same matrix."""
    n, s, z = run.stop - run.start, sigma[run], zs[:, run]
    if not 2 <= n <= LONGEST_RUN or s.max() - s.min() > NEAR * s.max():
        return False
    spread = (z.amax(1) - z.amin(1)).max()
    change = (zs - 1).abs().amax(0) * sigma
    if spread * s.max() > TOLERANCE * change.max():
        return False
    size = max(1.0, mine[run].abs().max().item())
    return bool((mine[run].sum() - theirs[run].sum()).abs() <= TOLERANCE * size * n**0.5)


def same_weight(found: Tensor, weight: Tensor) -> bool:
    """Whether two weights are equal within the rounding of the coarser dtype, and of a product in fp32."""
    if not found.is_floating_point():
        return False
    step = max(torch.finfo(found.dtype).eps, torch.finfo(weight.dtype).eps)
    a, b = found.to(weight.device).float(), weight.float()
    allowed = step * b.abs() + 32 * torch.finfo(torch.float32).eps * b.abs().max()
    return bool(((a - b).abs() <= allowed).all())
