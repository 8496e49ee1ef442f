"""Experts of one model on another (arXiv 2501.06252, section 4.2), the fit of their singular vectors, and a control.

z_i rescales the i-th singular component. It means the same on another model as far as component i of that model is
component i of this one. Models that share their pre-training have that in common, unrelated models do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert, ExpertMismatch
from t2kernels.factors.factor import Factor

LEADING = 16
"""Components that count as leading."""
ENOUGH = 0.3
"""Mean |cos| below which `transfer` warns. Siblings of the built-in model have .7 to .9; unrelated models of width N
have sqrt(2 / (pi N))."""


@dataclass(frozen=True)
class Alignment:
    """How well component i of one model matches component i of another.

    leading, all: mean |cos| of singular vectors, left and right, over the first 16 and over all components of matrices
        of equal shape. From an expert's sketch alone: the correlation of the sketches, about the fourth power of that.
    chance: the value for unrelated models
    matrices: {name: mean |cos| over its components}
    by: "vectors" or "sketches"
    """

    leading: float
    all: float
    chance: float
    matrices: Mapping[str, float]
    by: str


def alignment(
    source: Mapping[str, Factor] | ExpertBank | Expert, target: ExpertBank, rename: Callable[[str], str] | None = None
) -> Alignment:
    """Compare the factors of two models.

    source: `Factors` or a bank; or an `Expert`, whose file holds a sketch of the factors it was trained on
    target: the bank of the other model
    rename: the name of a matrix of the source -> its name in the target
    Raises ExpertMismatch if the two have no matrix of one name and shape.
    """
    rename = rename or (lambda name: name)
    mine = factors_of(target)
    if isinstance(source, Expert):
        return _by_sketches(source, target, rename)
    theirs = factors_of(source) if isinstance(source, ExpertBank) else source
    leading, every, matrices, chance = [], [], {}, []
    for name in theirs:
        there = mine.get(rename(name))
        if there is None:
            continue
        a = theirs[name]
        if a.U.shape[0] != there.U.shape[0] or a.V.shape[0] != there.V.shape[0]:
            continue
        k = min(a.rank, there.rank)
        cos = torch.stack([_cos(x[:, :k], y[:, :k]) for x, y in ((a.U, there.U), (a.V, there.V))]).mean(0)
        leading.append(cos[:LEADING].mean())
        every.append(cos.mean())
        matrices[name] = every[-1].item()
        chance += [sqrt(2 / (pi * n)) for n in (a.U.shape[0], a.V.shape[0])]
    if not every:
        raise ExpertMismatch(
            "the two models have no matrix of one name and shape to compare: pass rename= where names differ"
        )
    return Alignment(
        torch.stack(leading).mean().item(),
        torch.stack(every).mean().item(),
        sum(chance) / len(chance),
        matrices,
        "vectors",
    )


def transfer(
    expert: Expert,
    bank: ExpertBank,
    source: Mapping[str, Factor] | ExpertBank | None = None,
    rename: Callable[[str], str] | None = None,
    strength: float = 1.0,
    **manifest: Any,
) -> Expert:
    """An expert of another model as an expert of this one: z' = 1 + strength (z - 1).

    Where a matrix has another number of components, z is interpolated along the spectrum, component i of R at
    (i + 1/2) / R.

    expert: of the other model; bank: of this model
    source: the factors that the expert was trained on, to compare with; None: the expert's own sketch, if it has one
    rename: the name of a matrix of the expert -> its name here
    manifest: facts to record in the new expert
    Warns if the singular vectors do not match. Raises ExpertMismatch if no matrix of the expert is in this model.
    """
    rename = rename or (lambda name: name)
    moved = {rename(name): z for name, z in expert.z.items() if rename(name) in bank.matrices}
    if not moved:
        raise ExpertMismatch(
            f"none of the expert's matrices ({', '.join(list(expert.z)[:2])}, ...) is in this model "
            f"({', '.join(list(bank.matrices)[:2])}, ...): pass rename= where names differ"
        )
    measured = None
    if source is not None or expert.sketch:
        try:
            measured = alignment(expert if source is None else source, bank, rename)
        except ExpertMismatch:
            measured = None
    low = ENOUGH if measured is None or measured.by == "vectors" else ENOUGH**4 + 4 * measured.chance
    if measured is None or measured.all < low:
        found = (
            "could not be compared"
            if measured is None
            else f"agree by {measured.all:.2f} ({measured.by}; chance is {measured.chance:.2f})"
        )
        warnings.warn(
            f"the singular vectors of the two models {found}: here z rescales other components than in training, and "
            "may well hurt; compare with shuffled(expert), and try strength=0.5",
            stacklevel=2,
        )
    z, unlike = {}, 0
    for name, v in moved.items():
        wanted = bank.origin.ranks[name]
        here = v if len(v) == _full(expert, source, name, wanted) == wanted else resample(v, wanted)
        unlike += len(here) != len(v)
        z[name] = (1 + strength * (here - 1))[: bank.matrices[name]]
    facts = {
        "transferred_from": expert.manifest.get("base_model"),
        "name": expert.manifest.get("name"),
        "interpolated": unlike,
    }
    if measured is not None:
        facts["alignment"] = {"leading": round(measured.leading, 4), "all": round(measured.all, 4), "by": measured.by}
    left = len(expert.z) - len(moved)
    return bank.expert(
        z, **{k: v for k, v in facts.items() if v is not None}, **({"left_out": left} if left else {}), **manifest
    )


def shuffled(expert: Expert, seed: int = 0) -> Expert:
    """The control: the same values of z in a random order within each matrix.

    If it does as well as the expert, then the order of the components does not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    z = {name: v[torch.randperm(len(v), generator=generator)] for name, v in expert.z.items()}
    return Expert(z, {**expert.manifest, "shuffled": seed}, expert.sketch)


def resample(z: Tensor, rank: int) -> Tensor:
    """z [R] at `rank` points along the spectrum, by linear interpolation. Returns [rank] fp32."""
    at = ((torch.arange(rank, dtype=torch.float64) + 0.5) / rank * len(z) - 0.5).clamp(0, len(z) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(z) - 1)
    share = at - low
    return ((1 - share) * z[low].double() + share * z[high].double()).float()


def factors_of(bank: ExpertBank) -> dict[str, Factor]:
    """{matrix: its factors}, as views of the layers' tensors. Matrices with int8 factors are left out."""
    out = {}
    for layer, names in bank.layers:
        if layer.fold is not None:
            continue
        shape = (len(names), layer.rank)
        sigma = layer.sigma.reshape(shape)
        U, Vt = layer.U.reshape(len(names), -1, layer.rank), layer.Vt.reshape(len(names), layer.rank, -1)
        for i, name in enumerate(names):
            out[name] = Factor(U[i], sigma[i], Vt[i].T)
    return out


def _full(expert: Expert, source: Mapping[str, Factor] | ExpertBank | None, name: str, wanted: int) -> int:
    """The number of components of the matrix that z was trained on. A shorter z leaves the others alone."""
    if isinstance(source, ExpertBank):
        return source.origin.ranks.get(name, wanted)
    if source is not None and name in source:
        return min(source[name].U.shape[0], source[name].V.shape[0])
    return len(expert.z.get(name, ())) or wanted


def _by_sketches(expert: Expert, target: ExpertBank, rename: Callable[[str], str]) -> Alignment:
    """`alignment` from the sketch in an expert's file."""
    found, leading, matrices, sizes = [], [], {}, []
    for name, mine in expert.sketch.items():
        theirs = target.origin.sketches.get(rename(name))
        if theirs is None or len(theirs) < len(mine):
            continue
        a, b = mine.double(), theirs[: len(mine)].double()
        correlation = lambda x, y: (x @ y / (x.norm() * y.norm()).clamp_min(1e-12)).item()  # noqa: E731
        matrices[name] = correlation(a, b)
        found.append(matrices[name])
        leading.append(correlation(a[:LEADING], b[:LEADING]))
        sizes.append(len(mine))
    if not found:
        raise ExpertMismatch(
            "the expert has no sketch of a matrix of this model: pass source=, the factors that it was trained on"
        )
    return Alignment(sum(leading) / len(leading), sum(found) / len(found), 1 / sqrt(sum(sizes)), matrices, "sketches")


def _cos(a: Tensor, b: Tensor) -> Tensor:
    """|cos| of each pair of columns."""
    a, b = a.double(), b.double().to(a.device)
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).abs()
