"""What six kernels reach of a GPU's memory and arithmetic, each alone and with cold caches: Nsight Compute's counters.

    python benchmarks/kernel_profile.py                   ncu if it is there and may count, else times alone
    python benchmarks/kernel_profile.py --dry-run         anywhere: each is launched once, on small sizes

The sizes are those of Llama-3-8B with 256 components. Rows are appended to benchmarks/results/kernel_profile.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import torch
from measure import RESULTS, append, machine, show
from rich.table import Table

from t2kernels.ops.dispatch import device_of
from t2kernels.ops.impls import cuda_kernels

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "MB read",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% warps",
    "launch__registers_per_thread": "registers",
    "launch__waves_per_multiprocessor": "waves",
}
KERNELS = "regex:^(shrink|expand|swiglu|backward|skinny|cluster)_kernel"
SCALES = {"nsecond": 1e-3, "usecond": 1, "msecond": 1e3, "ns": 1e-3, "us": 1, "ms": 1e3, "byte": 1e-6, "Kbyte": 1e-3}
SCALES |= {"Mbyte": 1, "Gbyte": 1e3, "KB": 1e-3, "MB": 1, "GB": 1e3, "B": 1e-6}


def launches(device: torch.device, model: str, k: int) -> dict[str, Callable[[], object]]:
    """{label: what launches it}: the six kernels, as far as their implementation runs here."""
    found: dict[str, Callable[[], object]] = {}

    def work(group: str, T: int) -> tuple:
        w = cases.weights(*cases.shapes(model, group), "delta", k, torch.bfloat16, torch.bfloat16, device)
        x = torch.randn(T, w.V.shape[0], device=device).to(torch.bfloat16)
        ids = cases.mixed("all distinct", T, device)
        return x, w.V, w.U, w.scale, ids, cases.dense(x, ids, w), [None] * len(w.U)

    if device_of(device).unsupported("triton") is None:
        from t2kernels.ops.impls.triton import launch_pair, matmul

        few, many = work("qkv", 8), work("gate+up", 32)
        g = launch_pair.shrink(*few[:2], *few[3:5])
        found["triton shrink, qkv, T=8"] = lambda: launch_pair.shrink(*few[:2], *few[3:5])
        found["triton expand, qkv, T=8"] = lambda: launch_pair.expand(g, few[2], *few[5:])
        found["triton swiglu, gate+up, T=32"] = lambda: launch_pair.forward_swiglu(*many)
        step = work("qkv", 4096 if device.type == "cuda" else 40)
        found["triton backward, qkv, T=4096"] = lambda: matmul.backward(step[5], *step[:5], True, True)
    if device_of(device).unsupported("cuda") is None:
        alone = work("down", 8)
        made = cuda_kernels.shrink(*alone[:2], *alone[3:5])
        found["cuda shrink, down, T=8"] = lambda: cuda_kernels.shrink(*alone[:2], *alone[3:5])
        found["cuda expand, down, T=8"] = lambda: cuda_kernels.expand(made, alone[2], *alone[5:], torch.bfloat16)
    return found


def profiled(command: list[str]) -> list[dict]:
    """Rows of ncu for `command`, which launches what is profiled between cudaProfilerStart and Stop. Raises
    RuntimeError with what ncu said."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    given = ["--profile-from-start", "off", "--clock-control", "none", "--kernel-name", KERNELS]
    given += ["--metrics", ",".join(METRICS), "--csv", "--page", "raw"]
    try:
        done = subprocess.run([ncu, *given, *command], capture_output=True, text=True, timeout=400)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RuntimeError(str(e)) from e
    rows = parsed(done.stdout)
    if done.returncode or not rows:
        raise RuntimeError((done.stdout + done.stderr)[-600:])
    return rows


def parsed(text: str) -> list[dict]:
    """The kernels of ncu's `--csv --page raw`: a line of names, one of units, one a kernel."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    found = []
    for row in kernels:
        values = {}
        for metric, name in METRICS.items():
            if row.get(metric) not in (None, ""):
                values[name] = float(row[metric].replace(",", "")) * SCALES.get(units[metric], 1)
        found.append({"kernel": row["Kernel Name"].split("(")[0], **values})
    return found


def timed(calls: dict[str, Callable[[], object]], device: torch.device) -> list[dict]:
    """Microseconds of each, with the L2 cache emptied before; without a GPU only that each one runs."""
    found = []
    for label, call in calls.items():
        call()
        row: dict = {"kernel": label}
        if device.type == "cuda":
            from triton.testing import do_bench

            row["us"] = do_bench(call, warmup=5, rep=50, return_mode="median") * 1e3
        found.append(row)
    return found


def table(rows: list[dict], title: str) -> Table:
    names = [n for n in METRICS.values() if any(n in r for r in rows)]
    out = Table("kernel", *names, title=title)
    for r in rows:
        out.add_row(r["kernel"], *(f"{r[n]:.4g}" if n in r else "" for n in names))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel_profile.jsonl")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = launches(device, *(("nano", 16) if a.dry_run else ("llama-3-8b", 256)))
    if a.launch:  # what ncu looks at
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return 0
    if not calls:
        print("neither the Triton nor the CUDA kernels run here: nothing to profile")
        return 1
    title = "six kernels, launched"
    if device.type != "cuda":
        rows = timed(calls, device)
    else:
        try:
            rows, title = profiled([sys.executable, __file__, "--launch"]), "Nsight Compute"
        except RuntimeError as why:
            print(f"ncu did not count ({why}); the times are of CUDA events")
            rows, title = timed(calls, device), "times with a cold L2 cache"
        facts = machine(("torch", "triton"))
        append(a.out, *(row | facts | {"title": title} for row in rows))
    show(table(rows, title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
