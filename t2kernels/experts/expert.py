"""An expert: one vector z per matrix, W' = U diag(sigma * z) Vᵀ (Transformer², section 3.1). z = 1 is the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2kernels.factors.identity import Compared, ExpertError, ExpertMismatch, check_components
from t2kernels.factors.store import Factors
from t2kernels.storage import why_unreadable, write_tensors

if TYPE_CHECKING:
    from .origin import Origin

__all__ = ["Expert", "ExpertError", "ExpertMismatch", "make_scale", "truncation_error", "z_from_logits"]

FORMAT = 1
# What a file of this format may hold for a matrix. Kinds that a later format adds (an output scale "d") are refused by name, never dropped.
KINDS = ("z", "sketch")


class Expert:
    """z by matrix name, and where it came from.

    z: {matrix: [<= R] fp32}; a matrix that is missing, and the tail of one that is short, is 1: the base model
    manifest: base_model, fingerprint, fingerprints {matrix: sha256}, parametrisation, training facts; free-form, JSON
    sketch: {matrix: [>= len(z)]}, what the factors it was trained on look like (`factors.sketch`); kept in fp16
    Raises ExpertError where z is not a finite floating-point vector, or a sketch does not fit its z.
    """

    def __init__(
        self, z: Mapping[str, Tensor], manifest: Mapping | None = None, sketch: Mapping[str, Tensor] | None = None
    ):
        self.z = {name: _vector(name, v) for name, v in z.items()}
        self.manifest = dict(manifest or {})
        self.sketch: dict[str, Tensor] = {}
        for name, s in (sketch or {}).items():
            if name not in self.z:
                continue
            s, n = _vector(name, s, "sketch"), self.z[name].numel()
            if s.numel() < n:
                raise ExpertError(f"{name}: its sketch has {s.numel()} components, z has {n}; wanted one for each")
            self.sketch[name] = (
                s[:n].half().float()
            )  # rounded here as the file rounds it, so that saving changes nothing

    @classmethod
    def trained_on(cls, factors: Factors | Origin, z: Mapping[str, Tensor], **manifest) -> Expert:
        """An expert that knows the factors it belongs to: their base model, fingerprints and sketches stand in it."""
        facts = {k: factors.manifest[k] for k in ("base_model", "revision") if factors.manifest.get(k)}
        facts |= {
            "fingerprint": factors.fingerprint,
            "fingerprints": {n: factors.fingerprints[n] for n in z if n in factors},
        }
        return cls(z, {**facts, **manifest}, {n: factors.sketches[n] for n in z if n in factors})

    @property
    def numel(self) -> int:
        """How many numbers z has, over all matrices."""
        return sum(v.numel() for v in self.z.values())

    @property
    def ranks(self) -> dict[str, int]:
        """{matrix: how many leading components z covers}."""
        return {n: v.numel() for n, v in self.z.items()}

    def digest(self) -> str:
        """sha256 of z, 64 hexadecimal digits: the same for the same z, however its file was written. Manifest and sketch do not count."""
        hashed = hashlib.sha256()
        for name in sorted(self.z):
            z = self.z[name]
            hashed.update(f"{name}\0{z.numel()}\0".encode() + z.numpy().tobytes())
        return hashed.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file (the ending is added where it is missing), whole or not at all. Returns its path; raises OSError."""
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
        if not self.z:
            raise ExpertError(f"{path}: not saved, the expert has no matrix at all")
        tensors = {f"{n}.z": v for n, v in self.z.items()} | {f"{n}.sketch": s.half() for n, s in self.sketch.items()}
        try:
            manifest = json.loads(json.dumps(self.manifest))
        except (TypeError, ValueError) as e:
            raise ExpertError(f"{path}: not saved, its manifest is not JSON: {e}") from None
        return write_tensors(path, tensors, {"created_by": _version(), **manifest, "format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> Expert:
        """Read an expert; "experts/math" finds "experts/math.safetensors".

        Raises ExpertError: no such file, a pickle (never loaded), truncated, another kind of file, a newer format, a tensor that is
        not a finite fp32 vector.
        """
        path = find_file(path)
        try:
            with safe_open(path, framework="pt") as f:
                header = (f.metadata() or {}).get("t2kernels")
                if header is None:
                    raise ExpertError(
                        f"{path} is safetensors but not an expert: its header has no t2kernels manifest; Expert.save writes experts"
                    )
                manifest = _manifest(path, header)
                tensors = {key: f.get_tensor(key).clone() for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except SafetensorError as e:
            hint = (
                "; Expert.from_sakana reads the release's files"
                if "pickle" in why_unreadable(path)
                else "; copy or make it again"
            )
            raise ExpertError(f"{path} is not an expert: {why_unreadable(path)} ({e}){hint}") from None
        z, sketch = {}, {}
        for key, t in tensors.items():
            name, _, kind = key.rpartition(".")
            if kind not in KINDS or not name:
                raise ExpertError(
                    f"{path}: tensor {key!r} is of a kind that this version does not know ({', '.join(KINDS)}); "
                    f"it was written by {manifest.get('created_by', 'another version')}: update t2kernels"
                )
            if kind == "z" and t.dtype != torch.float32:
                raise ExpertError(
                    f"{path}: {name}: z is {t.dtype}, an expert's file holds torch.float32; make the file with Expert.save"
                )
            (z if kind == "z" else sketch)[name] = t
        if orphans := sorted(set(sketch) - set(z)):
            raise ExpertError(f"{path}: {orphans[0]} has a sketch but no z; make the file again with Expert.save")
        try:
            return cls(z, manifest, sketch)
        except ExpertError as e:
            raise ExpertError(f"{path}: {e}") from None

    @classmethod
    def from_sakana(cls, path: str | Path, *args, **kwargs) -> Expert:
        """An expert from a file of the authors' release: see `t2kernels.experts.sakana.load_expert`."""
        from .sakana import load_expert

        return load_expert(path, *args, **kwargs)

    @staticmethod
    def mix(weights: Mapping[Expert, float] | Iterable[tuple[Expert, float]]) -> Expert:
        """z = 1 + Σ a_k (z_k - 1) of {expert: a_k}, or of pairs; weights need not sum to 1.

        Where they do, it is the paper's Σ a_k z_k (section 3.2); for others the base model stays the fixed point.
        Raises ExpertError without experts or with a weight that is not finite, ExpertMismatch for experts of different factors.
        """
        pairs = list(weights.items() if isinstance(weights, Mapping) else weights)
        if not pairs:
            raise ExpertError("mix: no experts given; wanted {expert: weight}")
        for e, a in pairs:
            if not isinstance(e, Expert):
                raise ExpertError(f"mix: wanted {{Expert: weight}}, got a key of type {type(e).__name__}")
            if not torch.isfinite(torch.tensor(float(a))):
                raise ExpertError(f"mix: weight {a} is not finite")
        sketch: dict[str, Tensor] = {}
        z: dict[str, Tensor] = {}
        for e, a in pairs:
            for name, v in e.z.items():
                total = _pad(z.get(name, torch.ones(0, dtype=torch.float64)), v.numel())
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

    def truncate(self, k: int, sigmas: Mapping[str, Tensor] | None = None) -> Expert:
        """At most k components a matrix, the others set to 1.

        sigmas: {matrix: [R]}: keep the k with the largest sigma |z - 1|, which cost the most to lose; None: keep the first k.
        """
        if k < 1:
            raise ExpertError(f"truncate: k={k}; wanted at least 1")
        z = {}
        for name, v in self.z.items():
            if sigmas is None or v.numel() <= k:
                z[name] = v[:k].clone()
                continue
            if name not in sigmas or len(sigmas[name]) < v.numel():
                raise ExpertError(
                    f"truncate: {name}: wanted {v.numel()} singular values, got {len(sigmas[name]) if name in sigmas else 'none'}"
                )
            keep = (sigmas[name][: v.numel()].cpu() * (v - 1).abs()).topk(k).indices
            kept = torch.ones_like(v)
            kept[keep] = v[keep]
            z[name] = kept[: int(keep.max()) + 1]
        return Expert(z, self.manifest, self.sketch)

    def check(
        self,
        factors: Mapping,
        sketches: Mapping[str, Tensor] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Refuse a model, or factors, that this expert was not made for.

        factors: `Factors`, or {matrix: sigma [R]} with whatever else is known of them:
        sketches: {matrix: [R]} (`factors.sketch`); compared only for matrices whose fingerprint differs or is unknown
        fingerprints: {matrix: sha256}; equal ones pass at once
        ranks: {matrix: the longest z it takes}; min(M, N) by default where known, else the length of sigma

        Names and lengths are always checked. An expert without fingerprints and sketch (made by hand) passes beyond that.
        Raises ExpertMismatch.
        """
        sigmas = factors
        if isinstance(factors, Factors):
            sigmas, sketches, fingerprints = (
                factors.sigmas,
                sketches or factors.sketches,
                fingerprints or factors.fingerprints,
            )
            ranks = ranks or {n: min(factors.shape(n)) for n in factors}
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
                    f"{self._who()}: {name}: z has {v.numel()} components, the matrix has {limit}; it is for another model"
                )
        known = self.manifest.get("fingerprints", {})
        blind = [
            n
            for n in self.z
            if n in known and n not in self.sketch and (fingerprints or {}).get(n, known[n]) != known[n]
        ]
        if blind:
            raise ExpertMismatch(
                f"{self._who()}: the fingerprint of the factors of {_some(blind)} is not that of "
                "its training, and it has no sketch to compare them by; use the factors of its training"
            )
        rest = [n for n in self.sketch if not (fingerprints and n in known and fingerprints.get(n) == known[n])]
        if rest and sketches is not None:
            check_components(
                self._who(),
                {
                    n: Compared((self.z[n],), self.sketch[n], sketches[n].cpu(), sigmas[n].cpu())
                    for n in rest
                    if n in sketches
                },
            )

    def __eq__(self, other: object) -> bool:
        """The same z, bit for bit, for the same matrices."""
        if not isinstance(other, Expert):
            return NotImplemented
        return self.z.keys() == other.z.keys() and all(torch.equal(v, other.z[n]) for n, v in self.z.items())

    # By identity, as for tensors: two equal experts stay two keys of a dict given to `mix`.
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        facts = [f"{len(self.z)} matrices", f"{self.numel} numbers"]
        if self.z:
            facts.append(
                f"max |z - 1| = {max((v - 1).abs().max().item() if v.numel() else 0.0 for v in self.z.values()):.3g}"
            )
        facts += [str(self.manifest[k]) for k in ("name", "base_model") if self.manifest.get(k)]
        return f"Expert({', '.join(facts)})"

    def _who(self) -> str:
        name, base = self.manifest.get("name"), self.manifest.get("base_model")
        return f"expert{f' {name!r}' if name else ''}{f' (trained on {base})' if base else ''}"


def make_scale(z: Tensor, sigma: Tensor, form: str) -> Tensor:
    """The expert's row of a layer's table, [..., R] fp32: "factored" sigma * z, "delta" sigma * (z - 1); z [..., <= R] is padded with 1.

    Differentiable in z. Raises ValueError for another form or a z that is longer than sigma.
    """
    if z.shape[:-1] != sigma.shape[:-1] or z.shape[-1] > sigma.shape[-1]:
        raise ValueError(
            f"make_scale: z {list(z.shape)} does not fit sigma {list(sigma.shape)}; cut it, and see truncation_error for what that loses"
        )
    z, sigma = torch.nn.functional.pad(z.float(), (0, sigma.shape[-1] - z.shape[-1]), value=1.0), sigma.float()
    if form == "factored":
        return sigma * z
    if form == "delta":
        return sigma * (z - 1)
    raise ValueError(f"make_scale: form={form!r}; wanted 'factored' or 'delta'")


def truncation_error(z: Tensor, sigma: Tensor, k: int) -> float:
    """||dW - dW_k|| / ||dW|| (spectral) where only the first k components are kept: max_{i >= k} sigma_i|z_i - 1| / max_i sigma_i|z_i - 1|.

    0 if nothing is lost. z [<= R], sigma [>= len(z)].
    """
    if z.numel() > sigma.numel():
        raise ValueError(
            f"truncation_error: z has {z.numel()} components, sigma {sigma.numel()}; wanted the full spectrum"
        )
    change = sigma[: z.numel()].double() * (z.to(sigma.device).double() - 1).abs()
    lost = change[k:].max().item() if z.numel() > k else 0.0
    return lost / change.max().item() if lost else 0.0


def z_from_logits(p: Tensor, sigma: Tensor, trace_norm: bool = True, max_mult: float = 1.0) -> Tensor:
    """The authors' parametrisation: m = sigmoid(p) * max_mult; z = m Σ sigma / Σ(sigma m), which keeps Σ sigma_i z_i. Differentiable in p.

    p, sigma: [..., R]; trace_norm=False: z = m. With it, max_mult cancels, and a uniform p is the base model. Raises ValueError on other shapes.
    """
    if p.shape != sigma.shape:
        raise ValueError(f"z_from_logits: wanted p and sigma of one shape, got {list(p.shape)} and {list(sigma.shape)}")
    m = torch.sigmoid(p) * max_mult
    if not trace_norm:
        return m
    sigma = sigma.to(m)
    return m * (sigma.sum(-1, keepdim=True) / (sigma * m).sum(-1, keepdim=True))


def _vector(name: str, v: Tensor, kind: str = "z") -> Tensor:
    if not isinstance(v, Tensor) or not v.is_floating_point() or v.dim() != 1:
        what = f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise ExpertError(f"{name}: {kind} is {what}; wanted a floating-point vector [R]")
    v = v.detach().cpu().to(torch.float32, copy=True)
    bad = (~torch.isfinite(v)).nonzero()
    if len(bad):
        raise ExpertError(
            f"{name}: {kind} holds {v[bad[0]].item()} at component {bad[0].item()} ({len(bad)} in all are not finite); train it again"
        )
    return v


def _check_same_factors(experts: list[Expert]) -> None:
    """Each expert against the first one that has the matrix. Raises ExpertMismatch."""
    first: dict[str, Expert] = {}
    for e in experts:
        pairs, others = {}, {}
        for name in e.sketch:
            other = first.setdefault(name, e)
            mine, theirs = (
                e.manifest.get("fingerprints", {}).get(name),
                other.manifest.get("fingerprints", {}).get(name),
            )
            if other is not e and (mine is None or mine != theirs):
                pairs[name] = Compared((e.z[name], other.z[name]), e.sketch[name], other.sketch[name])
                others[other._who()] = None
        check_components(f"mix: {e._who()} and {' and '.join(others)}", pairs)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _pad(v: Tensor, n: int) -> Tensor:
    return torch.cat([v, v.new_ones(max(0, n - v.numel()))])


def find_file(path: str | Path) -> Path:
    """The file of an expert, with or without its ending. Raises ExpertError where there is none."""
    path = Path(path)
    for p in (path, path.with_name(path.name + ".safetensors")):
        if p.is_file():
            return p
    where = "is a directory" if path.is_dir() else "does not exist"
    raise ExpertError(
        f"{path} {where}, nor is there {path.name}.safetensors beside it; wanted the file that Expert.save wrote"
    )


def _manifest(path: Path, header: str) -> dict:
    try:
        manifest = json.loads(header)
        found = manifest.pop("format")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise ExpertError(
            f"{path} is not an expert: the manifest in its header is not one that Expert.save writes"
        ) from None
    if found != FORMAT:
        raise ExpertError(
            f"{path} has format {found!r}, written by {manifest.get('created_by', '?')}; this version reads {FORMAT}: update t2kernels"
        )
    return manifest


def _version() -> str:
    try:
        return f"t2kernels {metadata.version('t2kernels')}"
    except metadata.PackageNotFoundError:
        return "t2kernels"
