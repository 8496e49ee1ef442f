"""`LoraAdapter`: low-rank changes W' = W + B A by matrix, and an expert as one.

An expert that rescales k components of W = U diag(sigma) Vᵀ is a LoRA of rank k (arXiv 2106.09685, with scaling 1):

    B = U_k diag(sigma (z - 1))  [M, k]        A = V_kᵀ  [k, N]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from t2kernels import InputError
from t2kernels.factors.factor import Factor
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.matrices import STACKS

from .peft_files import read_adapter, write_adapter


class Pair(NamedTuple):
    """A change B A of one matrix.

    B: [M, r]
    A: [r, N]
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""
        return self.A.shape[0]

    def norm(self) -> float:
        """||B A||, Frobenius."""
        B, A = self.B.double(), self.A.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


class LoraAdapter:
    """A LoRA adapter: pairs by matrix, with PEFT's scaling lora_alpha / r multiplied into B.

    pairs: {matrix: (B [M, r], A [r, N])}, by the names of the base model; a matrix that is missing is unchanged
    base_model: name of the model, or None
    errors: {matrix: relative Frobenius error of B A against what it stands for}; 0 for an adapter that was read
    whole: leaves of names ("q_proj") of which every matrix of the model is adapted, as far as is known
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        base_model: str | None = None,
        errors: Mapping[str, float] | None = None,
        whole: frozenset[str] = frozenset(),
    ) -> None:
        self.pairs: dict[str, Pair] = {name: _pair(name, *pair) for name, pair in pairs.items()}
        if not self.pairs:
            raise InputError("the adapter changes no matrix at all: it would be the base model")
        self.base_model: str | None = base_model
        self.errors: dict[str, float] = dict(errors or {})
        self.whole: frozenset[str] = whole

    @property
    def ranks(self) -> dict[str, int]:
        """{matrix: r}."""
        return {name: pair.rank for name, pair in self.pairs.items()}

    @property
    def numel(self) -> int:
        """How many numbers A and B have, over all matrices."""
        return sum(t.numel() for pair in self.pairs.values() for t in pair)

    def equals(self, other: LoraAdapter) -> bool:
        """Whether another adapter has the same numbers for the same matrices."""
        return self.pairs.keys() == other.pairs.keys() and all(
            torch.equal(a, b) for name, pair in self.pairs.items() for a, b in zip(pair, other.pairs[name], strict=True)
        )

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError if the adapter does not fit matrices. shapes: {matrix: (M, N)}"""
        unknown = [n for n in self.pairs if n not in shapes]
        if unknown:
            raise InputError(
                f"it changes {len(unknown)} of {len(self.pairs)} matrices that are not patched: "
                f"{', '.join(unknown[:3])}; patch with targets that include them, or it is for another model"
            )
        for n, (B, A) in self.pairs.items():
            if (shape := (B.shape[0], A.shape[1])) != tuple(shapes[n]):
                raise InputError(f"{n} is {list(shape)} there, the model has {list(shapes[n])}")

    def digest(self) -> str:
        """sha256 of the pairs, 64 hexadecimal digits: the same for the same numbers, however their file was written."""
        hashed = hashlib.sha256()
        for name in sorted(self.pairs):
            for t in self.pairs[name]:
                hashed.update(f"{name}\0{list(t.shape)}\0".encode() + t.float().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write PEFT's adapter_config.json and adapter_model.safetensors, each whole or not at all.

        dtype: of the file
        lora_alpha is r, so that the scaling is 1. If the ranks differ, rank_pattern and alpha_pattern say so.
        Returns the folder. Raises OSError.
        """
        return write_adapter(folder, {n: (p.B, p.A) for n, p in self.pairs.items()}, self.base_model, self.whole, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> LoraAdapter:
        """Read an adapter that PEFT, or `save`, wrote. Arguments and errors: `peft_files.read_adapter`."""
        pairs, base_model = read_adapter(Path(folder))
        return cls(pairs, base_model)

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"LoraAdapter({len(self.pairs)} matrices, {rank}, {self.numel} numbers)"


def adapter_of(
    zs: Mapping[str, Tensor],
    factors: Mapping[str, Factor | Int8Factor],
    rank: int | None = None,
    max_error: float | None = None,
    uniform: bool = False,
    base_model: str | None = None,
) -> LoraAdapter:
    """The LoRA adapter of z by matrix. `Expert.to_lora` describes arguments and errors."""
    if rank is not None and max_error is not None:
        raise InputError(f"rank={rank} and max_error={max_error}: give one of them, it follows the other")
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank}; wanted at least 1, or None for all components that the expert changes")
    if max_error is not None and not 0 <= max_error < 1:
        raise InputError(f"max_error={max_error}; wanted a relative error of at least 0 and less than 1")
    changes = {n: _change(factors, n, z) for n, z in zs.items()}
    orders = {n: c.abs().argsort(descending=True, stable=True) for n, c in changes.items()}
    ranks = {n: _rank(changes[n][orders[n]], rank, max_error) for n in changes}
    if uniform:
        widest = max(ranks.values(), default=0)
        leaves = {_leaf(n) for n, r in ranks.items() if r}
        changes |= {n: torch.zeros(0, dtype=torch.float64) for n in factors if _leaf(n) in leaves and n not in changes}
        ranks = {n: widest for n in changes if _leaf(n) in leaves}
    pairs, errors = {}, {}
    for name, r in ranks.items():
        if not r:
            continue
        kept = orders.get(name, torch.zeros(0, dtype=torch.long))[:r]
        factor, change = factors[name], changes[name]
        B = factor.U[:, kept].float() * change[kept].float().to(factor.U.device)
        A = factor.V[:, kept].float().t()
        empty = r - len(kept)  # columns of zeros, if `uniform` asks for more than there are
        pairs[name] = pad(B, (0, empty)), pad(A, (0, 0, 0, empty))
        whole, lost = change.norm(), change.index_fill(0, kept, 0).norm()
        errors[name] = float(lost / whole) if whole else 0.0
    leaves = {_leaf(n) for n in pairs}
    whole_leaves = frozenset(leaf for leaf in leaves if all(n in pairs for n in factors if _leaf(n) == leaf))
    return LoraAdapter(pairs, base_model, errors, whole_leaves)


def project(
    adapter: LoraAdapter, factors: Mapping[str, Factor | Int8Factor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The z nearest to an adapter: z - 1 = diag(Uᵀ B A V) / sigma, least squares in the Frobenius norm.

    A change that rotates singular vectors, off the diagonal of Uᵀ B A V, is lost.

    Returns ({matrix: z [R]}, {matrix: ||diag|| / ||B A||, the share of the change that is kept}).
    Raises InputError for matrices that the factors lack or whose shape differs.
    """
    unknown = [n for n in adapter.pairs if n not in factors]
    if unknown:
        raise InputError(
            f"the adapter changes {len(unknown)} matrices that the factors do not have: {', '.join(unknown[:3])}; "
            "decompose with targets that include them"
        )
    z, kept = {}, {}
    for name, pair in adapter.pairs.items():
        U, sigma, V = _floating(factors, name)
        if (U.shape[0], V.shape[0]) != (pair.B.shape[0], pair.A.shape[1]):
            raise InputError(
                f"{name}: the adapter is for a matrix [{pair.B.shape[0]}, {pair.A.shape[1]}], the factors are of "
                f"[{U.shape[0]}, {V.shape[0]}]; it is for another model"
            )
        left, right = U.double().T @ pair.B.to(U).double(), pair.A.to(V).double() @ V.double()
        diagonal = (left * right.T).sum(1)
        known = sigma.double() > sigma[0].double() * 1e-12  # where sigma is 0, no z changes anything
        z[name] = (1 + torch.where(known, diagonal / sigma.double().clamp_min(1e-300), 0)).float().cpu()
        norm = pair.norm()
        kept[name] = float(diagonal.masked_fill(~known, 0).norm()) / norm if norm else 1.0
    return z, kept


def _pair(name: str, B: Tensor, A: Tensor) -> Pair:
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        raise InputError(f"{name}: B is {list(B.shape)} and A is {list(A.shape)}; wanted [M, r] and [r, N]")
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise InputError(f"{name}: its pair holds NaN or infinity; make the adapter again")
    return Pair(B.detach().cpu(), A.detach().cpu())


def _floating(factors: Mapping[str, Factor | Int8Factor], name: str) -> Factor:
    factor = factors[name]
    if isinstance(factor, Int8Factor):
        raise InputError(f"{name}: its factors are int8; give the fp32 or bf16 factors that they were made of")
    return factor


def _change(factors: Mapping[str, Factor | Int8Factor], name: str, z: Tensor) -> Tensor:
    """sigma (z - 1) [k] in fp64."""
    *_, stack, last = ["", *name.split(".")]
    if stack in STACKS and last.isdigit():
        raise InputError(
            f"{name} is a slice of a mixture-of-experts stack, for which PEFT has no LoRA of a matrix; merge the "
            "expert into the weights instead (--to merged, or unpatch_model(model, expert=...))"
        )
    sigma = _floating(factors, name).sigma
    if len(z) > len(sigma):
        raise InputError(
            f"{name}: the expert rescales {len(z)} components, the factors have the first {len(sigma)}; "
            "decompose with a larger rank, or truncate the expert"
        )
    return sigma[: len(z)].double().cpu() * (z.double() - 1)


def _rank(change: Tensor, rank: int | None, max_error: float | None) -> int:
    """How many components to keep of a change [k] that is sorted by size."""
    changed = int((change != 0).sum())
    if rank is not None:
        return min(rank, changed)
    if not max_error or not changed:
        return changed
    left = change.square().flip(0).cumsum(0).flip(0).sqrt()  # [i]: what is lost if the first i are kept
    return max(1, int((left > max_error * left[0]).sum()))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
