"""Time calls whose weights are not in the cache, on copies in turn: a CUDA graph on a GPU, else a loop. And
ceilings."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from measure import Timing, timing

CALLS = 16  # at least, in one graph


def per_call(runs: Mapping[str, Callable], copies: Sequence, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Seconds of one call of each of `runs`, called with a copy. In turn, so that ratios, which are to the first, are
    of the same moments.

    seconds: about how long each of them may take in all; one that takes twice that for a single run is run once
    """
    if not runs:
        return {}
    once = {name: _graph(run, copies) if device.type == "cuda" else _loop(run, copies) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in once}
    warm, slow = 0.0, {}
    for name, f in once.items():  # warm up
        begun = time.perf_counter()
        one = f()
        if (spent := time.perf_counter() - begun) > 2 * seconds and len(once) > len(slow) + 1:
            slow[name] = one  # a peer so much slower that one run tells
        else:
            warm += spent
    quick = {name: f for name, f in once.items() if name not in slow}
    repeats = max(3, min(31, int(seconds * len(quick) / max(warm, 1e-6))))
    for _ in range(repeats):
        for name, f in quick.items():
            found[name].append(f())
    times = timing({name: found[name] for name in quick})
    first = next(iter(times.values())).median
    times |= {name: Timing(t, t, t, t / first) for name, t in slow.items()}
    return {name: times[name] for name in once}


def _loop(run: Callable, copies: Sequence) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        for w in copies:
            run(w)
        return (time.perf_counter() - start) / len(copies)

    return once


def _graph(run: Callable, copies: Sequence) -> Callable[[], float]:
    calls = len(copies) * -(-CALLS // len(copies))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate
        for w in copies:
            run(w)
    torch.cuda.current_stream().wait_stream(side)
    graph = None
    try:
        candidate = torch.cuda.CUDAGraph()
        with torch.cuda.graph(candidate):
            for i in range(calls):
                run(copies[i % len(copies)])
        graph = candidate
    except (
        RuntimeError
    ):  # an arm that looks at values on the host (a peer's) cannot be captured; it is timed as it is used, eagerly
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        if graph is not None:
            graph.replay()
        else:
            for i in range(calls):
                run(copies[i % len(copies)])
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return once


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2, or of the CPU's largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units], default=32 * 2**20)


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The ceilings of this machine, measured: GB/s of reading from memory, TFLOP/s of a large product in dtype."""
    gpu = device.type == "cuda"
    data = torch.ones((2**30 if gpu else 2**27), device=device)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    runs = {"read": lambda _: data.sum(), "mm": lambda _: a @ b}
    once = {name: _graph(f, [None]) if gpu else _loop(f, [None]) for name, f in runs.items()}
    best = {name: min(f() for _ in range(7)) for name, f in once.items()}
    return {"read_GB_s": data.nbytes / best["read"] / 1e9, "TFLOP_s": 2 * n**3 / best["mm"] / 1e12}
