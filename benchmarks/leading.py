"""How much sooner are the leading components there than all of them, and does an expert do the same with them?

    python benchmarks/leading.py

256 components of one matrix in bf16, by the algorithm of few components and by the exact path, which is all of AᵀA in
fp64, as the project did at first. An expert of random z is compared between the two before a time is stated. Rows are
appended to benchmarks/results/leading.jsonl.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import torch
from measure import RESULTS, append, machine, require
from torch import Tensor

from t2kernels.factors import linalg

RANK = 256
CASES = ((4096, 4096, "power"), (4096, 4096, "spikes"), (4096, 4096, "flat"), (14336, 4096, "power"))
LARGE = (8192, 28672, "power")  # the exact path would take minutes


def weight(M: int, N: int, kind: str) -> Tensor:
    """[M, N] bf16. power: singular values of about i^-0.5; spikes: 64 on a random bulk; flat: Gaussian."""
    torch.manual_seed(0)
    if kind == "flat":
        return torch.randn(M, N).bfloat16()
    count = 64 if kind == "spikes" else min(M, N, 4096)
    sizes = 2 + 18 * torch.rand(count) if kind == "spikes" else torch.arange(1, count + 1).float() ** -0.5
    W = (torch.randn(M, count) / M**0.5 * sizes) @ (torch.randn(count, N) / N**0.5)
    if kind == "spikes":
        W += torch.randn(M, N) / (M**0.5 + N**0.5)
    return W.bfloat16()


def effect(found: linalg.SVD, change: Tensor, dtype: torch.dtype) -> Tensor:
    U, sigma, Vt = (t.to(dtype).double() for t in found[:3])
    return (U * (sigma * change)) @ Vt


def timed(A: Tensor, exact: bool) -> tuple[linalg.SVD, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    with mock.patch.object(linalg, "pays", return_value=not exact):
        found = linalg.svd(A, RANK)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def one(M: int, N: int, kind: str, compare: bool = True) -> dict:
    A = weight(M, N, kind)
    found, seconds, cpu = timed(A, False)
    row = {"shape": [M, N], "spectrum": kind, "rank": RANK, "threads": torch.get_num_threads()}
    row |= {"algorithm": found.algorithm, "seconds": seconds, "cpu_seconds": cpu, "residual": found.residual}
    if not compare:
        require("the residual", found.residual, linalg.TOLERANCE)
        return row
    truth, exact, exact_cpu = timed(A, True)
    change = 0.25 * torch.randn(RANK, dtype=torch.float64)
    wanted = effect(truth, change, torch.float64)

    def off(of: linalg.SVD, dtype: torch.dtype) -> float:
        return ((effect(of, change, dtype) - wanted).norm() / wanted.norm()).item()

    row |= {"off_fp64": require("an expert, fp64", off(found, torch.float64), 3e-8)}
    row |= {"off_fp32": off(found, torch.float32), "exact_off_fp32": off(truth, torch.float32)}
    row |= {"exact_seconds": exact, "exact_cpu_seconds": exact_cpu, "exact_algorithm": truth.algorithm}
    return row | {"ratio": exact / seconds, "cpu_ratio": exact_cpu / cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "leading.jsonl")
    a = parser.parse_args()
    linalg.svd(torch.randn(1100, 1024).bfloat16(), 64)  # the first products load libraries
    for case in (*CASES, LARGE):
        row = one(*case, compare=case != LARGE)
        append(a.out, row | machine(("torch",)))
        print(row, flush=True)


if __name__ == "__main__":
    main()
