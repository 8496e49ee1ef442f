"""Check the kernels on this GPU, then time them for the shapes of a model, offline: `t2 tune`.

The results go into table files (tables.py). Without the checks in a table `auto` does not use the kernels. `tune` also
keeps the fastest tiles of the Triton kernels, and up to how many tokens they beat two library matmuls; `tune_cuda` up
to how many tokens the CUDA kernel beats Triton's. Nothing is timed while a model runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels import StateError, T2Error
from t2kernels.ops.device import DECODE_TOKENS, PAIR_TOKENS
from t2kernels.ops.dispatch import ImplUnavailableError
from t2kernels.ops.impls import cuda_kernels
from t2kernels.ops.impls.cuda_kernels import CUDA
from t2kernels.ops.impls.implementation import Operands
from t2kernels.ops.impls.torch_kernels import forward as forward_mm
from t2kernels.ops.impls.triton import TRITON
from t2kernels.ops.planner import Call

from .predict import candidates
from .selfcheck import Case, selfcheck
from .tables import Timed, read_table, timed, user_folder, write_cuda_table, write_table
from .tiles import Tiles, tiles

TOKENS = (1, 8, 32, 128)
CROSSOVER = (32, 64, 96, 128, 160, 192, 256, 384)
DECODE = (1, 2, 4, 8, 16, 32)


class Shape(NamedTuple):
    """Matrices that run as one call.

    N: in_features; M, C: out_features and columns of each member
    base: whether a base is added
    x, factors: dtypes
    """

    N: int
    M: tuple[int, ...]
    C: tuple[int, ...]
    base: bool
    x: torch.dtype
    factors: torch.dtype


class WrongResultError(T2Error, RuntimeError):
    """A kernel does not compute the reference on this device. Nothing was timed or written."""


Timer = Callable[[Callable[[], object]], float]
"""f -> seconds of a call of f."""
Progress = Callable[[str, int, int], object]
"""(what was timed, jobs done, jobs in all)."""


class Job(NamedTuple):
    """One shape at one T: the tiles of its shrink and of its expand."""

    shape: Shape
    T: int

    @property
    def launches(self) -> dict[str, tuple[int, int]]:
        """{kernel: (rows, K)}, as in `tiles.tiles`."""
        s = self.shape
        return {"shrink": (sum(s.C), s.N), "expand": (sum(s.M), max(s.C))}

    def timed(self, kernel: str) -> Timed:
        """The entry of a launch in a table."""
        return (kernel, self.T, *self.launches[kernel], self.shape.x, self.shape.factors)

    def rule(self, capability: tuple[int, int]) -> dict[str, Tiles]:
        """{kernel: the tiles of the rule}."""
        x, w = self.shape.x, self.shape.factors
        return {k: tiles(k, self.T, rows, K, x, w, capability) for k, (rows, K) in self.launches.items()}

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.shape.M))} x {self.shape.N}, T={self.T}"


def jobs(shapes: Sequence[Shape], tokens: Sequence[int] = TOKENS) -> list[Job]:
    """What `tune` times, in its order: few tokens first, members of a group that are asked for alone last. A job whose
    launches are those of earlier ones is left out."""
    distinct = list(dict.fromkeys(shapes))
    seen: set[Timed] = set()
    found = []
    for alone in (False, True):
        for job in (Job(s, T) for T in tokens for s in distinct if _is_member(s, distinct) == alone):
            new = {job.timed(kernel) for kernel in job.launches} - seen
            if new:
                seen |= new
                found.append(job)
    return found


def _is_member(shape: Shape, shapes: Sequence[Shape]) -> bool:
    """True for a matrix that is also a member of a group among `shapes`."""
    if len(shape.M) > 1:
        return False
    mine = (shape.M[0], shape.C[0])
    groups = (s for s in shapes if len(s.M) > 1 and (s.N, *s[3:]) == (shape.N, *shape[3:]))
    return any(mine in zip(s.M, s.C, strict=True) for s in groups)


class Clock:
    """What is left of a time limit.

    seconds: from now on; None: no limit
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds: float | None = seconds
        self._start: float = time.monotonic()

    def is_over(self, share: float = 1.0) -> bool:
        """True once this share of the limit has passed."""
        return self._seconds is not None and time.monotonic() - self._start >= share * self._seconds


def tune(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    tokens: Sequence[int] = TOKENS,
    folder: Path | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
    seconds: float | None = None,
) -> Path:
    """Check the Triton kernels, time them, write the table of this GPU; returns its path. Takes minutes.

    The table is written after each job, and has `"jobs": [done, of]`. A run that was stopped goes on where it was: what
    its table has is not checked or timed again. Entries of other shapes stay.

    shapes: the calls to tune for; tokens: T of each
    folder: where the table goes; None: `user_folder()`
    timer: None for Triton's own benchmark, which empties the L2 cache before each run
    progress: called after each job
    check: gives the cases that must be right before anything is timed; None for `selfcheck` of the Triton kernels
    seconds: a time limit; the most valuable jobs come first. None: until all are done

    Raises ImplUnavailableError if Triton cannot run, WrongResultError if a check fails, OSError if the table cannot
    be written.
    """
    device, clock = torch.device(device), Clock(seconds)
    if reason := TRITON.unsupported_device(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {reason}")
    import triton

    folder = folder or user_folder()
    there = read_table(_name(device), triton.__version__, folder) or {"tiles": {}}
    done, of = there.get("jobs", (0, 0))
    goes_on = done < of and there.get("checked", {}).get("torch") == torch.__version__
    facts: dict[str, Any] = {k: there[k] for k in ("pair_tokens", "pair_and_mm_us") if k in there}
    facts["checked"] = (
        there["checked"] if goes_on else verdict(checked(check() if check else selfcheck(device, "triton")))
    )
    best = timed(there)
    asked = jobs(shapes, tokens)
    ready = set(best) if goes_on else set()
    finished = 0

    def write() -> Path:
        state = facts | {"jobs": [finished, len(asked) + 1]}
        return write_table(_name(device), triton.__version__, best, folder, **state)

    def run(some: Iterable[Job], share: float) -> None:
        nonlocal finished
        for job in some:
            if clock.is_over(share):
                break
            best.update(_best_tiles(job, best, ready, device, timer or _cold))
            finished += 1
            write()
            if progress:
                progress(str(job), finished, len(asked) + 1)

    path = write()
    members = [s for s in shapes if _is_member(s, shapes)]
    run((j for j in asked if j.shape not in members), 0.8)  # the cut-over decides more than the last tiles do
    groups = [s for s in dict.fromkeys(shapes) if s not in members]
    if times := _crossover_times(groups, device, timer or _cold, clock):
        facts["pair_tokens"] = crossover(times)
        facts["pair_and_mm_us"] = {T: [round(s * 1e6, 2) for s in both] for T, both in times.items()}
        finished += 1
        write()
    run((j for j in asked if j.shape in members), 1.0)
    return path


def _crossover_times(
    shapes: Sequence[Shape], device: torch.device, timer: Timer, clock: Clock
) -> dict[int, list[float]]:
    """{T: seconds of the pair and of the matmuls, all shapes together}, up to the first T at which the pair loses."""
    found: dict[int, list[float]] = {}
    for T in CROSSOVER:
        if clock.is_over():
            break
        pair, mm = found[T] = [
            sum(both) for both in zip(*(_pair_and_mm(s, T, device, timer) for s in shapes), strict=True)
        ]
        if pair > mm:
            break
    return found


def tune_cuda(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    folder: Path | None = None,
    timer: Timer | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
    seconds: float | None = None,
) -> Path:
    """Check the CUDA kernel, time it beside Triton's pair if that runs, write the table; returns its path. Arguments
    and errors as in `tune`. The table is written after each T."""
    device, clock = torch.device(device), Clock(seconds)
    if reason := CUDA.unsupported_device(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {reason}")
    facts = {"checked": verdict(checked(check() if check else selfcheck(device, "cuda")))}
    found: dict[int, dict[int, list[float]]] = {}

    def write() -> Path:
        wide, narrow = (crossover(found[b]) if b in found else n for b, n in zip((2, 1), DECODE_TOKENS, strict=True))
        us = {b: {T: [round(s * 1e6, 2) for s in both] for T, both in times.items()} for b, times in found.items()}
        return write_cuda_table(_name(device), (wide, narrow), folder or user_folder(), decode_and_pair_us=us, **facts)

    path = write()
    if TRITON.unsupported_device(device) is None:
        for T, bytes_ in ((T, b) for T in DECODE for b in (2, 1)):
            if clock.is_over():
                break
            calls = [
                Call(T, s.N, s.M, s.C, s.x, s.factors, base=s.base)
                for s in dict.fromkeys(shapes)
                if s.factors.itemsize == bytes_
            ]
            pairs = [_decode_and_pair(c, device, timer or _cold) for c in calls if CUDA.unsupported(c) is None]
            if pairs:
                found.setdefault(bytes_, {})[T] = [sum(p) for p in zip(*pairs, strict=True)]
                path = write()
    return path


def checked(cases: Iterable[Case]) -> list[Case]:
    """The cases. Raises WrongResultError unless there are some and all are right."""
    cases = list(cases)
    wrong = [c for c in cases if not c.right]
    if wrong or not cases:
        raise WrongResultError(
            f"{len(wrong)} of {len(cases)} checks fail on this device, e.g. {wrong[0] if wrong else 'none ran'}; "
            "`auto` does not use these kernels here. Please report this with the output of `t2 env`"
        )
    return cases


def verdict(cases: list[Case]) -> dict[str, Any]:
    """What a table says of its checks."""
    return {"cases": len(cases), "worst": max(c.error for c in cases), "torch": torch.__version__}


def crossover(seconds: Mapping[int, Sequence[float]]) -> int:
    """The largest T up to which the first of two is at least as fast at every T that was timed; 0 if it never is.

    seconds: {T: (seconds of the first, of the second)}
    """
    found = 0
    for T in sorted(seconds):
        pair, mm = seconds[T]
        if pair > mm:
            break
        found = T
    return found if seconds else PAIR_TOKENS


def _best_tiles(
    job: Job, best: Mapping[Timed, Tiles], ready: set[Timed], device: torch.device, timer: Timer
) -> dict[Timed, Tiles]:
    """The fastest tiles of shrink, and, with these, of expand. ready: entries of `best` that are taken as they are."""
    if all(job.timed(kernel) in ready for kernel in job.launches):
        return {}
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    from t2kernels.ops.impls.triton import launch_pair as launch

    shape, given = job.shape, operands(job.shape, job.T, device)
    found, chosen = {}, job.rule(capability)
    for kernel, (rows, K) in job.launches.items():
        name = job.timed(kernel)
        if name in ready:
            chosen[kernel] = best[name]
            continue
        times = []
        for t in candidates(kernel, job.T, rows, K, shape.x, shape.factors, capability):
            pair = {**chosen, kernel: t}
            try:
                seconds = timer(lambda pair=pair: launch.forward_pair(*given, (pair["shrink"], pair["expand"])))
            except Exception as e:  # this tile does not compile or fit; the class of the error depends on Triton
                if not times:
                    raise StateError(f"{kernel} with the tiles of the rule, {t}, does not run: {e}") from e
                continue
            times.append((seconds, t))
        chosen[kernel] = min(times, key=lambda pair: pair[0])[1]
        found[name] = chosen[kernel]
        ready.add(name)
    return found


def _pair_and_mm(shape: Shape, T: int, device: torch.device, timer: Timer) -> tuple[float, float]:
    from t2kernels.ops.impls.triton import launch_pair as launch

    given = operands(shape, T, device)
    return timer(lambda: launch.forward_pair(*given)), timer(lambda: forward_mm(*given, TRITON.row_scaling))


def _decode_and_pair(call: Call, device: torch.device, timer: Timer) -> tuple[float, float]:
    from t2kernels.ops.impls.triton import launch_pair as launch

    given = operands(Shape(call.N, call.M, call.C, call.base, call.x, call.factors), call.T, device)
    return timer(lambda: cuda_kernels.forward(*given)), timer(lambda: launch.forward_pair(*given))


def operands(shape: Shape, T: int, device: torch.device) -> Operands:
    """A random problem of a shape, with an expert for each token."""

    def factor(rows: int, columns: int) -> Tensor:
        w = torch.randn(rows, columns, device=device)
        return (
            (w * 30).round().clamp(-127, 127).to(torch.int8)
            if shape.factors == torch.int8
            else (w / columns**0.5).to(shape.factors)
        )

    def rows(M: int) -> Tensor:
        return torch.randn(T, M, device=device).to(shape.x)

    V, Us = factor(sum(shape.C), shape.N).t(), [factor(M, C) for M, C in zip(shape.M, shape.C, strict=True)]
    scale, ids = torch.rand(T + 1, sum(shape.C), device=device) / 900, torch.arange(T, dtype=torch.int32, device=device)
    bases = [rows(M) if shape.base else None for M in shape.M]
    return Operands(rows(shape.N), V, Us, scale, ids, bases, [None] * len(bases))


def _cold(f: Callable[[], object]) -> float:
    import triton

    return triton.testing.do_bench(f, warmup=5, rep=30, return_mode="median") / 1e3


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
