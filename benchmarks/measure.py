"""What every benchmark shares: interleaved timing, the facts that a number depends on, and rows that are appended,
never changed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from t2kernels import tiny

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds of one thing over several runs: median, and the middle half (`low` to `high`); ratio: the median of
    run-by-run ratios to the first."""

    median: float
    low: float
    high: float
    ratio: float


def interleaved(run: Mapping[str, Callable[[], object]], repeats: int = 9, warmup: int = 2) -> dict[str, Timing]:
    """Time each of `run` `repeats` times in turn, so that what disturbs the machine disturbs all alike. Ratios are to
    the first of them."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for i in range(warmup + repeats):
        for name, f in run.items():
            start = time.perf_counter()
            f()
            wait()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return timing(seconds)


def timing(seconds: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """What was measured in turn, run by run, as `Timing`s."""
    first = next(iter(seconds.values()))
    out = {}
    for name, found in seconds.items():
        low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
        ratio = statistics.median(a / b for a, b in zip(found, first, strict=True))
        out[name] = Timing(statistics.median(found), low, high, ratio)
    return out


def reset_peak(device: torch.device) -> int:
    """Bytes that are held now; what `peak` then says is of the time from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(
        OSError
    ):  # where the kernel does not let it, the peak is that of the whole process, which is no less
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes that were held since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def wait(device: torch.device | None = None) -> None:
    """Until a GPU has done what it was asked. device: None: the GPU, if there is one."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        torch.cuda.synchronize()


class WrongResult(Exception):
    """What was about to be timed computes something else."""


def require(what: str, error: float, allowed: float) -> float:
    """The error, if it is allowed. A wrong result gets no time: raises WrongResult, also where the error is NaN."""
    if not error <= allowed:
        raise WrongResult(f"{what}: relative error {error:.2g}, allowed {allowed:.2g}")
    return error


def machine(packages: Sequence[str] = ("torch", "transformers")) -> dict:
    """Machine, versions, commit and command: what the numbers depend on."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return {
        "machine": f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in packages},
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "command": shlex.join(["python", *_without_places(sys.argv)]),
    }


def version(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def able(arms: Sequence[str], report: Callable[[str], object] = print) -> list[str]:
    """The arms that can run here: those of PEFT need the package. What is left out is said."""
    if importlib.util.find_spec("peft") is not None:
        return list(arms)
    if left := [a for a in arms if a.startswith("PEFT")]:
        report(f"{', '.join(left)}: not run, peft is not installed")
    return [a for a in arms if a not in left]


def _without_places(arguments: Sequence[str]) -> list[str]:
    """A command line without where its files lie, which changes no number."""
    kept, skip = [], False
    for a in arguments:
        if not skip and a not in ("--out", "--cache", "--extension", "--data"):
            kept.append(a)
        skip = a in ("--out", "--cache", "--extension", "--data")
    return kept


def weights() -> str:
    """The first 12 hex digits of the SHA-256 of the built-in model's weights: what was made with others is not mistaken
    for theirs."""
    return hashlib.sha256((tiny.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


def append(path: Path, *rows: dict) -> None:
    """Add rows to a file of results, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def show(table: Table) -> None:
    """Print a table, wide enough for its lines also where the output is no terminal."""
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)
