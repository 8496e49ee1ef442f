"""`t2 env`: a report on this machine for bug reports. It also shows what is missing or broken."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from t2kernels import one_line
from t2kernels.cli.console import out

PACKAGES: tuple[str, ...] = (
    "t2kernels",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "safetensors",
    "peft",
    "torchao",
    "bitsandbytes",
    "vllm",
)


def env(as_json: bool = typer.Option(False, "--json", metavar="", help="Print JSON instead of a table.")) -> None:
    """Report versions, CPU, memory, GPUs, and the implementations of svf_linear that run here.

    [dim]$[/] t2 env --json > env.json
    """
    found = report()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if not out.is_terminal:  # a file or a pipe has no width to fit into
        for section, facts in found.items():
            for name, value in facts.items():
                out.print(f"{section}: {name}: {value}", soft_wrap=True, markup=False)
        return
    shown = Table("", "", show_header=False, box=None, pad_edge=False)
    for section, facts in found.items():
        for i, (name, value) in enumerate(facts.items()):
            shown.add_row(f"[bold]{section if i == 0 else ''}[/]", name, escape(str(value)))
    out.print(shown)


def report() -> dict[str, dict[str, Any]]:
    """{section: {name: value}}. A section that fails has its error instead."""
    sections = {
        "versions": _versions,
        "machine": _machine,
        "gpu": _gpus,
        "svf_linear": _impls,
        "tiny model": _tiny,
    }
    found = {}
    for name, ask in sections.items():
        try:
            found[name] = ask()
        except Exception as e:  # a broken installation is what this report is for
            found[name] = {"error": f"{type(e).__name__}: {one_line(e)}"}
    return found


def _versions() -> dict[str, str]:
    found = {"python": f"{platform.python_version()} ({sys.executable})"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, object]:
    import psutil  # accelerate needs it, so it is there
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "memory available": f"{psutil.virtual_memory().available / 2**30:.1f} GiB",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        found = {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}"}
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"gpu {i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        return found
    if torch.backends.mps.is_available():
        return {"mps": "available"}
    if shutil.which("nvidia-smi") is None:
        return {"none": "no NVIDIA driver found"}
    if torch.version.cuda is None:
        return {"none": f"there is an NVIDIA driver, but torch {torch.__version__} was built without CUDA"}
    return {"none": f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no GPU that it can use"}


def _impls() -> dict[str, str]:
    import torch

    from t2kernels.ops import plan, svf_linear
    from t2kernels.ops.dispatch import IMPLEMENTATIONS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, table = torch.ones(2, 16, device=device, dtype=torch.bfloat16), torch.ones(1, 16, device=device)
    square, ids = torch.eye(16, device=device, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32, device=device)
    choice = plan(x, square.t(), [square], ids)
    found = {"auto": f"{choice.impl} ({choice.why})"}
    for impl in IMPLEMENTATIONS:
        try:
            right = torch.allclose(svf_linear(x, square.t(), square, table, ids, impl=impl), x)
            found[impl] = f"runs on {device}" if right else f"runs on {device}, WRONG RESULT"
        except Exception as e:  # whatever a missing or broken compiler raises
            found[impl] = one_line(e)
    return found


def _tiny() -> dict[str, object]:
    from t2kernels import tiny

    experts = ", ".join(tiny.experts()) or "none"
    there = (tiny.path() / "model.safetensors").is_file()
    return {"path": str(tiny.path()) + ("" if there else " (missing)"), "experts": experts}
