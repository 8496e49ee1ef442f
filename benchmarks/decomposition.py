"""How long does it take to decompose a model, in seconds for a billion parameters, and how much memory?

    python benchmarks/decomposition.py                                 one layer of Llama-3-8B, and the built-in model
    python benchmarks/decomposition.py --subjects llama-3-8b --layers 32

The first matrices of a model with random weights of its shapes; in full and cut to 256 components, in one process each
time, so that the peak of memory is its own. What comes out is multiplied together again and compared before a time is
stated. Rows are appended to benchmarks/results/decomposition.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import subjects
import torch
from measure import RESULTS, append, machine, peak, require, reset_peak, show, wait
from rich.table import Table
from torch import nn

import t2kernels as t2
from t2kernels.factors.matrices import find_matrices


class Layers(nn.Module):
    """The linear layers of `count` blocks of a Llama, with random weights and nothing else."""

    def __init__(self, name: str, count: int, dtype, device):
        super().__init__()
        hidden, inner, _, heads, kv, _ = subjects.SIZES[name]
        wide = hidden // heads * kv
        shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (wide, hidden),
            "v_proj": (wide, hidden),
            "o_proj": (hidden, hidden),
        }
        shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(N, M, bias=False, dtype=dtype, device=device) for n, (M, N) in shapes.items()})
            for _ in range(count)
        )


def one(name: str, layers: int, rank: int | None, dtype: torch.dtype, device: torch.device) -> dict:
    torch.manual_seed(0)
    model = subjects.load("tiny", 1, device=device).model if name == "tiny" else Layers(name, layers, dtype, device)
    matrices = find_matrices(model, "all")
    numbers = sum(m.shape[0] * m.shape[1] for m in matrices.values())
    before = reset_peak(device)
    start = time.perf_counter()
    factors = t2.decompose(model, rank=rank)
    wait(device)
    seconds = time.perf_counter() - start
    after = peak(device)
    n, m = next(iter(matrices.items()))
    W, found = m.read().double(), factors[n]
    if rank is None:
        worst = require(f"{n} = U diag(sigma) Vᵀ", ((found.dense().double() - W).norm() / W.norm()).item(), 1e-6)
    else:  # the leading components: W v = sigma u
        U, sigma, V = (t.double() for t in found)
        worst = require(f"W V = U diag(sigma) of {n}", ((W @ V - U * sigma).norm() / sigma.norm()).item(), 1e-6)
    return {
        "subject": name,
        "layers": layers,
        "rank": rank,
        "device": device.type,
        "matrices": len(matrices),
        "parameters": numbers,
        "seconds": seconds,
        "s_per_billion": seconds / numbers * 1e9,
        "peak_over_before_bytes": after - before,
        "factors_bytes": sum(t.nbytes for f in factors.values() for t in f),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "error": worst,
    }


def run(
    device: torch.device, quick: bool = False, only=None, layers: int = 1, report: Callable[[str], None] = print
) -> Iterator[dict]:
    for name in only or (
        ["llama-3-8b"] if device.type == "cuda" else ["tiny", "mid"] if quick else ["tiny", "mid", "llama-3-8b"]
    ):
        for rank in (None,) if name == "tiny" else (None, 256):
            report(f"decomposition: {name}, {'every component' if rank is None else f'{rank} components'}")
            command = [sys.executable, __file__, "--one", name, "--layers", str(layers), "--rank", str(rank or 0)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"decomposition of {name} failed: {done.stderr[-2000:]}")
            yield json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> Table:
    out = Table(
        "model",
        "components",
        "on",
        "parameters",
        "seconds",
        "s / billion",
        "memory beyond the weights",
        "factors / weights",
        title="decompose",
    )
    for r in rows:
        what = r["subject"]
        figures = (
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['seconds']:.1f}",
            f"{r['s_per_billion']:.0f}",
            f"{r['peak_over_before_bytes'] / 1e9:.2f} GB",
        )
        out.add_row(
            what, str(r["rank"] or "all"), r["device"], *figures, f"{r['factors_bytes'] / r['weights_bytes']:.2f}"
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=subjects.NAMES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--one", choices=subjects.NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "decomposition.jsonl")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.one:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        print(json.dumps(one(a.one, a.layers, a.rank or None, dtype, device)))
        return
    facts, rows = machine(("torch",)), []
    for found in run(device, False, a.subjects, a.layers):
        append(a.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
