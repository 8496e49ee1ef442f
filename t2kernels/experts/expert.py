"""`Expert`: one vector z per matrix, W' = U diag(sigma * z) Vᵀ (Transformer², section 3.1). z = 1 is the base model."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import Compared, ExpertError, ExpertMismatch, check_components
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.store import Factors

from .exchange import hub
from .files import find_file, read_file, require_file, write_file
from .origin import Origin

if TYPE_CHECKING:
    from .exchange.lora import LoraAdapter

__all__ = ["Expert", "ExpertError", "ExpertMismatch"]


class Expert:
    """z by matrix, and where it came from.

    z: {matrix: [<= R] fp32}; components beyond the end of z, and matrices that are missing, are 1: the base model
    manifest: free-form JSON; base_model, fingerprint, fingerprints {matrix: sha256}, parametrisation, facts of training
    sketch: {matrix: [>= len(z)]}, marks of the factors it was trained on (`factors.sketch`); kept in fp16 precision

    Raises ExpertError if z is not a finite floating-point vector, or if a sketch is shorter than its z.
    """

    def __init__(
        self,
        z: Mapping[str, Tensor],
        manifest: Mapping[str, Any] | None = None,
        sketch: Mapping[str, Tensor] | None = None,
    ):
        self.z: dict[str, Tensor] = _vectors(z)
        self.manifest: dict[str, Any] = dict(manifest or {})
        self.sketch: dict[str, Tensor] = {}
        # Rounded here as the file rounds it, so that a saved expert equals this one.
        for name, s in _vectors({n: s for n, s in (sketch or {}).items() if n in self.z}, "sketch", torch.half).items():
            n = self.z[name].numel()
            if s.numel() < n:
                raise ExpertError(f"{name}: its sketch has {s.numel()} components, z has {n}; wanted one for each")
            self.sketch[name] = s[:n]

    @classmethod
    def trained_on(cls, factors: Factors | Origin, z: Mapping[str, Tensor], **manifest: Any) -> Expert:
        """An expert that records which factors it belongs to: their base model, fingerprints and sketches."""
        facts: dict[str, Any] = {k: factors.manifest[k] for k in ("base_model", "revision") if factors.manifest.get(k)}
        facts["fingerprint"] = factors.fingerprint
        facts["fingerprints"] = {n: factors.fingerprints[n] for n in z if n in factors}
        return cls(z, {**facts, **manifest}, {n: factors.sketches[n] for n in z if n in factors})

    @property
    def numel(self) -> int:
        """How many numbers z has, over all matrices."""
        return sum(v.numel() for v in self.z.values())

    @property
    def ranks(self) -> dict[str, int]:
        """{matrix: number of leading components that z covers}."""
        return {n: v.numel() for n, v in self.z.items()}

    def digest(self) -> str:
        """sha256 of z, 64 hexadecimal digits: the same for the same z, however its file was written. Manifest and
        sketch do not count."""
        hashed = hashlib.sha256()
        for name in sorted(self.z):
            z = self.z[name]
            hashed.update(f"{name}\0{z.numel()}\0".encode() + z.numpy().tobytes())
        return hashed.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, whole or not at all; the suffix is added if it is missing.

        Returns the file's path. Raises ExpertError (no matrices, a manifest that is not JSON), OSError.
        """
        if not self.z:
            raise ExpertError(f"{path}: not saved, the expert has no matrix at all")
        return write_file(path, self.z, self.sketch, self.manifest)

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Expert:
        """Read an expert; "experts/math" finds "experts/math.safetensors".

        path: a file; or, as a string, "user/repo" or "user/repo:file" on the hub, if there is no such file. The file in
            a repository is "expert.safetensors" unless it is named. Without a network the hub's cache is used
        revision: of the repository: a branch, a tag or a commit; None: the newest

        Raises ExpertError: no such file, a pickle (never loaded), a truncated file, another kind of file, a newer
        format, a tensor that is not a finite fp32 vector. Raises HubError.
        """
        found = hub.address(path) if isinstance(path, str) and find_file(path) is None else None
        file = require_file(path) if found is None else hub.fetch(*found, revision)
        z, sketch, manifest = read_file(file)
        try:
            return cls(z, manifest, sketch)
        except ExpertError as e:
            raise ExpertError(f"{file}: {e}") from None

    def push_to_hub(self, repo: str, file: str = hub.FILE, private: bool = False) -> str:
        """Upload the expert and a model card made of its manifest, in one commit.

        repo: "user/name"; it is made if there is none
        file: name of the file in it; several experts may be in one repository
        private: whether a new repository is private

        `Expert.load(repo)`, or `Expert.load("repo:file")`, reads it. The card is written with the default file, and
        with another if the repository has none. Returns the address of the repository. Raises HubError.
        """
        target = hub.address(f"{repo}:{file}")
        if target is None:
            raise ExpertError(f'{repo!r} and {file!r}; wanted a repository "user/name" and the name of a file in it')
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / hub.FILE)
            return hub.upload(path, *target, hub.card(self.manifest, self.ranks, *target), private)

    @classmethod
    def from_sakana(
        cls,
        path: str | Path,
        factors: Mapping[str, Any],
        base_model: str | None = None,
        mask: str = "identity",
    ) -> Expert:
        """An expert from a file of the authors' release. Arguments and errors: `t2kernels.experts.sakana.load_z`."""
        from .sakana import load_z

        z, manifest = load_z(path, factors, base_model, mask)
        return cls.trained_on(factors, z, **manifest) if isinstance(factors, Factors) else cls(z, manifest)

    def to_lora(
        self,
        factors: Mapping[str, Factor | Int8Factor],
        rank: int | None = None,
        max_error: float | None = None,
        uniform: bool = False,
    ) -> LoraAdapter:
        """This expert as a LoRA adapter: W' - W = B A with B = U_k diag(sigma (z - 1)), A = V_kᵀ.

        factors: that the expert belongs to, in floating point
        rank: of each matrix, at most: the components with the largest |sigma (z - 1)|; None: all that change
        max_error: keep as few components as leave a relative Frobenius error of at most this in each matrix,
            sqrt(Σ over the others (sigma_i (z_i - 1))²) / ||sigma (z - 1)||
        uniform: one rank for all matrices, and a pair for every matrix of a name ("q_proj"), with columns of zeros
            where there is nothing to add. llama.cpp and SGLang read only such adapters right

        Without rank and max_error the adapter is the expert, within rounding. `LoraAdapter.errors` has the errors.
        Raises ExpertMismatch (other factors), InputError (int8 factors, mixture-of-experts stacks, no change at all).
        """
        from .exchange.lora import adapter_of

        self.check(factors if isinstance(factors, Factors) else {n: f.sigma for n, f in factors.items()})
        return adapter_of(self.z, factors, rank, max_error, uniform, self.manifest.get("base_model"))

    @classmethod
    def from_lora(
        cls, adapter: LoraAdapter | str | Path, factors: Mapping[str, Factor | Int8Factor], **manifest: Any
    ) -> Expert:
        """The expert nearest to a LoRA adapter: z - 1 = diag(Uᵀ B A V) / sigma, least squares in the Frobenius norm.

        adapter: or the folder where PEFT saved it
        factors: of its base model
        manifest: facts for the expert's manifest

        Most of an adapter is lost: it may rotate singular vectors, an expert rescales them. The manifest states under
        "kept" the share ||U diag(sigma (z - 1)) Vᵀ|| / ||B A|| of each matrix. `ExpertBank.add` runs an adapter as it
        is.
        Raises MissingFileError, InputError (no LoRA adapter, or one of another model).
        """
        from .exchange.lora import LoraAdapter, project

        found = adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter)
        z, kept = project(found, factors)
        facts = {"kept": {n: round(share, 6) for n, share in kept.items()}, **manifest}
        return cls.trained_on(factors, z, **facts) if isinstance(factors, Factors) else cls(z, facts)

    @staticmethod
    def mix(weights: Mapping[Expert, float] | Iterable[tuple[Expert, float]]) -> Expert:
        """z = 1 + Σ a_k (z_k - 1).

        weights: {expert: a_k}, or pairs. If they sum to 1, this is the paper's Σ a_k z_k (section 3.2). They need not:
            the base model stays the fixed point.

        Raises ExpertError without experts or with a weight that is not finite, ExpertMismatch for experts of different
        factors.
        """
        given = weights.items() if isinstance(weights, Mapping) else weights
        pairs = list(cast("Iterable[tuple[Expert, float]]", given))
        if not pairs:
            raise ExpertError("mix: no experts given; wanted {expert: weight}")
        for e, a in pairs:
            if not isinstance(e, Expert):
                raise ExpertError(f"mix: wanted {{Expert: weight}}, got a key of type {type(e).__name__}")
            if not math.isfinite(float(a)):
                raise ExpertError(f"mix: weight {a} is not finite")
        sketch: dict[str, Tensor] = {}
        z: dict[str, Tensor] = {}
        for e, a in pairs:
            for name, v in e.z.items():
                total = _pad(z.get(name, torch.ones(0, dtype=torch.float64, device="cpu")), v.numel())
                total[: v.numel()] += float(a) * (v.double() - 1)
                z[name] = total
            for name, s in e.sketch.items():
                if s.numel() > sketch.get(name, s[:0]).numel():
                    sketch[name] = s
        _check_same_factors([e for e, _ in pairs])
        manifest = {k: v for k, v in pairs[0][0].manifest.items() if all(e.manifest.get(k) == v for e, _ in pairs)}
        prints = {n: h for e, _ in pairs for n, h in e.manifest.get("fingerprints", {}).items()}
        if prints:
            manifest["fingerprints"] = prints
        manifest["mixed"] = [[e.manifest.get("name"), float(a)] for e, a in pairs]
        return Expert(z, manifest, {n: s for n, s in sketch.items() if s.numel() >= z[n].numel()})

    def interpolate(self, other: Expert, t: float) -> Expert:
        """(1 - t) self + t other."""
        return Expert.mix([(self, 1 - t), (other, t)])

    def truncate(self, k: int) -> Expert:
        """The expert with only the first k components of each matrix; the others become 1."""
        if k < 1:
            raise ExpertError(f"truncate: k={k}; wanted at least 1")
        return Expert({name: v[:k].clone() for name, v in self.z.items()}, self.manifest, self.sketch)

    def check(
        self,
        factors: Factors | Origin | Mapping[str, Tensor],
        sketches: Mapping[str, Tensor] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Refuse a model, or factors, that this expert was not made for.

        factors: of the model, which bring the other arguments along; or {matrix: sigma [R]} with these:
        sketches: {matrix: [R]} (`factors.sketch`); compared only for matrices whose fingerprint differs or is unknown
        fingerprints: {matrix: sha256}; a matrix with an equal fingerprint passes at once
        ranks: {matrix: largest length of z}; the length of sigma by default

        Names and lengths are always checked. An expert without fingerprints and sketch (made by hand) then passes.
        Raises ExpertMismatch.
        """
        if isinstance(factors, (Factors, Origin)):
            sketches = sketches or factors.sketches
            fingerprints = fingerprints or factors.fingerprints
            if ranks is None:
                ranks = factors.ranks if isinstance(factors, Origin) else {n: min(factors.shape(n)) for n in factors}
            sigmas: Mapping[str, Tensor] = factors.sigmas
        else:
            sigmas = factors
        unknown = [n for n in self.z if n not in sigmas]
        if unknown:
            raise ExpertMismatch(
                f"{self._who()} has {len(unknown)} of {len(self.z)} matrices that the model does not: {_some(unknown)} "
                f"(the model's are {_some(sigmas)}); it is for another model, or for other targets"
            )
        for name, v in self.z.items():
            limit = (ranks or {}).get(name, len(sigmas[name]))
            if v.numel() > limit:
                raise ExpertMismatch(
                    f"{self._who()}: {name}: z has {v.numel()} components, the matrix has {limit}; "
                    "it is for another model"
                )
        known, given = self.manifest.get("fingerprints", {}), fingerprints or {}
        blind = [n for n in self.z if n in known and n not in self.sketch and given.get(n, known[n]) != known[n]]
        if blind:
            raise ExpertMismatch(
                f"{self._who()} cannot be verified: the model has other factors of {_some(blind)} (by fingerprint) "
                "than at training time, and the expert has no sketch to compare; use the factors it was trained with"
            )
        rest = [n for n in self.sketch if n not in known or given.get(n) != known[n]]
        if rest and sketches is not None:
            found = {
                n: Compared((self.z[n],), self.sketch[n], sketches[n].cpu(), sigmas[n].cpu())
                for n in rest
                if n in sketches
            }
            check_components(self._who(), found)

    def __eq__(self, other: object) -> bool:
        """Whether z is the same, bit for bit, for the same matrices."""
        if not isinstance(other, Expert):
            return NotImplemented
        return self.z.keys() == other.z.keys() and all(torch.equal(v, other.z[n]) for n, v in self.z.items())

    def __hash__(self) -> int:
        """By identity, as for tensors: two equal experts stay two keys of a dict given to `mix`."""
        return object.__hash__(self)

    def __repr__(self) -> str:
        facts = [f"{len(self.z)} matrices", f"{self.numel} numbers"]
        if self.z:
            largest = max((v - 1).abs().max().item() if v.numel() else 0.0 for v in self.z.values())
            facts.append(f"max |z - 1| = {largest:.3g}")
        facts += [str(self.manifest[k]) for k in ("name", "base_model") if self.manifest.get(k)]
        return f"Expert({', '.join(facts)})"

    def _who(self) -> str:
        name, base = self.manifest.get("name"), self.manifest.get("base_model")
        return f"expert{f' {name!r}' if name else ''}{f' (trained on {base})' if base else ''}"


def _vectors(given: Mapping[str, Tensor], kind: str = "z", rounded: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """{matrix: [R] fp32 on the CPU}, copies that share one memory, rounded to a dtype. Raises ExpertError.

    One check and one cast of all: a model has hundreds of matrices, and one by one they take milliseconds.
    """
    for name, v in given.items():
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.dim() != 1:
            what = f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            raise ExpertError(f"{name}: {kind} is {what}; wanted a floating-point vector [R]")
    if not given:
        return {}
    whole = torch.cat([v.detach().to("cpu", torch.float32) for v in given.values()])
    made = dict(zip(given, whole.split([v.numel() for v in given.values()]), strict=True))
    if not torch.isfinite(whole).all():
        name, v = next((n, v) for n, v in made.items() if not torch.isfinite(v).all())
        bad = (~torch.isfinite(v)).nonzero()
        raise ExpertError(
            f"{name}: {kind} holds {v[bad[0]].item()} at component {bad[0].item()} "
            f"({len(bad)} in all are not finite); train it again"
        )
    if rounded != torch.float32:
        whole.copy_(whole.to(rounded))
    return made


def _check_same_factors(experts: list[Expert]) -> None:
    """Compare each expert with the first one that has the matrix. Raises ExpertMismatch."""
    first: dict[str, Expert] = {}
    for e in experts:
        pairs: dict[str, Compared] = {}
        others: dict[str, None] = {}
        for name in e.sketch:
            other = first.setdefault(name, e)
            mine, theirs = (x.manifest.get("fingerprints", {}).get(name) for x in (e, other))
            if other is not e and (mine is None or mine != theirs):
                pairs[name] = Compared((e.z[name], other.z[name]), e.sketch[name], other.sketch[name])
                others[other._who()] = None
        check_components(f"mix: {e._who()} and {' and '.join(others)}", pairs)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _pad(v: Tensor, n: int) -> Tensor:
    return torch.cat([v, v.new_ones(max(0, n - v.numel()))])
