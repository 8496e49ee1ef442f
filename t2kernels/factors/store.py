"""`Factors`: the factors of many matrices of one model, in memory or in a directory, and writing such a directory.

A directory holds one safetensors file per matrix, the spectra of all of them, and a manifest. The manifest is written
last; a directory without it counts as incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2kernels import UnknownNameError
from t2kernels.storage import FileError, header, read_json, verify, why_unreadable, write_json, write_tensors

from . import schema
from .factor import Factor, read_factor, resolve_rank
from .formats import FORMATS, check_format, convert
from .identity import FactorsError, FactorsMissing, combine_fingerprints, fingerprint, sketch
from .int8 import Int8Factor

FORMAT = 1
MANIFEST = "manifest.json"
# sigma and sketch of every matrix, so that an expert is checked without opening the files of the factors
SPECTRA = "spectra.safetensors"
AGAIN = "delete it and run decompose again"

T = TypeVar("T")


class Factors(Mapping[str, Factor | Int8Factor]):
    """{matrix: its factors}, all of one model.

    `Factors({name: Factor})` holds them in memory. `Factors.load(directory)` reads a matrix at each access and keeps
    none in memory.

    ranks: {matrix: number of components}
    sigmas: {matrix: singular values [R] fp32}
    sketches: {matrix: sketch [R] fp32} (`identity.sketch`)
    fingerprints: {matrix: sha256 of its factors, before any `cut`}
    """

    def __init__(
        self,
        factors: Mapping[str, Factor | Int8Factor],
        manifest: Mapping[str, Any] | None = None,
        sketches: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._init(_Memory(dict(factors), dict(sketches or {}), dict(manifest or {})))

    def _init(self, source: _Memory | _Directory, ranks: Mapping[str, int] | None = None) -> None:
        self._source = source
        self.ranks: dict[str, int] = dict(ranks) if ranks is not None else {n: source.rank(n) for n in source.names}
        self.sketches: Mapping[str, Tensor] = _View(self.ranks, source.sketch, cut=True)
        self.sigmas: Mapping[str, Tensor] = _View(self.ranks, source.sigma, cut=True)
        self.fingerprints: Mapping[str, str] = _View(self.ranks, source.fingerprint)

    @property
    def manifest(self) -> dict[str, Any]:
        """base_model, revision, algorithm, dtype; under "matrices" shape, rank, error, fingerprint and weight hash of
        each."""
        return self._source.manifest

    @property
    def fingerprint(self) -> str:
        """One sha256 for all matrices as they were decomposed; `cut` does not change it."""
        return combine_fingerprints(self.fingerprints)

    def shape(self, name: str) -> tuple[int, int]:
        """(M, N) of the matrix."""
        return self._source.shape(self._known(name))

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Open a directory that `save` or `decompose` wrote.

        The manifest is checked here. The file of a matrix is compared with its digest when the matrix is read; a
        directory of an older version, which has no digests, with its fingerprint.
        Raises FileNotFoundError if it is missing or incomplete, FactorsError if it cannot be read.
        """
        self = cls.__new__(cls)
        self._init(_Directory(Path(path)))
        return self

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file per matrix, then the spectra, and the manifest last. Raises OSError."""
        path, known = Path(path), self.manifest.get("matrices", {})
        matrices = {n: write_matrix(path, n, f, self.sketches[n], known.get(n, {})) for n, f in self.items()}
        return finish_directory(path, {**self.manifest, "matrices": matrices}, self.sigmas, self.sketches)

    def cut(self, rank: int | float | None) -> Factors:
        """The leading components of each matrix, sharing memory or files.

        rank: as in `resolve_rank`; a fraction is a fraction of min(M, N)
        """
        ranks = {n: min(r, resolve_rank(rank, min(self._source.shape(n)))) for n, r in self.ranks.items()}
        other = type(self).__new__(type(self))
        other._init(self._source, ranks)
        return other

    def to_format(self, format: str, out: str | Path | None = None, max_error: float | None = None) -> Factors:
        """The same factors in another format. An expert trained on one format can be used with the other.

        format: "fp32", "bf16", "fp16" or "int8"
        out: a directory to write to, one matrix at a time; None: the result is in memory
        max_error: largest relative error of a matrix. int8 adds residual columns until it holds; None: the default of
            `quantise`
        The manifest of the result holds, for each matrix, the error reached, how it is measured, and int8's columns.
        Raises ValueError that names a matrix that cannot reach max_error, or that is int8 already; OSError.
        """
        check_format(format, max_error)
        matrices: dict[str, dict[str, Any]] = {}
        kept: dict[str, Factor | Int8Factor] = {}
        known = self.manifest.get("matrices", {})
        for name, factor in self.items():
            factor, facts = convert(name, factor, format, max_error)
            record = {
                **{k: v for k, v in known.get(name, {}).items() if k not in ("file", "fingerprint", "digest")},
                **facts,
            }
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
            raise UnknownNameError(
                f"no factors of {name!r}; there are {', '.join(list(self.ranks)[:4])}{', ...' if len(self) > 4 else ''}"
            )
        return name


class _Memory:
    """Factors in memory; sketches and fingerprints are computed at first use."""

    def __init__(
        self, factors: dict[str, Factor | Int8Factor], sketches: dict[str, Tensor], manifest: dict[str, Any]
    ) -> None:
        for name, factor in factors.items():
            if isinstance(factor, Int8Factor):
                continue
            U, sigma, V = factor
            if U.dim() != 2 or V.dim() != 2 or sigma.shape != (U.shape[1],) or U.shape[1] != V.shape[1]:
                raise FactorsError(
                    f"{name}: wanted U [M, R], sigma [R], V [N, R], "
                    f"got {list(U.shape)}, {list(sigma.shape)}, {list(V.shape)}"
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
    """Factors in a directory; each access opens a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise FactorsMissing(f"no directory of factors at {path}; `decompose(model, out={str(path)!r})` makes one")
        where = path / MANIFEST
        if not where.is_file():
            raise FactorsMissing(
                f"{path} holds no {MANIFEST}: it is not a directory of factors, or its decomposition was interrupted; "
                "run decompose again"
            )
        try:
            self.manifest = read_json(where, "a manifest of factors")
        except FileError as e:
            raise FactorsError(f"{e}; {AGAIN}") from None
        if self.manifest.get("format") != FORMAT:
            found = schema.shortened(self.manifest.get("format"))
            raise FactorsError(
                f"{where} has format {found}, this version reads {FORMAT}; update t2kernels or decompose again"
            )
        schema.check(self.manifest, schema.FACTORS, where, FactorsError, AGAIN)
        self._matrices: dict[str, dict[str, Any]] = self.manifest["matrices"]
        self.names: list[str] = self.manifest.get("order") or list(self._matrices)
        whole = combine_fingerprints({n: m["fingerprint"] for n, m in self._matrices.items()})
        if sorted(self.names) != sorted(self._matrices):
            raise FactorsError(f"{where}: order does not name each of the matrices once; {AGAIN}")
        if self.manifest.get("fingerprint", whole) != whole:
            raise FactorsError(f"{where}: fingerprint is not that of its matrices: it was changed; {AGAIN}")
        self._verified: dict[str, tuple[int, int, int]] = {}  # file -> its state when it was compared

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
        record = self._matrices[name]
        return self._open(
            record["file"], lambda path: check_matrix(path, name, record), lambda f: read_factor(f, name, record, rank)
        )

    def sigma(self, name: str) -> Tensor:
        return self._spectrum(name, "sigma")

    def sketch(self, name: str) -> Tensor:
        return self._spectrum(name, "sketch")

    def _spectrum(self, name: str, part: str) -> Tensor:
        def compare(path: Path) -> None:
            if verify(path) != self.manifest.get("spectra"):
                raise FileError(f"it is not the file that {MANIFEST} was written with")

        key, rank = f"{name}.{part}", self.rank(name)
        found = self._open(SPECTRA, compare, lambda f: f.get_tensor(key))
        sound = found.dtype == torch.float32 and found.shape == (rank,) and bool(torch.isfinite(found).all())
        if sound and "spectra" not in self.manifest:  # an older version wrote it: the file of the matrix holds it too
            sound = torch.equal(found, self._open(self._matrices[name]["file"], None, lambda f: f.get_tensor(key)))
        if not sound:
            raise FactorsError(f"{self.path / SPECTRA}: {key} is not what was written, [{rank}] finite fp32; {AGAIN}")
        return found

    def _open(self, file: str, compare: Callable[[Path], None] | None, get: Callable[[Any], T]) -> T:
        """Compare a file with what was written, unless that was done and it has not changed since, and read from it."""
        path = self.path / file
        if not path.is_file():
            raise FactorsMissing(f"{path} is missing, though {self.path / MANIFEST} names it; run decompose again")
        stat = path.stat()
        state = stat.st_ino, stat.st_size, stat.st_mtime_ns
        try:
            if compare and self._verified.get(file) != state:
                compare(path)
                self._verified[file] = state
            with safe_open(path, framework="pt") as f:
                return get(f)
        except SafetensorError as e:
            raise FactorsError(f"{path} cannot be read: {why_unreadable(path)} ({e}); {AGAIN}") from None
        except FileError as e:
            raise FactorsError(f"{path} is damaged: {e}; {AGAIN}") from None


def check_matrix(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compare the file of a matrix with its record in a manifest, and with its digest.

    Raises FileError if they differ, SafetensorError if the file cannot be read.
    """
    found = header(path) or {}
    if found.get("format") != FORMAT or found.get("name") != name or found.get("file") != file_of(name):
        raise FileError(f"it is not the file of {name}")
    if verify(path) != record.get("digest"):
        raise FileError(f"it is not the file that {MANIFEST} was written with: their digests differ")
    written = {k: v for k, v in found.items() if k not in ("format", "name")}
    expected = {k: v for k, v in record.items() if k != "digest"}
    if written != expected:
        parts: tuple[dict[str, Any], dict[str, Any]] = (written, expected)
        key = next(k for k in {**written, **expected} if any(k not in p for p in parts) or written[k] != expected[k])
        there, here = (schema.shortened(p[key]) if key in p else "missing" for p in parts)
        raise FileError(f"{name}: {key} is {there} in it and {here} in the manifest")
    with safe_open(path, framework="pt") as f:
        slices = {part: f.get_slice(f"{name}.{part}") for part in ("U", "sigma", "Vt")}
        (M, N), R = record["shape"], record["rank"]
        columns = sum(record.get("runs", [R]))
        for part, shape in (("U", [M, columns]), ("sigma", [R]), ("Vt", [columns, N])):
            if (got := slices[part].get_shape()) != shape:
                raise FileError(f"{name}.{part} is {got}, its manifest says {shape}")
        if "digest" not in record:  # an older version wrote it: only its fingerprint can be compared
            factor = read_factor(f, name, record, R)
            if not all(torch.isfinite(t).all() for t in factor.tensors().values()):
                raise FileError(f"{name} holds NaN or infinity")
            if fingerprint(factor) != record["fingerprint"]:
                raise FileError(f"the fingerprint of {name} is not that of its manifest")


class _View(Mapping[str, T]):
    """{name: get(name)}, read at each access. cut: only the leading components, as many as the rank of the name."""

    def __init__(self, ranks: Mapping[str, int], get: Callable[[str], T], cut: bool = False) -> None:
        self._ranks, self._get, self._cut = ranks, get, cut

    def __getitem__(self, name: str) -> T:
        if name not in self._ranks:
            raise UnknownNameError(name)
        return self._get(name)[: self._ranks[name]] if self._cut else self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def file_of(name: str) -> str:
    """The name of a matrix's file in a directory of factors."""
    return f"{quote(name, safe='')}.safetensors"


def write_matrix(
    directory: Path, name: str, factor: Factor | Int8Factor, sketched: Tensor, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one matrix as its own file, whole or not at all.

    sketched: its sketch [R]
    record: facts about it, which go into the header of the file
    Returns the record with shape, rank, fingerprint, file name and digest added. Raises FactorsError for NaN and
    infinity, OSError.
    """
    if not all(torch.isfinite(t).all() for t in factor.tensors().values()):
        raise FactorsError(f"{name}: its factors hold NaN or infinity and are not written; decompose it again")
    record = {
        **{k: v for k, v in record.items() if k != "digest"},
        "shape": [factor.U.shape[0], factor.V.shape[0]],
        "rank": factor.rank,
        "fingerprint": fingerprint(factor),
        "file": file_of(name),
    }
    if isinstance(factor, Int8Factor):
        record["runs"] = list(factor.runs)
    tensors = {f"{name}.{part}": t for part, t in {**factor.tensors(), "sketch": sketched}.items()}
    # The manifest is written last; without it the directory counts as incomplete.
    (directory / MANIFEST).unlink(missing_ok=True)
    digest = write_tensors(directory / record["file"], tensors, {**record, "format": FORMAT, "name": name})
    return {**record, "digest": digest}


def finish_directory(
    directory: Path, manifest: Mapping[str, Any], sigmas: Mapping[str, Tensor], sketches: Mapping[str, Tensor]
) -> Path:
    """Write the spectra and, last, the manifest, which makes a directory of factors complete. Raises OSError."""
    spectra = {f"{n}.sigma": t for n, t in sigmas.items()} | {f"{n}.sketch": t for n, t in sketches.items()}
    digest = write_tensors(directory / SPECTRA, spectra, {})
    matrices = manifest["matrices"]
    whole = combine_fingerprints({n: m["fingerprint"] for n, m in matrices.items()})
    facts = {"format": FORMAT, "order": list(matrices), "fingerprint": whole, "spectra": digest}
    write_json(directory / MANIFEST, {**manifest, **facts})
    return directory
