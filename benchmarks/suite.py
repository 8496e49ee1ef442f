"""Every claim beside a peer, in one run: what `make bench` and `make bench-gpu` start.

    python benchmarks/suite.py                 this machine, on a CPU in less than ten minutes
    python benchmarks/suite.py --only ops training

Runs the quick settings of each benchmark in turn, appends their rows to benchmarks/results/, and prints the tables, and
last of all one table of what was claimed, what was found, and whether it holds. A claim that does not hold is said to,
and is no error; a wrong result is.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import decomposition
import experts
import generation
import ops
import torch
import training
from measure import RESULTS, append, machine, show
from paper_setup import Setup
from paper_speed import DTYPES, speed
from rich.table import Table

from t2kernels.ops.dispatch import device_of


class Part(NamedTuple):
    """rows: (device, seconds) -> what was measured; table: how it is shown"""

    rows: Callable[[torch.device, float], Iterator[dict]]
    table: Callable[[list[dict]], Table]
    packages: tuple[str, ...] = ("torch", "transformers", "peft")


def quick_ops(device: torch.device, seconds: float) -> Iterator[dict]:
    if device.type == "cuda":
        given = "--tokens 1 8 32 512 4096 --ranks 256 --each 0.15 --mixes all_distinct one".split()
    else:  # the matrices of a layer of 1024, and the square ones of Llama-3-8B
        sizes = "--models small --tokens 1 8 64 --ranks 64 --each 0.2"
        given = f"{sizes} --groups qkv gate+up --backward 128 --mixes all_distinct one 8_random".split()
    a = ops.arguments([*(word.replace("_", " ") for word in given), "--seconds", str(seconds)])
    yield from ops.run(device, a)
    if device.type == "cpu":
        big = (
            "--models llama-3-8b --groups o --tokens 1 8 --ranks 256 --each 0.5 --backward 0 --formats float32".split()
        )
        yield from ops.run(device, ops.arguments([*big, "--mixes", "all distinct", "--seconds", str(seconds)]))


def search_generation(task: str = "sub") -> Iterator[dict]:
    """A generation of the few-shot search on the built-in model: `paper_speed.speed` in each dtype, a row for each way
    of scoring."""
    for dtype in DTYPES:
        found = speed(Setup(model="tiny", dtype=dtype), task, torch.get_num_threads(), repeats=3)
        for mode, row in found.pop("modes").items():
            yield {"subject": "tiny", "task": task, "dtype": dtype, "mode": mode, **found, **row}


def search_table(rows: list[dict]) -> Table:
    out = Table("dtype", "scored by", "arm", "seconds", "over one batch", title="a generation of the search")
    for r in rows:
        for arm, seconds in r["seconds"].items():
            out.add_row(r["dtype"], r["mode"], arm, f"{seconds:.3f}", f"{seconds / r['seconds']['batch']:.2f}x")
    return out


PARTS = {
    "ops": Part(quick_ops, ops.table, ("torch", "peft")),
    "generation": Part(lambda device, s: generation.run(device, quick=True), generation.table),
    "population": Part(lambda device, s: search_generation(), search_table, ("torch", "transformers")),
    "experts": Part(lambda device, s: experts.run(device, quick=True), experts.table),
    "training": Part(lambda device, s: training.run(device, quick=True), training.table),
    "decomposition": Part(lambda device, s: decomposition.run(device, quick=True), decomposition.table, ("torch",)),
}
OPS_SECONDS = {"cpu": 90.0, "cuda": 180.0}


class Claim(NamedTuple):
    """what is claimed; found: its figure, from the rows of a part, largest or smallest as it is worst; limit: at most,
    or at least"""

    what: str
    part: str
    figures: Callable[[list[dict]], Iterable[float]]
    at_most: float | None = None
    at_least: float | None = None

    def judge(self, rows: list[dict]) -> tuple[str, str, str]:
        """(wanted, found, verdict)"""
        found = list(self.figures(rows))
        wanted = f"at most {self.at_most:g}x" if self.at_most is not None else f"at least {self.at_least:g}x"
        if not found:
            return wanted, "", "not measured"
        worst = max(found) if self.at_most is not None else min(found)
        holds = worst <= self.at_most if self.at_most is not None else worst >= self.at_least
        spread = (
            f"{worst:.2f}x"
            if len(found) == 1
            else f"{worst:.2f}x (of {len(found)}: {min(found):.2f} to {max(found):.2f})"
        )
        return wanted, spread, "holds" if holds else "DOES NOT HOLD"


def pick(rows: list[dict], key: str, **where) -> list[float]:
    return [
        r[key]
        for r in rows
        if key in r and all(r.get(k) in v if isinstance(v, tuple) else r.get(k) == v for k, v in where.items())
    ]


def ratio(rows: list[dict], key: str, above: str, below: str, **where) -> list[float]:
    """key of arm `above` over that of arm `below`, wherever both were run on the same work."""
    shared = ("subject", "batch", "experts")
    found = {tuple(r.get(s) for s in shared): r for r in rows if r["arm"] == below}
    mine = [r for r in rows if r["arm"] == above and all(r.get(k) == v for k, v in where.items())]
    return [r[key] / found[k][key] for r in mine if (k := tuple(r.get(s) for s in shared)) in found]


OURS = "delta R/16"
CLAIMS = (
    Claim(
        "a batch of 8 experts, over the same batch with one",
        "generation",
        lambda r: pick(r, "over_one", arm=tuple(generation.OURS), experts=8),
        1.15,
    ),
    Claim(
        "a batch of 64 experts, over the same batch with one",
        "generation",
        lambda r: pick(r, "over_one", arm=tuple(generation.OURS), experts=64),
        1.15,
    ),
    Claim(
        "delta form at R/16, prefill, over the dense model",
        "generation",
        lambda r: pick(r, "first_over_dense", arm=OURS, subject="mid"),
        1.25,
    ),
    Claim(
        "delta form at R/16, decode, over the dense model",
        "generation",
        lambda r: pick(r, "step_over_dense", arm=OURS, subject="mid"),
        1.25,
    ),
    *(
        Claim(
            f"{subject}: weights rebuilt for each of {experts}, over one batch",
            "generation",
            lambda r, subject=subject, experts=experts: ratio(
                r, "seconds", generation.PEERS[0], OURS, experts=experts, subject=subject
            ),
            None,
            4,
        )
        for subject, experts in (("mid", 8), ("tiny", 8), ("tiny", 64))
    ),
    Claim(
        "PEFT LoRA's mixed batch of 8, decode, over ours",
        "generation",
        lambda r: ratio(r, "step_s", generation.PEERS[1], OURS, experts=8),
        None,
        1,
    ),
    *(
        Claim(
            f"a generation of 32 candidates in {dtype} {name}, over one batch",
            "population",
            lambda r, key=key, dtype=dtype: pick(r, key, dtype=dtype),
            None,
            5,
        )
        for dtype in DTYPES
        for name, key in (
            ("one at a time", "one_at_a_time_over_batch"),
            ("with weights rebuilt for each", "rebuilt_over_batch"),
        )
    ),
    Claim(
        "a row written, over weights rebuilt",
        "experts",
        lambda r: pick(r, "over_rebuilding", arm="row write, from memory"),
        0.25,
    ),
    Claim(
        "a training step at R/16, over PEFT LoRA r=16",
        "training",
        lambda r: ratio(r, "step_s", "SVF, R/16", "PEFT LoRA r=16"),
        1,
    ),
)


def verdicts(rows: dict[str, list[dict]]) -> Table:
    out = Table("claim", "wanted", "found", "", title="what was claimed")
    for claim in CLAIMS:
        if claim.part in rows:
            out.add_row(claim.what, *claim.judge(rows[claim.part]))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun, rows, broken, spent = time.monotonic(), {}, [], {}
    if (load := os.getloadavg()[0]) > 1.5 and device.type == "cpu":
        print(f"the load of this machine is {load:.1f}: what else runs here will show in the figures")
    for impl, why in dict(device_of(device).unchecked).items() if device.type == "cuda" else ():
        print(f"auto runs without {impl}: {why}")
    for name in a.only:
        part, start = PARTS[name], time.monotonic()
        facts = machine(part.packages)
        found: list[dict] = []
        try:
            for row in part.rows(device, OPS_SECONDS[device.type]):
                append(a.out / f"{name}.jsonl", row | facts)
                found.append(row)
        except Exception:
            traceback.print_exc()
            broken.append(name)
        rows[name], spent[name] = found, time.monotonic() - start
    for name, found in rows.items():
        if found:
            show(PARTS[name].table(found))
    show(verdicts(rows))
    print(
        f"{time.monotonic() - begun:.0f} s on {machine()['machine']}: "
        + ", ".join(f"{n} {s:.0f} s" for n, s in spent.items())
    )
    if broken:
        print(f"NOT DONE, see above: {', '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
