"""Frozen factors of a model's matrices, in memory or read one at a time from a directory, and what identifies them.

Singular vectors of near-equal singular values differ between algorithms, machines and dtypes, so an expert belongs to the factors that
it was trained on. Two things tell factors apart: a *fingerprint*, equal only for the same bytes, and a *sketch*, one number per component,
by which factors that were recomputed elsewhere are recognised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2kernels.storage import read_json, why_unreadable, write_json, write_tensors

from . import linalg
from .formats import FORMATS, check_format, convert
from .int8 import Int8Factor, kept_columns

FORMAT = 1
MANIFEST = "manifest.json"
SPECTRA = (
    "spectra.safetensors"  # sigma and sketch of every matrix, so that an expert is checked without opening the factors
)


class Factor(NamedTuple):
    """W = U diag(sigma) Vᵀ, or its leading components.

    U: [M, R] left singular vectors, as columns
    sigma: [R] fp32, descending
    V: [N, R] right singular vectors, as columns; a view of contiguous Vᵀ [R, N]
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        return self.sigma.numel()

    def cut(self, rank: int) -> Factor:
        """The leading `rank` components, as views."""
        return Factor(self.U[:, :rank], self.sigma[:rank], self.V[:, :rank])

    def to(self, *args, **kwargs) -> Factor:
        """U and V by `Tensor.to`; sigma follows the device and stays fp32."""
        U, V = self.U.to(*args, **kwargs), self.V.t().to(*args, **kwargs).t()
        return Factor(U, self.sigma.to(U.device), V)

    def columns(self, row: Tensor) -> Tensor:
        """What a row of a table [..., R] is for the columns of U and V: itself. (`Int8Factor` has other columns than components.)"""
        return row

    def dense(self, z: Tensor | None = None) -> Tensor:
        """U diag(sigma * z) Vᵀ [M, N] in fp32 or better; z [R] (None: all ones)."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        scale = self.sigma if z is None else self.sigma * z.to(self.sigma.device)
        return (self.U.to(dtype) * scale.to(dtype)) @ self.V.to(dtype).t()


def resolve_rank(rank: int | float | None, R: int) -> int:
    """How many of R components `rank` asks for: an int, at most R of them; a float in (0, 1), that fraction, at least 1; None, all.

    Raises ValueError for anything else.
    """
    if rank is None:
        return R
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(
            f"rank={rank!r}: wanted an int (components), a float in (0, 1) (a fraction of them) or None (all)"
        )
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"rank={rank}: wanted at least 1 component, or None for all")
        return min(rank, R)
    if not 0 < rank < 1:
        raise ValueError(
            f"rank={rank}: a float is a fraction in (0, 1); use an int for a number of components, None for all"
        )
    return max(1, int(rank * R + 1e-9))  # 0.29 * 100 is 28.999...


def svd(W: Tensor, rank: int | float | None = None) -> Factor:
    """W [M, N] = U diag(sigma) Vᵀ, or its leading `rank` components: computed in fp64 on W's device, returned in fp32.

    Raises ValueError where W is not a finite floating-point matrix.
    """
    W = W.detach()
    if W.dim() != 2 or not W.is_floating_point() or 0 in W.shape:
        raise ValueError(f"svd: wanted a floating-point matrix [M, N], got {W.dtype} {list(W.shape)}")
    if not torch.isfinite(W).all():
        raise ValueError(f"svd: the matrix {list(W.shape)} holds NaN or infinity")
    return keep(linalg.svd(W, resolve_rank(rank, min(W.shape))))


def keep(found: linalg.SVD, dtype: torch.dtype = torch.float32) -> Factor:
    """A decomposition as it is kept: U and V in `dtype`, sigma in fp32, U [M, R] and Vᵀ [R, N] contiguous."""
    return Factor(found.U.to(dtype).contiguous(), found.sigma.float(), found.Vt.to(dtype).contiguous().t())


def sketch(factor: Factor | Int8Factor) -> Tensor:
    """One number per component, (u_i · a)(v_i · b), the same whichever sign the decomposition gave u_i and v_i. [R] fp32, of order 1.

    a [M] and b [N] are fixed patterns of +1 and -1, from an integer hash of the position, so that every machine has the same ones.
    Its sum over components that share a singular value does not depend on the basis chosen among them: it is aᵀ(Σ u_i v_iᵀ)b.
    """
    a = linalg.signs(factor.U.shape[0], 1).to(factor.U.device)
    b = linalg.signs(factor.V.shape[0], 2).to(factor.V.device)
    dtype = torch.promote_types(factor.U.dtype, torch.float32)
    each = (a.to(dtype) @ factor.U.to(dtype)) * (b.to(dtype) @ factor.V.to(dtype))
    if isinstance(factor, Int8Factor):
        each = torch.zeros_like(factor.sigma).index_add_(0, factor.source, each * factor.fold)
    return each.float()


def fingerprint(factor: Factor | Int8Factor) -> str:
    """sha256 of shape, dtype and bytes of U, sigma and Vᵀ; of int8 factors also of source and fold."""
    h = hashlib.sha256(f"{list(factor.U.shape)} {list(factor.V.shape)} {factor.U.dtype}".encode())
    for t in _tensors(factor).values():
        h.update(_bytes(t))
    return h.hexdigest()


def combine_fingerprints(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint for all matrices: sha256 of their names and fingerprints in the order of the names."""
    return hashlib.sha256("\n".join(f"{n} {fingerprints[n]}" for n in sorted(fingerprints)).encode()).hexdigest()


def weight_hash(W: Tensor) -> str:
    """sha256 of dtype, shape and bytes of a weight as it is read."""
    h = hashlib.sha256(f"{list(W.shape)} {W.dtype}".encode())
    h.update(_bytes(W))
    return h.hexdigest()


def reconstruction_error(W: Tensor, factor: Factor | Int8Factor) -> float:
    """||W - U diag(sigma) Vᵀ|| / ||W||, Frobenius. 0 for a zero matrix that is reproduced."""
    wide = torch.float32 if W.device.type == "mps" else torch.float64
    # Rows in blocks: the difference is never held whole in fp64.
    scaled, off, total = factor.V.float() * factor.columns(factor.sigma), 0.0, 0.0
    for rows, u in zip(W.split(1024), factor.U.split(1024), strict=True):
        off += (rows.float() - u.float() @ scaled.t()).to(wide).square().sum().item()
        total += rows.to(wide).square().sum().item()
    return (off / total) ** 0.5 if total else off**0.5


class Factors(Mapping[str, Factor | Int8Factor]):
    """Factors of many matrices by name, all of one model.

    `Factors({name: Factor})` holds them in memory; `Factors.load(directory)` reads a matrix when it is asked for and keeps none.
    manifest: base model, revision, algorithm, dtype, and under "matrices" shape, rank, error, fingerprint and weight hash of each.
    """

    def __init__(
        self,
        factors: Mapping[str, Factor | Int8Factor],
        manifest: Mapping | None = None,
        sketches: Mapping[str, Tensor] | None = None,
    ):
        self._init(_Memory(dict(factors), dict(sketches or {}), dict(manifest or {})))

    def _init(self, source: _Memory | _Directory, ranks: Mapping[str, int] | None = None) -> None:
        self._source = source
        self.ranks: dict[str, int] = dict(ranks) if ranks is not None else {n: source.rank(n) for n in source.names}
        self.sketches: Mapping[str, Tensor] = _View(self.ranks, source.sketch, cut=True)
        self.sigmas: Mapping[str, Tensor] = _View(self.ranks, source.sigma, cut=True)
        self.fingerprints: Mapping[str, str] = _View(self.ranks, source.fingerprint)

    @property
    def manifest(self) -> dict:
        return self._source.manifest

    @property
    def fingerprint(self) -> str:
        """Of all matrices as they were decomposed; `cut` does not change it."""
        return combine_fingerprints(self.fingerprints)

    def shape(self, name: str) -> tuple[int, int]:
        """(M, N) of the matrix."""
        return self._source.shape(self._known(name))

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Open a directory that `save` or `decompose` wrote. Raises FileNotFoundError or ValueError that says what is wrong with it."""
        self = cls.__new__(cls)
        self._init(_Directory(Path(path)))
        return self

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file per matrix, then spectra and manifest; without a manifest it is not finished. Raises OSError."""
        path, known = Path(path), self.manifest.get("matrices", {})
        matrices = {n: write_matrix(path, n, f, self.sketches[n], known.get(n, {})) for n, f in self.items()}
        return finish_directory(path, {**self.manifest, "matrices": matrices}, self.sigmas, self.sketches)

    def cut(self, rank: int | float | None) -> Factors:
        """The leading components of each matrix, sharing memory or files. `rank` as in `resolve_rank`; a fraction is one of min(M, N)."""
        ranks = {n: min(r, resolve_rank(rank, min(self._source.shape(n)))) for n, r in self.ranks.items()}
        other = type(self).__new__(type(self))
        other._init(self._source, ranks)
        return other

    def to_format(self, format: str, out: str | Path | None = None, max_error: float | None = None) -> Factors:
        """The same factors in another format: "fp32", "bf16", "fp16" or "int8". Experts of these are experts of those.

        out: a directory to write to, one matrix at a time; None: the result is in memory
        max_error: largest relative error of a matrix; int8 spends residual columns until it holds (None: as `quantise` says)
        The manifest tells for each matrix the error that was reached and how it is measured, and int8's columns.
        Raises ValueError that names a matrix where max_error cannot be had, or whose factors are int8 already; OSError.
        """
        check_format(format, max_error)
        matrices, kept, known = {}, {}, self.manifest.get("matrices", {})
        for name, factor in self.items():
            factor, facts = convert(name, factor, format, max_error)
            record = {**{k: v for k, v in known.get(name, {}).items() if k not in ("file", "fingerprint")}, **facts}
            if "error" in record and "format_error" in facts:
                record["error"] = (record["error"] ** 2 + facts["format_error"] ** 2) ** 0.5
            if out is None:
                kept[name] = factor
                record["fingerprint"] = fingerprint(factor)
            else:
                record = write_matrix(Path(out), name, factor, self.sketches[name], record)
            matrices[name] = record
        manifest = {**self.manifest, "dtype": str(FORMATS[format]).removeprefix("torch."), "matrices": matrices}
        if out is None:
            return Factors(kept, manifest, dict(self.sketches))
        finish_directory(Path(out), manifest, self.sigmas, self.sketches)
        return Factors.load(out)

    def __getitem__(self, name: str) -> Factor | Int8Factor:
        return self._source.read(self._known(name), self.ranks[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __contains__(self, name: object) -> bool:
        return name in self.ranks

    def __repr__(self) -> str:
        return f"Factors({len(self)} matrices, {sum(self.ranks.values())} components, {self._source})"

    def _known(self, name: str) -> str:
        if name not in self.ranks:
            raise KeyError(
                f"no factors of {name!r}; there are {', '.join(list(self.ranks)[:4])}{', ...' if len(self) > 4 else ''}"
            )
        return name


class _Memory:
    def __init__(self, factors: dict[str, Factor | Int8Factor], sketches: dict[str, Tensor], manifest: dict):
        for name, factor in factors.items():
            if isinstance(factor, Int8Factor):
                continue
            U, sigma, V = factor
            if U.dim() != 2 or V.dim() != 2 or sigma.shape != (U.shape[1],) or U.shape[1] != V.shape[1]:
                raise ValueError(
                    f"{name}: wanted U [M, R], sigma [R], V [N, R], got {list(U.shape)}, {list(sigma.shape)}, {list(V.shape)}"
                )
        self._factors = {
            n: f if isinstance(f, Int8Factor) else Factor(f[0], f[1].float(), f[2]) for n, f in factors.items()
        }
        self._sketches, self.manifest, self.names = sketches, manifest, list(factors)
        self._fingerprints = {
            n: m["fingerprint"] for n, m in manifest.get("matrices", {}).items() if "fingerprint" in m
        }

    def __str__(self) -> str:
        return "in memory"

    def rank(self, name: str) -> int:
        return self._factors[name].rank

    def shape(self, name: str) -> tuple[int, int]:
        factor = self._factors[name]
        return factor.U.shape[0], factor.V.shape[0]

    def read(self, name: str, rank: int) -> Factor | Int8Factor:
        return self._factors[name].cut(rank)

    def sigma(self, name: str) -> Tensor:
        return self._factors[name].sigma

    def sketch(self, name: str) -> Tensor:
        if name not in self._sketches:
            self._sketches[name] = sketch(self._factors[name]).cpu()
        return self._sketches[name]

    def fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(self._factors[name])
        return self._fingerprints[name]


class _Directory:
    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise FileNotFoundError(
                f"no directory of factors at {path}; `decompose(model, out={str(path)!r})` makes one"
            )
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path} holds no {MANIFEST}: not a directory of factors, or its decomposition was cut short; run decompose again"
            )
        self.manifest = read_json(path / MANIFEST, "a manifest of factors")
        if self.manifest.get("format") != FORMAT or not isinstance(self.manifest.get("matrices"), dict):
            found = self.manifest.get("format")
            raise ValueError(
                f"{path / MANIFEST} has format {found!r}, this version reads {FORMAT}; update t2kernels or decompose again"
            )
        self._matrices: dict[str, dict] = self.manifest["matrices"]
        self.names = self.manifest.get("order") or list(self._matrices)

    def __str__(self) -> str:
        return str(self.path)

    def rank(self, name: str) -> int:
        return self._matrices[name]["rank"]

    def shape(self, name: str) -> tuple[int, int]:
        m, n = self._matrices[name]["shape"]
        return m, n

    def fingerprint(self, name: str) -> str:
        return self._matrices[name]["fingerprint"]

    def read(self, name: str, rank: int) -> Factor | Int8Factor:
        def get(f):
            U, sigma, Vt = (f.get_slice(f"{name}.{part}") for part in ("U", "sigma", "Vt"))
            if "runs" not in self._matrices[name]:
                return Factor(U[:, :rank], sigma[:rank], Vt[:rank].t())
            source, fold = f.get_tensor(f"{name}.source"), f.get_tensor(f"{name}.fold")
            kept = [slice(*ab) for ab in kept_columns(source, fold, self._matrices[name]["runs"], rank)]
            U, Vt = torch.cat([U[:, s] for s in kept], 1), torch.cat([Vt[s] for s in kept])
            source, fold = (torch.cat([t[s] for s in kept]) for t in (source, fold))
            return Int8Factor(U, sigma[:rank], Vt.t(), source, fold, tuple(s.stop - s.start for s in kept)).aligned()

        return self._open(self._matrices[name]["file"], get)

    def sigma(self, name: str) -> Tensor:
        return self._open(SPECTRA, lambda f: f.get_tensor(f"{name}.sigma"))

    def sketch(self, name: str) -> Tensor:
        return self._open(SPECTRA, lambda f: f.get_tensor(f"{name}.sketch"))

    def _open(self, file: str, get: Callable):
        path = self.path / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {self.path / MANIFEST} names it; run decompose again")
        try:
            with safe_open(path, framework="pt") as f:
                return get(f)
        except SafetensorError as e:
            raise ValueError(
                f"{path} cannot be read: {why_unreadable(path)} ({e}); delete it and run decompose again"
            ) from None


class _View(Mapping):
    """{name: get(name)}, read when asked for; cut: only its leading components, as many as the name's rank."""

    def __init__(self, ranks: Mapping[str, int], get: Callable, cut: bool = False):
        self._ranks, self._get, self._cut = ranks, get, cut

    def __getitem__(self, name: str):
        if name not in self._ranks:
            raise KeyError(name)
        return self._get(name)[: self._ranks[name]] if self._cut else self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def file_of(name: str) -> str:
    """The file of a matrix in a directory of factors."""
    return f"{quote(name, safe='')}.safetensors"


def write_matrix(directory: Path, name: str, factor: Factor | Int8Factor, sketched: Tensor, record: Mapping) -> dict:
    """Write one matrix as its own file, whole or not at all, and return its record, which also stands in the file's header."""
    record = {
        **record,
        "shape": [factor.U.shape[0], factor.V.shape[0]],
        "rank": factor.rank,
        "fingerprint": fingerprint(factor),
    }
    record["file"] = file_of(name)
    if isinstance(factor, Int8Factor):
        record["runs"] = list(factor.runs)
    tensors = {f"{name}.{part}": t for part, t in {**_tensors(factor), "sketch": sketched}.items()}
    (directory / MANIFEST).unlink(
        missing_ok=True
    )  # until `finish_directory`, nobody takes what lies there for finished
    write_tensors(directory / record["file"], tensors, {**record, "format": FORMAT, "name": name})
    return record


def finish_directory(
    directory: Path, manifest: Mapping, sigmas: Mapping[str, Tensor], sketches: Mapping[str, Tensor]
) -> Path:
    """Write spectra and, last, the manifest, which makes a directory of factors finished."""
    spectra = {f"{n}.sigma": t for n, t in sigmas.items()} | {f"{n}.sketch": t for n, t in sketches.items()}
    write_tensors(directory / SPECTRA, spectra)
    matrices = manifest["matrices"]
    whole = {n: m["fingerprint"] for n, m in matrices.items()}
    write_json(
        directory / MANIFEST,
        {**manifest, "format": FORMAT, "order": list(matrices), "fingerprint": combine_fingerprints(whole)},
    )
    return directory


def _tensors(factor: Factor | Int8Factor) -> dict[str, Tensor]:
    found = {"U": factor.U, "sigma": factor.sigma, "Vt": factor.V.t()}
    return found | ({"source": factor.source, "fold": factor.fold} if isinstance(factor, Int8Factor) else {})


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
