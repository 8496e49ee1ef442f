"""Check the kernels on this GPU, then time them for the shapes of a model, offline: `t2 tune`.

The results go into table files (tables.py). Without the checks in a table `auto` does not use the kernels. `tune` also
keeps the fastest tiles of the Triton kernels, and up to how many tokens they beat two library matmuls; `tune_cuda` up
to how many tokens the CUDA kernel beats Triton's. Nothing is timed while a model runs.
"""

from __future__ import annotations

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

from .selfcheck import Case, selfcheck
from .tables import Timed, user_folder, write_cuda_table, write_table
from .tiles import Tiles, candidates, tiles

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


def tune(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    tokens: Sequence[int] = TOKENS,
    folder: Path | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
) -> Path:
    """Check the Triton kernels, time them, write the table of this GPU; returns its path. Takes minutes.

    shapes: the calls to tune for; tokens: T of each
    folder: where the table goes; None: `user_folder()`
    timer: None for Triton's own benchmark, which empties the L2 cache before each run
    progress: called after each job
    check: gives the cases that must be right before anything is timed; None for `selfcheck` of the Triton kernels

    Raises ImplUnavailableError if Triton cannot run, WrongResultError if a check fails, OSError if the table cannot
    be written.
    """
    device = torch.device(device)
    if reason := TRITON.unsupported_device(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {reason}")
    import triton

    cases = checked(check() if check else selfcheck(device, "triton"))
    timer, best = timer or _cold, {}
    seconds = {}
    jobs = [(shape, T) for shape in dict.fromkeys(shapes) for T in tokens]
    for i, (shape, T) in enumerate(jobs):
        best |= _best_tiles(shape, T, device, timer)
        if progress:
            progress(f"{'+'.join(map(str, shape.M))} x {shape.N}, T={T}", i + 1, len(jobs))
    for T in CROSSOVER:
        seconds[T] = [
            sum(pair) for pair in zip(*(_pair_and_mm(s, T, device, timer) for s in dict.fromkeys(shapes)), strict=True)
        ]
    facts = {
        "checked": verdict(cases),
        "pair_tokens": crossover(seconds),
        "pair_and_mm_us": {T: [round(s * 1e6, 2) for s in both] for T, both in seconds.items()},
    }
    return write_table(_name(device), triton.__version__, best, folder or user_folder(), **facts)


def tune_cuda(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    folder: Path | None = None,
    timer: Timer | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
) -> Path:
    """Check the CUDA kernel, time it beside Triton's pair if that runs, write the table; returns its path. Arguments
    and errors as in `tune`."""
    device = torch.device(device)
    if reason := CUDA.unsupported_device(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {reason}")
    cases = checked(check() if check else selfcheck(device, "cuda"))
    seconds: dict[int, dict[int, list[float]]] = {}
    if TRITON.unsupported_device(device) is None:
        for bytes_, T in ((b, T) for b in (2, 1) for T in DECODE):
            calls = [
                Call(T, s.N, s.M, s.C, s.x, s.factors, base=s.base)
                for s in dict.fromkeys(shapes)
                if s.factors.itemsize == bytes_
            ]
            pairs = [_decode_and_pair(c, device, timer or _cold) for c in calls if CUDA.unsupported(c) is None]
            if pairs:
                seconds.setdefault(bytes_, {})[T] = [sum(p) for p in zip(*pairs, strict=True)]
    wide, narrow = (
        crossover(seconds[b]) if b in seconds else usual for b, usual in zip((2, 1), DECODE_TOKENS, strict=True)
    )
    us = {b: {T: [round(s * 1e6, 2) for s in both] for T, both in found.items()} for b, found in seconds.items()}
    return write_cuda_table(
        _name(device), (wide, narrow), folder or user_folder(), checked=verdict(cases), decode_and_pair_us=us
    )


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


def _best_tiles(shape: Shape, T: int, device: torch.device, timer: Timer) -> dict[Timed, Tiles]:
    """The fastest tiles of shrink, and, with these, of expand."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    from t2kernels.ops.impls.triton import launch_pair as launch

    given = operands(shape, T, device)
    kinds = {"shrink": (sum(shape.C), shape.N), "expand": (sum(shape.M), max(shape.C))}
    found = {}
    chosen = {k: tiles(k, T, rows, K, shape.x, shape.factors, capability) for k, (rows, K) in kinds.items()}
    for kernel, (rows, K) in kinds.items():
        timed = []
        for t in candidates(kernel, T, rows, K, shape.x, shape.factors, capability):
            pair = {**chosen, kernel: t}
            try:
                seconds = timer(lambda pair=pair: launch.forward_pair(*given, (pair["shrink"], pair["expand"])))
            except Exception as e:  # this tile does not compile or fit; the class of the error depends on Triton
                if not timed:
                    raise StateError(f"{kernel} with the tiles of the rule, {t}, does not run: {e}") from e
                continue
            timed.append((seconds, t))
        chosen[kernel] = min(timed, key=lambda pair: pair[0])[1]
        found[kernel, T, rows, K, shape.x, shape.factors] = chosen[kernel]
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
