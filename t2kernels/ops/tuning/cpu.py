"""`t2 tune --device cpu`: up to how many tokens the C++ kernels are ahead of torch on this CPU.

Nothing is timed while a model runs. Without a table `auto` uses the numbers of one machine (`TOKENS` of
`impls.cpp_kernels`). Another CPU has other instructions for bf16, and another memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch

from t2kernels.ops.dispatch import ImplUnavailableError
from t2kernels.ops.impls import cpp_kernels, torch_kernels
from t2kernels.ops.impls.cpp_kernels import CPP, cpu_name
from t2kernels.ops.impls.implementation import Operands
from t2kernels.ops.planner import Call

from .selfcheck import Case, selfcheck
from .tables import user_folder, write_cpu_table
from .tuner import Progress, Shape, checked, crossover, operands, verdict

TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, cpp_kernels.TUNED)
COLD = 64e6  # bytes of factors that a timing goes through: no cache of a core holds them
Pair = Callable[[Sequence[Operands]], tuple[float, float]]
"""Problems of one size -> (seconds of a call of the C++ kernels, of torch)."""


def tune_cpu(
    shapes: Sequence[Shape],
    tokens: Sequence[int] = TOKENS,
    folder: Path | None = None,
    timer: Pair | None = None,
    progress: Progress | None = None,
    check: Callable[[], Iterable[Case]] | None = None,
) -> Path:
    """Check the C++ kernels, time them beside torch, write the table of this CPU; returns its path. Takes minutes.

    For each pair of dtypes (of x, of the factors) the table has the largest T up to which the C++ kernels are at least
    as fast at every T that was timed, summed over the shapes. Arguments and errors as in `tuner.tune`.
    """
    if reason := CPP.unsupported_device(torch.device("cpu")):
        raise ImplUnavailableError(f"there is nothing to tune on this CPU: {reason}")
    cases = checked(check() if check else selfcheck(torch.device("cpu"), "cpp"))
    timer, found, times = timer or in_turn, {}, {}
    formats = list(dict.fromkeys((s.x, s.factors) for s in shapes))
    jobs = [(f, T) for f in formats for T in sorted(tokens)]
    seconds: dict[int, list[float]] = {}
    for i, ((x, factors), T) in enumerate(jobs):
        seconds = {} if T == jobs[0][1] else seconds
        some = [s for s in dict.fromkeys(shapes) if (s.x, s.factors) == (x, factors) and _supported(s, T)]
        pairs = [timer(list(_problems(s, T))) for s in some]
        if pairs:
            seconds[T] = [sum(pair) for pair in zip(*pairs, strict=True)]
            key = f"{x} {factors}".replace("torch.", "")
            found[key] = crossover(seconds)
            times[key] = {T: [round(s * 1e6, 2) for s in both] for T, both in seconds.items()}
        if progress:
            progress(f"{x}, {factors} factors, T={T}".replace("torch.", ""), i + 1, len(jobs))
    facts = {"checked": verdict(cases), "threads": torch.get_num_threads(), "cpp_and_torch_us": times}
    return write_cpu_table(cpu_name(), found, folder or user_folder(), **facts)


def _supported(shape: Shape, T: int) -> bool:
    call = Call(T, shape.N, shape.M, shape.C, shape.x, shape.factors, base=shape.base)
    return CPP.unsupported(call) is None


def _problems(shape: Shape, T: int) -> Iterator[Operands]:
    """Enough problems of one size that their factors fall out of the caches: 2 to 16."""
    numbers = sum(shape.C) * shape.N + sum(M * C for M, C in zip(shape.M, shape.C, strict=True))
    count = min(16, max(2, round(COLD / max(1, numbers * shape.factors.itemsize))))
    for _ in range(count):
        yield operands(shape, T, torch.device("cpu"))


@torch.no_grad()
def in_turn(problems: Sequence[Operands], repeats: int = 7) -> tuple[float, float]:
    """Least seconds of a call of the C++ kernels and of torch, in turn. On one thread they are CPU time, which other
    processes do not count in."""
    arms, seconds = (cpp_kernels.forward, torch_kernels.forward), ([], [])
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for i in range(repeats + 1):
        for arm, found in zip(arms, seconds, strict=True):
            start = clock()
            for given, _ in zip(cycle(problems), range(max(4, len(problems))), strict=False):
                arm(*given)
            if i:
                found.append((clock() - start) / max(4, len(problems)))
    return min(seconds[0]), min(seconds[1])
