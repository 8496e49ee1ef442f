"""`decompose`: the factors of a model, or of a checkpoint on disk, one matrix at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2kernels import InputError, InputTypeError
from t2kernels.storage import FileError, header, verify

from . import linalg, schema
from .algorithms.leading import pays
from .checkpoint import Checkpoint, name_of
from .factor import Factor, keep, read_factor, reconstruction_error, resolve_rank
from .formats import FORMATS, check_format, convert
from .identity import TOLERANCE, FactorsError, fingerprint, sketch, weight_hash
from .int8 import Int8Factor
from .matrices import Matrix, Targets, find_matrices
from .store import FORMAT, Factors, check_matrix, file_of, finish_directory, write_matrix

Progress = Callable[[str, int, int], None]


def decompose(
    model_or_path: nn.Module | str | Path,
    out: str | Path | None = None,
    rank: int | float | None = None,
    targets: Targets = "all",
    device: torch.device | str | None = None,
    workers: int | None = None,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    max_error: float | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Compute W = U diag(sigma) Vᵀ in fp64 for every matrix that `targets` selects.

    model_or_path: a model; or the directory of a checkpoint, or its id on the hub, which is read matrix by matrix
    out: a directory to write to, one file per matrix; the result then reads from there. An interrupted run continues: a
        matrix that has a whole file (by digest), from the same weight (by hash), rank and dtype, is not computed again;
        a damaged file is made again, with a warning. None: the result is in memory, on the device of a model's weights
    rank: as in `resolve_rank`: the leading components only
    targets: as in `patch_model`
    device: where to compute; None: a GPU if there is one
    workers: matrices at a time; None: one per core, within half of the free memory; 1 on a GPU
    dtype: of the stored U and V: torch.float32 (None), bfloat16, float16 or float64
    format: "fp32", "bf16", "fp16" or "int8", instead of `dtype`
    max_error: with a format: the largest relative error that it may add to a matrix. int8 adds residual columns until
        it holds; None: about the error of an int8 weight with one step per row (`t2kernels.factors.quantise`)
    progress: called as progress(name, matrices done, matrices in all), on the calling thread

    Raises ValueError that names the matrix for a weight that is not finite, not floating point or not loaded;
    FileNotFoundError or ValueError for a path without a readable checkpoint; OSError if `out` cannot be written, where
    finished matrices stay.
    """
    if format is not None:
        check_format(format, max_error)
        if dtype is not None and dtype != FORMATS[format]:
            raise InputError(f"format={format!r} and dtype={dtype}: give one of them")
        dtype = torch.float32 if format == "int8" else FORMATS[format]
    elif max_error is not None:
        raise InputError(
            f"max_error={max_error}: it limits what a format loses; pass it with format='int8', 'fp16' or 'bf16'"
        )
    dtype = dtype or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise InputTypeError(
            f"dtype={dtype!r}: wanted a dtype of torch, such as torch.bfloat16; format= takes names, such as 'bf16'"
        )
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(
            f"dtype={dtype}: factors are kept in torch.float32, bfloat16, float16 or float64, or in format='int8'"
        )
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers}: wanted at least 1, or None")
    resolve_rank(rank, 1)
    if isinstance(model_or_path, nn.Module):
        base = name_of(model_or_path)
        matrices, read = find_matrices(model_or_path, targets), Matrix.read
    else:
        source = Checkpoint(model_or_path, targets)
        base, matrices, read = (source.name, source.revision), source.matrices, source.read
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = None if out is None else Path(out)
    job = _Job(read, rank, dtype, device, out, format, max_error)
    done = _map(job, matrices, *_share(matrices, device, workers), progress)
    manifest = {
        "base_model": base[0],
        "revision": base[1],
        "rank": rank,
        "dtype": job.kind,
        "algorithm": sorted({d.record["algorithm"] for d in done.values()}),
        "matrices": {n: d.record for n, d in done.items()},
    }
    sketches = {n: d.sketch for n, d in done.items()}
    if out is None:
        return Factors({n: d.factor for n, d in done.items() if d.factor is not None}, manifest, sketches)
    finish_directory(out, manifest, {n: d.sigma for n, d in done.items()}, sketches)
    return Factors.load(out)


@dataclass
class _Done:
    """One matrix that is finished. factor: None if it was written to a directory."""

    record: dict[str, Any]
    sigma: Tensor
    sketch: Tensor
    factor: Factor | Int8Factor | None


@dataclass
class _Job:
    """Decompose one matrix; read from a finished file if there is one."""

    read: Callable[[Matrix], Tensor]
    rank: int | float | None
    dtype: torch.dtype
    device: torch.device
    out: Path | None
    format: str | None
    max_error: float | None

    @property
    def kind(self) -> str:
        return str(FORMATS[self.format] if self.format else self.dtype).removeprefix("torch.")

    def __call__(self, m: Matrix) -> _Done:
        W = self.read(m)
        k = resolve_rank(self.rank, m.rank)
        record = {"weight_hash": weight_hash(W), "asked": k, "dtype": self.kind}
        if self.format:
            record["max_error"] = self.max_error
        if self.out is not None and (found := self._finished(self.out / file_of(m.name), m.name, record)):
            return found
        if not torch.isfinite(W).all():
            raise InputError(f"{m.name}: the weight {list(W.shape)} holds NaN or infinity; it has no decomposition")
        A = W.to(self.device)
        found = linalg.svd(A, k)
        if not found.residual <= linalg.TOLERANCE:
            raise InputError(
                f"{m.name}: the decomposition has a residual of {found.residual:.1e}, {linalg.TOLERANCE} is allowed; "
                "compute it on another device"
            )
        try:
            exact = keep(found)
            kept = exact if self.dtype == torch.float32 else keep(found, self.dtype)
        except ValueError as e:
            raise FactorsError(f"{m.name}: {e}") from None
        if self.format:
            kept, facts = convert(m.name, exact, self.format, self.max_error)
            record |= facts
        record |= {"algorithm": found.algorithm, "residual": found.residual}
        del found
        record["error"] = reconstruction_error(A.to(kept.U.device), kept)
        sketched = sketch(exact).cpu()  # before rounding to dtype, so that it does not depend on it
        if self.out is not None:
            return _Done(write_matrix(self.out, m.name, kept, sketched, record), kept.sigma.cpu(), sketched, None)
        record |= {"shape": list(m.shape), "rank": k, "fingerprint": fingerprint(kept)}
        return _Done(record, kept.sigma.cpu(), sketched, kept.to(W.device))

    def _finished(self, path: Path, name: str, wanted: dict[str, Any]) -> _Done | None:
        """What an earlier run wrote for a matrix; None if it was made from another weight, otherwise, or is damaged."""
        if not path.is_file():
            return None
        try:
            return _read(path, name, wanted)
        except (SafetensorError, FileError) as e:
            warnings.warn(f"{path} is damaged ({e}); {name} is decomposed again", stacklevel=2)
            return None


def _read(path: Path, name: str, wanted: dict[str, Any]) -> _Done | None:
    """Read a finished matrix. Raises FileError or SafetensorError if its file is damaged."""
    record = header(path)
    if record is None:
        return None  # another file
    schema.check(record, schema.WRITTEN, "its header", FileError, "it is not used")
    if record.pop("format") != FORMAT or record.pop("name") != name:
        return None
    if any(k not in record or record[k] != v for k, v in wanted.items()):
        return None
    schema.check(record, schema.DECOMPOSED, "its header", FileError, "it is not used")
    if digest := verify(path):
        record["digest"] = digest
    check_matrix(path, name, record)
    with safe_open(path, framework="pt") as f:
        sigma, sketched = (f.get_tensor(f"{name}.{part}") for part in ("sigma", "sketch"))
        factor = read_factor(f, name, record, record["rank"])
        again = sketched if digest else sketch(factor)
    if fingerprint(factor) != record["fingerprint"]:
        raise FileError("its factors are not those of the fingerprint in its header")
    # Without a digest the sketch is computed again, from factors that may have been rounded since.
    if sketched.shape != sigma.shape or not torch.allclose(sketched, again, rtol=TOLERANCE, atol=TOLERANCE):
        raise FileError(f"{name}.sketch {list(sketched.shape)} is not that of its factors")
    return _Done(record, sigma, sketched, None)


def _share(matrices: dict[str, Matrix], device: torch.device, workers: int | None) -> tuple[int, int]:
    """Matrices at a time, and threads for each."""
    cores = torch.get_num_threads()
    if workers is None and device.type != "cpu":
        workers = 1
    elif workers is None:
        # One thread per matrix is faster than many threads for one: half of eigh waits for memory. Two cores, two
        # 1024 x 4096 matrices: 1.0 s with 2 workers of 1 thread, 2.3 s with 1 worker of 2 threads.
        most = psutil.virtual_memory().available / 2 / max(working_set(*m.shape) for m in matrices.values())
        workers = max(1, min(cores, int(most)))
    workers = min(workers, len(matrices))
    return workers, max(1, cores // workers)


def working_set(M: int, N: int) -> int:
    """Peak bytes of one decomposition: weight and U in fp64, each with a copy, and squares of the smaller side."""
    R = min(M, N)
    return 8 * (4 * M * N + 4 * R * R)


def cpu_seconds(M: int, N: int, k: int) -> float:
    """Seconds of one core for k components, by measured rates: within a factor of two elsewhere.

    Measured on an AMD EPYC with AVX512-BF16 and the compiled extension, torch 2.13, bf16 weights, decaying spectra:
    block Lanczos 1.8 s for 256 components of 4096 x 4096, 3.0 s of 14336 x 4096 and 12.6 s of 8192 x 28672; the
    exact path 19.6 s and 24.1 s of the first two. A flat spectrum takes twice as long; torch's products, without
    the extension, 1.6 times.
    """
    R = min(M, N)
    if pays(M, N, k):  # the Gram matrix, products with A in fp64, and the space and the corrections on the smaller side
        return 2.8e-12 * M * N * R + 6e-11 * M * N * k + 2.8e-10 * R * R * k
    return 2 * M * N * R / 53e9 + 2.3e-10 * R**3


def _map(
    job: _Job, matrices: dict[str, Matrix], workers: int, threads: int, progress: Progress | None
) -> dict[str, _Done]:
    report = progress or (lambda name, done, total: None)
    if workers == 1:
        done = {}
        for i, (name, m) in enumerate(matrices.items()):
            done[name] = job(m)
            report(name, i + 1, len(matrices))
        return done
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        futures = {pool.submit(job, m): name for name, m in matrices.items()}
        done = {}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            report(futures[future], len(done), len(matrices))
        return {name: done[name] for name in matrices}
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # MKL keeps one number for the process
