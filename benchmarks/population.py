"""How long does a generation of the few-shot search take: 32 candidates in one batch, one at a time, and with dense weights rebuilt for each?

    python benchmarks/population.py

Ten examples of a task of the built-in model, scored by sampled answers, and by answers and likelihoods, in fp32 and in bf16. In fp32 every arm
writes the same tokens, or nothing is timed; in bf16 a row says how many answers are the same. Rows are appended to benchmarks/results/population.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import RESULTS, append, machine, show
from paper_setup import Setup
from paper_speed import DTYPES, speed
from rich.table import Table

TASK = "sub"


def run(device: torch.device, quick: bool = False, report: Callable[[str], None] = print) -> Iterator[dict]:
    threads = torch.get_num_threads()
    report("population: 32 candidates over 10 examples")
    for dtype in DTYPES:
        found = speed(Setup(model="tiny", dtype=dtype), TASK, threads, repeats=3 if quick else 7)
        for mode, row in found.pop("modes").items():
            yield {"subject": "tiny", "task": TASK, "dtype": dtype, "mode": mode, **found, **row}


def table(rows: list[dict]) -> Table:
    out = Table("dtype", "scored by", "arm", "seconds", "over one batch", title="a generation of the search")
    for r in rows:
        for arm, seconds in r["seconds"].items():
            out.add_row(r["dtype"], r["mode"], arm, f"{seconds:.3f}", f"{seconds / r['seconds']['batch']:.2f}x")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "population.jsonl")
    a = parser.parse_args()
    facts, rows = machine(("torch", "transformers")), []
    for found in run(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        append(a.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
