"""Compile the Triton kernels that a first run on a GPU launches, on a machine without one, into Triton's cache.

    TRITON_CACHE_DIR=/tmp/t2-triton python benchmarks/gpu_cache.py --archs 90 --sets decode check

What scripts/gpu-prebuild starts. A stand-in takes the place of Triton's driver: it names an architecture, and launches
nothing. The launches are made by the code that a GPU runs, from tensors without data, so that the keys of the cache are
those of the GPU. The cache holds for the same build of Triton (its version and that of Python), in the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from ctypes import CDLL, RTLD_GLOBAL
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import cases
import torch
import triton
from transformers import LlamaConfig
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from t2kernels.ops.impls.triton import backward, common, launch_pair, matmul, token_scores
from t2kernels.ops.tuning import selfcheck
from t2kernels.ops.tuning.predict import candidates
from t2kernels.ops.tuning.sizes import fields
from t2kernels.ops.tuning.tuner import TOKENS as TUNED_TOKENS
from t2kernels.ops.tuning.tuner import jobs

BF16, INT8 = torch.bfloat16, torch.int8
TOKENS = (1, 8, 32, 128)
"""Of scripts/gpu-check's decode timings."""
SHARED_BYTES = 232448  # of sm_90 and sm_100, which only limits what is loaded: sm_80's tiles are smaller


def stub(folder: Path) -> str | None:
    """A libcuda.so.1 whose functions fail, so that Triton's launchers, which are C, can be built and loaded.
    Returns why there is none, or None."""
    home = Path(triton.__file__).parent / "backends" / "nvidia"
    names = {n for f in ("driver.c", "driver.py") for n in re.findall(r"\bcu[A-Z]\w*", (home / f).read_text())}
    source, made = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {n}(void) {{ return 100; }}\n" for n in sorted(names)))
    try:
        command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", made, source], check=True, capture_output=True, text=True)
        CDLL(str(made), RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError) as e:
        return f"{e} {getattr(e, 'stderr', '')}"[-300:]
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return None


def stand_in(arch: int, launchers: bool) -> None:
    """Take the place of Triton's driver with one for `arch` (90 is sm_90) that launches nothing.

    launchers: build the C code too by which Triton calls a kernel
    """
    from triton.backends.nvidia import driver as nvidia

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            if launchers:
                nvidia.CudaLauncher(src, metadata)

        def __call__(self, *given: Any) -> None: ...

    class Driver:
        launcher_cls = Launcher
        utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132},
            load_binary=lambda *given: (1, 1, 0, 0, 1024),
            launch=None,
        )
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    driver.set_active(Driver())
    if launchers:
        nvidia.CudaUtils()  # the C code that loads kernels
    for module in (launch_pair, backward):
        module.capability = lambda t: (arch // 10, arch % 10)


def problem(T: int, N: int, C: tuple[int, ...], M: tuple[int, ...], x: torch.dtype, w: torch.dtype, base: bool):
    """Arguments of `forward_pair` without data."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    V, Us = empty(sum(C), N, dtype=w).t(), [empty(m, c, dtype=w) for m, c in zip(M, C, strict=True)]
    scale, ids = empty(8, sum(C), dtype=torch.float32), empty(T, dtype=torch.int32)
    bases = [empty(T, m, dtype=x) if base else None for m in M]
    return empty(T, N, dtype=x), V, Us, scale, ids, bases, [None] * len(M)


def decode() -> Iterator[Callable[[], object]]:
    """What benchmarks/ops.py launches for Llama-3-8B in scripts/gpu-check, and SwiGLU, as a model does."""
    for group in cases.GROUPS:
        N, Ms = cases.shapes("llama-3-8b", group)
        for form, w in (("delta", BF16), ("factored", BF16), ("factored", INT8)):
            R = [256 if form == "delta" else min(M, N) for M in Ms]
            if w == INT8:
                R = [r + -(-r // 1024) * 32 for r in R]
            for T in TOKENS:
                args = problem(T, N, tuple(R), Ms, BF16, w, form == "delta")
                yield lambda args=args: launch_pair.forward_pair(*args)
                if len(Ms) == 2:
                    yield lambda args=args: launch_pair.forward_swiglu(*args)
                h = args[0].new_empty(T, sum(R))
                yield lambda args=args, h=h: backward.scale_rows(h, *args[3:5], 1)
                dys = [args[0].new_empty(T, M) for M in Ms]
                yield lambda args=args, dys=dys: matmul.backward(dys, *args[:5], True, True)
    yield from loss()


def loss() -> Iterator[Callable[[], object]]:
    """The loss of a training step on Llama-3's vocabulary."""
    for x in (BF16, torch.float32):
        logits, row, taken = (torch.empty(*shape, dtype=d, device="meta") for shape, d in (
            ((256, 128256), x), ((256,), torch.float32), ((256, 1), torch.float32)))  # fmt: skip
        for base in (None, logits):
            kept = token_scores.Read(row, None if base is None else row, row, None if base is None else row)
            g, tokens = None if base is None else row, taken.long()
            yield lambda x=logits, base=base: token_scores.forward(x, base, 1.0, "reverse")
            yield lambda args=(logits, base, kept, tokens, taken, g): token_scores.backward(*args, 1.0, "reverse")


def check() -> Iterator[Callable[[], object]]:
    """What `t2 tune` checks before it times anything."""
    for x, w in selfcheck.DTYPES:
        for N, C, M in selfcheck.SHAPES:
            for T in selfcheck.TOKENS:
                for base in (True, False):
                    args = problem(T, N, C, M, x, w, base)
                    yield lambda args=args: launch_pair.forward_pair(*args)
                dys = [args[0].new_empty(T, m) for m in M]
                yield lambda args=args, dys=dys: matmul.backward(dys, *args[:5], True, True)


def tests() -> Iterator[Callable[[], object]]:
    """The large cases of tests/ops/impls/test_triton_gpu.py."""
    from tests.helpers import gpu_cases

    for N, R, M in gpu_cases.GROUPS.values():
        for x, w in gpu_cases.PAIRS:
            for T in gpu_cases.TOKENS:
                args = problem(T, N, tuple(R), tuple(M), x, w, True)
                yield lambda args=args: launch_pair.forward_pair(*args)


def tune() -> Iterator[Callable[[], object]]:
    """The candidates of `t2 tune llama-3-8b --ranks 256 --no-factored --factors same`."""
    from t2kernels.cli.verbs.tune import shapes

    wanted = shapes(LlamaConfig(**fields("llama-3-8b")), [256], False, BF16, [BF16])
    for job in jobs(wanted, TUNED_TOKENS):
        shape, T = job.shape, job.T
        args = problem(T, shape.N, shape.C, shape.M, shape.x, shape.factors, shape.base)
        arch = launch_pair.capability(args[0])
        chosen = job.rule(arch)
        for kernel, (rows, K) in job.launches.items():
            for tile in candidates(kernel, T, rows, K, shape.x, shape.factors, arch):
                pair = {**chosen, kernel: tile}
                yield lambda args=args, p=pair: launch_pair.forward_pair(*args, (p["shrink"], p["expand"]))


SETS = {"decode": decode, "check": check, "tests": tests, "tune": tune}


def key_of(launch: common.Launch) -> str:
    """Tells launches of different kernels apart, as Triton does."""

    def kind(value: Any) -> object:
        if isinstance(value, torch.Tensor):
            return str(value.dtype)
        return (value == 1, value % 16 == 0, value >= 2**31) if isinstance(value, int) else value

    runtime_only = {p.name for p in launch.kernel.params if p.do_not_specialize}
    args = {name: "int" if name in runtime_only else kind(value) for name, value in launch.args.items()}
    return repr((launch.kernel.fn.__name__, args, launch.meta, launch.options))


def compile_all(sets: list[str], archs: list[int], part: int, parts: int, limit: int | None, launchers: bool) -> dict:
    """Compile each kernel of `sets` that is of this part. {"kernels", "compiled", "failed": [...]}"""
    found, failed, seen = [], [], set()
    triton.knobs.compilation.listener = lambda *, cache_hit, **more: found.append(cache_hit)
    run = common.Launch.run
    for arch in archs:
        stand_in(arch, launchers)

        def once(launch: common.Launch, arch: int = arch) -> None:
            key = f"{arch} {key_of(launch)}"
            if key not in seen and 0 not in launch.grid:
                seen.add(key)
                if zlib.crc32(key.encode()) % parts == part and (limit is None or len(found) < limit):
                    run(launch)

        common.Launch.run = once
        for name in sets:
            for call in SETS[name]():
                if limit is not None and len(found) >= limit:
                    break
                try:
                    call()
                except Exception as e:  # a candidate that does not fit; its class depends on Triton
                    failed.append(f"{type(e).__name__}: {e}"[:160])
    common.Launch.run = run
    return {"kernels": len(found), "compiled": found.count(False), "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=[90])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["decode", "check", "tests"])
    parser.add_argument("--limit", type=int, help="compile so many kernels at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--no-launchers", action="store_true", help="leave out the C code that calls the kernels")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.part is not None:
        with tempfile.TemporaryDirectory() as folder:
            why = "not asked for" if a.no_launchers else stub(Path(folder))
            found = compile_all(a.sets, a.archs, a.part, a.jobs, a.limit, why is None)
        print(json.dumps(found | {"launchers": why}))
        return 0
    begun, command = time.monotonic(), [sys.executable, __file__, *sys.argv[1:], "--jobs", str(a.jobs)]
    with contextlib.ExitStack() as stack:
        parts = [
            stack.enter_context(subprocess.Popen([*command, "--part", str(i)], stdout=subprocess.PIPE, text=True))
            for i in range(a.jobs)
        ]
        texts = [p.communicate()[0] for p in parts]
    if any(p.returncode for p in parts):
        return 1
    rows = [json.loads(text.splitlines()[-1]) for text in texts]
    kernels, compiled = (sum(r[key] for r in rows) for key in ("kernels", "compiled"))
    what = f"{', '.join(f'sm_{arch}' for arch in a.archs)} ({', '.join(a.sets)})"
    spent = time.monotonic() - begun
    print(f"{kernels} kernels for {what}: {compiled} compiled, {kernels - compiled} were there, in {spent:.0f} s")
    for why in sorted({r["launchers"] for r in rows if r["launchers"]}):
        print(f"without the C code that calls them: {why}")
    for failed in sorted({f for r in rows for f in r["failed"]})[:5]:
        print(f"does not compile: {failed}")
    return 0 if kernels else 1


if __name__ == "__main__":
    raise SystemExit(main())
