"""Whether factors are the ones an expert was trained on, component by component, from sketches (`factors.sketch`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# A sketch is of order 1. fp32 against fp64 moves it by 1e-6, fp16 storage by 5e-4 of itself, bf16 factors by about 1e-3;
# two unrelated components agree to 2e-2 about once in thirty.
TOLERANCE = 2e-2
# Singular values closer than this (relative) may come out as another basis of the same space.
NEAR = 1e-3
# Longer runs of differing components are other weights, not a degenerate space; the sum over a run is one number and would prove little.
LONGEST_RUN = 8


class ExpertError(ValueError):
    """An expert, or its file, that cannot be used."""


class ExpertMismatch(ExpertError):
    """A sound expert on a model, or factors, that it was not made for."""


class Compared(NamedTuple):
    """One matrix on two sets of factors.

    zs: the vectors [<= R] that are to be applied; mine, theirs: [R] sketches, of the expert and of the factors at hand
    sigma: [R] or None where it is not known
    """

    zs: tuple[Tensor, ...]
    mine: Tensor
    theirs: Tensor
    sigma: Tensor | None = None


def check_components(who: str, matrices: Mapping[str, Compared]) -> None:
    """Raise ExpertMismatch that lists the worst matrices and components where factors differ in what these z would change."""
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
        f"{who}: the factors are not those it was trained on; {len(found)} of {len(matrices)} matrices differ. {'; '.join(lines)} "
        f"(sketches are of order 1, {TOLERANCE} is allowed). use the factors, or the very weights, of its training"
    )


def differences(c: Compared) -> dict[int, float]:
    """{component: difference of its sketches} for the components on which applying z would go wrong."""
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
    """Runs of differing components; one that agrees between two that differ belongs to the run (a rotation may spare it)."""
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
    """Another basis of one singular space, to all of which each z does the same: U z Vᵀ over it is the same matrix."""
    n, s, z = run.stop - run.start, sigma[run], zs[:, run]
    if not 2 <= n <= LONGEST_RUN or s.max() - s.min() > NEAR * s.max():
        return False
    spread = (z.amax(1) - z.amin(1)).max()
    change = (zs - 1).abs().amax(0) * sigma
    if spread * s.max() > TOLERANCE * change.max():
        return False
    size = max(1.0, mine[run].abs().max().item())
    return bool((mine[run].sum() - theirs[run].sum()).abs() <= TOLERANCE * size * n**0.5)
