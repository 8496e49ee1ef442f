"""What does svf_linear cost on this CPU beside its two matmuls, for one expert and for 64 in a batch? And W' made once, beside two matmuls?

    python benchmarks/overhead.py            a few minutes; on two free cores

Shapes of Llama-3-8B. Every case is checked against the reference in fp64 before it is timed. A row a case is appended to
benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import RESULTS, append, interleaved, machine
from rich.console import Console
from rich.table import Table

from t2kernels.ops import plan, svf_linear, svf_linear_ref

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
EXPERTS = 64


def case(name: str, T: int, form: str, dtype: torch.dtype, k: int, repeats: int) -> dict:
    """Time of the two products alone, and ratios of svf_linear with one expert and with a different one for each token."""
    M, N = SHAPES[name]
    C = min(M, N) if form == "factored" else k
    x, V, U = torch.randn(T, N).to(dtype), (torch.randn(C, N) / N**0.5).to(dtype).t(), (torch.randn(M, C) / C**0.5).to(dtype)
    base = torch.randn(T, M).to(dtype) if form == "delta" else None
    scale, h = torch.randn(EXPERTS + 1, C), torch.randn(T, C).to(dtype)
    one, many = torch.tensor(1), 1 + torch.arange(T, dtype=torch.int32) % EXPERTS
    error = 0.0
    for ids in (one, many):
        truth = svf_linear_ref(x.double(), V.double(), U.double(), scale, ids, None if base is None else base.double())
        eager = ((x @ V) * scale.to(dtype)[ids]) @ U.t()
        eager = eager if base is None else eager + base
        error, allowed = (((y.double() - truth).norm() / truth.norm()).item() for y in (svf_linear(x, V, U, scale, ids, base), eager))
        if not error <= 1.1 * allowed:
            raise SystemExit(
                f"{name}, T={T}, {form}, {dtype}: relative error {error:.2g}, eager's is {allowed:.2g}; a wrong result gets no time"
            )
    product = (lambda: (x @ V, h @ U.t())) if base is None else (lambda: (x @ V, torch.addmm(base, h, U.t())))
    found = interleaved(
        {"products": product, "one": lambda: svf_linear(x, V, U, scale, one, base), "many": lambda: svf_linear(x, V, U, scale, many, base)},
        repeats,
    )
    return {
        "matrix": name,
        "M": M,
        "N": N,
        "C": C,
        "T": T,
        "form": form,
        "dtype": str(dtype).removeprefix("torch."),
        "path": plan(x, V, [U], many, base is not None).path,
        "error": error,
        "products_ms": found["products"].median * 1e3,
        "one_expert": found["one"].ratio,
        f"{EXPERTS}_experts": found["many"].ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--rank", type=int, default=256, help="components in delta form")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows, facts = [], machine(("torch",))
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for form in ("factored", "delta"):
                for T in arguments.tokens:
                    rows += [case(name, T, form, dtype, arguments.rank, arguments.repeats) for name in SHAPES]
    append(arguments.out, *(row | facts for row in rows))
    shown = Table("dtype", "form", "T", *SHAPES, "whole layer", title="svf_linear over its two products: one expert / 64 experts")
    for dtype, form, T in dict.fromkeys((r["dtype"], r["form"], r["T"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["form"], r["T"]) == (dtype, form, T)]
        count = dict(zip(SHAPES, (2, 2, 2, 1), strict=True))  # matrices of the kind in a layer
        total = sum(count[r["matrix"]] * r["products_ms"] for r in mine)
        layer = [sum(count[r["matrix"]] * r["products_ms"] * r[key] for r in mine) / total for key in ("one_expert", f"{EXPERTS}_experts")]
        cells = [f"{r['one_expert']:.2f} / {r[f'{EXPERTS}_experts']:.2f}" for r in mine]
        shown.add_row(dtype, form, str(T), *cells, "{:.2f} / {:.2f}".format(*layer))
    Console().print(shown)


if __name__ == "__main__":
    main()
