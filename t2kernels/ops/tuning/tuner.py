"""Check the kernels on this GPU, then time them for the shapes of a model, offline; `t2 tune`.

What is found goes into small files that `tuning` finds. Of the Triton kernels (`tune`): the checks, without which `auto` does not use them, the
tiles that were fastest, and up to how many tokens they beat two library matmuls. Of the CUDA kernel (`tune_cuda`): the checks, and up to how many
tokens it beats Triton's. Nothing is timed while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from t2kernels.ops.impls import cuda_kernels
from t2kernels.ops.impls import triton as triton_kernels
from t2kernels.ops.op import ImplUnavailableError
from t2kernels.ops.planner import DECODE_TOKENS, PAIR_TOKENS, Call, why_no_decode

from .selfcheck import Case, selfcheck
from .tiles import Tiles, candidates, tiles, user_folder, write_cuda_table, write_table

TOKENS = (1, 8, 32, 128)
CROSSOVER = (32, 64, 96, 128, 160, 192, 256, 384)
DECODE = (1, 2, 4, 8, 16, 32)


class Shape(NamedTuple):
    """Matrices that run as one call: N in_features, M and C (columns) by member, whether a base is added, dtypes of x and of the factors."""

    N: int
    M: tuple[int, ...]
    C: tuple[int, ...]
    base: bool
    x: torch.dtype
    factors: torch.dtype


class WrongResultError(RuntimeError):
    """A kernel computes something else than the reference on this device; nothing was timed or written."""


Timer = Callable[[Callable[[], object]], float]
Progress = Callable[[str, int, int], object]


def tune(
    shapes: Sequence[Shape],
    device: torch.device | str = "cuda",
    tokens: Sequence[int] = TOKENS,
    folder: Path | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
) -> Path:
    """Check, time, write the table of this GPU; returns where. Takes minutes.

    timer: f -> seconds; None: Triton's own benchmark, which empties the L2 cache before each run
    check: what must pass before anything is timed; None: `selfcheck` of the Triton kernels on the device
    Raises ImplUnavailableError where Triton cannot run, WrongResultError where a check fails, OSError where the table cannot be written.
    """
    device = torch.device(device)
    if why := triton_kernels.why_not(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {why}")
    import triton

    cases = _checked(check() if check else selfcheck(device, "triton"))
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
        "checked": _verdict(cases),
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
    """Check the CUDA kernel, time it beside Triton's pair where there is one, write what was found; returns where. As `tune`."""
    device = torch.device(device)
    if why := cuda_kernels.why_not(device):
        raise ImplUnavailableError(f"there is nothing to tune on {device}: {why}")
    cases = _checked(check() if check else selfcheck(device, "cuda"))
    seconds: dict[int, dict[int, list[float]]] = {}
    if triton_kernels.why_not(device) is None:
        for bytes_, T in ((b, T) for b in (2, 1) for T in DECODE):
            calls = [
                Call(T, s.N, s.M, s.C, s.x, s.factors, base=s.base)
                for s in dict.fromkeys(shapes)
                if s.factors.itemsize == bytes_
            ]
            pairs = [_decode_and_pair(c, device, timer or _cold) for c in calls if why_no_decode(c) is None]
            if pairs:
                seconds.setdefault(bytes_, {})[T] = [sum(p) for p in zip(*pairs, strict=True)]
    tokens = tuple(
        crossover(seconds[b]) if b in seconds else usual for b, usual in zip((2, 1), DECODE_TOKENS, strict=True)
    )
    us = {b: {T: [round(s * 1e6, 2) for s in both] for T, both in found.items()} for b, found in seconds.items()}
    return write_cuda_table(
        _name(device), tokens, folder or user_folder(), checked=_verdict(cases), decode_and_pair_us=us
    )


def _checked(cases: Iterable[Case]) -> list[Case]:
    """The cases, if there are any and all of them are right."""
    cases = list(cases)
    wrong = [c for c in cases if not c.right]
    if wrong or not cases:
        raise WrongResultError(
            f"{len(wrong)} of {len(cases)} checks fail on this device, e.g. {wrong[0] if wrong else 'none ran'}; "
            "`auto` does without these kernels here. Please report this with the output of `t2 env`"
        )
    return cases


def _verdict(cases: list[Case]) -> dict[str, object]:
    return {"cases": len(cases), "worst": max(c.error for c in cases), "torch": torch.__version__}


def crossover(seconds: dict[int, Sequence[float]]) -> int:
    """{T: (seconds of one, of the other)} -> the tokens up to which the one is at least as fast at every smaller T that was timed; 0: never."""
    found = 0
    for T in sorted(seconds):
        pair, mm = seconds[T]
        if pair > mm:
            break
        found = T
    return found if seconds else PAIR_TOKENS


def _best_tiles(shape: Shape, T: int, device: torch.device, timer: Timer) -> dict[tuple, Tiles]:
    """The fastest tiles of shrink, then, with these, of expand."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    operands = _operands(shape, T, device)
    kinds = {"shrink": (sum(shape.C), shape.N), "expand": (sum(shape.M), max(shape.C))}
    found = {}
    chosen = {k: tiles(k, T, rows, K, shape.x, shape.factors, capability) for k, (rows, K) in kinds.items()}
    for kernel, (rows, K) in kinds.items():
        timed = []
        for t in candidates(kernel, T, rows, K, shape.x, shape.factors, capability):
            pair = {**chosen, kernel: t}
            try:
                timed.append(
                    (
                        timer(
                            lambda pair=pair: triton_kernels.forward_pair(*operands, (pair["shrink"], pair["expand"]))
                        ),
                        t,
                    )
                )
            except (
                Exception
            ) as e:  # a tile that does not compile or fit here; which error that is differs between Tritons
                if not timed:
                    raise RuntimeError(f"{kernel} with the rule's own tiles {t} does not run: {e}") from e
        chosen[kernel] = min(timed, key=lambda pair: pair[0])[1]
        found[kernel, T, rows, K, shape.x, shape.factors] = chosen[kernel]
    return found


def _pair_and_mm(shape: Shape, T: int, device: torch.device, timer: Timer) -> tuple[float, float]:
    operands = _operands(shape, T, device)
    return timer(lambda: triton_kernels.forward_pair(*operands)), timer(lambda: triton_kernels.forward_mm(*operands))


def _decode_and_pair(call: Call, device: torch.device, timer: Timer) -> tuple[float, float]:
    operands = _operands(Shape(call.N, call.M, call.C, call.base, call.x, call.factors), call.T, device)
    return timer(lambda: cuda_kernels.forward(*operands)), timer(lambda: triton_kernels.forward_pair(*operands))


def _operands(shape: Shape, T: int, device: torch.device) -> tuple:
    def factor(rows: int, columns: int) -> torch.Tensor:
        w = torch.randn(rows, columns, device=device)
        return (
            (w * 30).round().clamp(-127, 127).to(torch.int8)
            if shape.factors == torch.int8
            else (w / columns**0.5).to(shape.factors)
        )

    def rows(M: int) -> torch.Tensor:
        return torch.randn(T, M, device=device).to(shape.x)

    V, Us = factor(sum(shape.C), shape.N).t(), [factor(M, C) for M, C in zip(shape.M, shape.C, strict=True)]
    scale, ids = torch.rand(T + 1, sum(shape.C), device=device) / 900, torch.arange(T, dtype=torch.int32, device=device)
    return rows(shape.N), V, Us, scale, ids, [rows(M) if shape.base else None for M in shape.M], [None] * len(shape.M)


def _cold(f: Callable[[], object]) -> float:
    import triton

    return triton.testing.do_bench(f, warmup=5, rep=30, return_mode="median") / 1e3


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
