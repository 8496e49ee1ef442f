"""The tables of the Transformer² paper (arXiv 2501.06252), on the built-in model or on any causal language model.

    python benchmarks/paper.py --model tiny                                    every part, two processes;
    docs/explanation/paper.md holds the tables python benchmarks/paper.py --model meta-llama/Meta-Llama-3-8B-Instruct
    --jobs 1 --cache runs/llama      the same, by the release's settings

Parts: trained (what RL gains on the trained tasks: those cells of rl.py that rl.jsonl does not hold for as many steps),
    lora (adapters of the trained tasks, kept in --cache), routes (each unseen task: base, every expert, every way to
    choose one), few (each unseen task and seed: CEM and its controls on the same examples), mixings (what CEM mixes),
    mixed (routing on mixed traffic, cost of the first pass), transfer, speed (a CEM generation). Another model has the
    part experts, which trains and keeps them, in place of trained and transfer. A row for each cell is appended to
    benchmarks/results/paper.jsonl; cells that are there already, for the same model and settings, are not run again
    unless --again. The unseen tasks were fixed before any result.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import RESULTS, append, machine, weights
from paper_adapt import few, mixed, mixings, routes, train_expert, train_lora, trained
from paper_setup import CACHE, Setup
from paper_speed import speeds
from paper_transfer import moved
from rich.console import Console

from t2kernels.cli import models

PARTS = {
    "trained": trained,
    "experts": train_expert,
    "lora": train_lora,
    "routes": routes,
    "few": few,
    "mixed": mixed,
    "mixings": mixings,
    "transfer": moved,
    "speed": speeds,
}


ARMS = {"lora r=16": (), "svf R": (), "svf R/8": (), "svf mlp": ("code",), "svf attention": ("code",)}
"""Arms of rl.py that the tables have, and on which tasks; (): on all."""


def cells(setup: Setup, parts: list[str], seeds: list[int], siblings: list[str]) -> list[list[tuple[str, str, int]]]:
    """(part, task, seed) of everything to do, in stages: a stage needs what the one before it made."""
    first = [("experts", t, 0) for t in setup.experts] if not setup.is_tiny else []
    first += [("lora", t, 0) for t in setup.trained]
    if setup.is_tiny:
        first += [
            ("trained", f"{t}:{arm}", s) for arm, only in ARMS.items() for t in only or setup.trained for s in seeds
        ]
    second = (
        [("few", t, s) for t in setup.unseen for s in seeds]
        + [("routes", t, 0) for t in setup.unseen]
        + [("mixed", "", 0)]
    )
    second += [("mixings", t, 0) for t in setup.unseen]
    if setup.is_tiny:
        second += [("transfer", s, 0) for s in siblings]
    stages = [
        first,
        second,
        [("speed", task, threads) for task in setup.unseen[:1] + setup.unseen[5:6] for threads in (1, 2)],
    ]  # times are taken when nothing else runs
    return [[cell for cell in stage if cell[0] in parts] for stage in stages]


def run(setup: Setup, part: str, task: str, seed: int) -> dict:
    start = time.perf_counter()
    row = PARTS[part](setup, task, seed)
    return {
        "model": setup.model,
        "part": part,
        "task": label(part, task),
        "seed": seed,
        **row,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny', a checkpoint's directory, or a model's id on the hub")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--trained",
        nargs="+",
        help="tasks with an expert, by name or .jsonl file  [tiny: math code reason; else gsm8k mbpp arc_easy]",
    )
    parser.add_argument(
        "--unseen", nargs="+", help="tasks without  [tiny: its eight; else hendrycks_math humaneval arc_challenge]"
    )
    parser.add_argument(
        "--related", nargs="+", help="for each unseen task the trained one whose LoRA adapter is tried on it"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=1000, help="test problems of a task, at most")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of RL, for adapters and experts")
    parser.add_argument("--iterations", type=int, help="CEM generations at most")
    parser.add_argument(
        "--siblings",
        nargs="+",
        default=["web"],
        help="where experts of the tiny model are taken: 'web', or checkpoints",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; 1 on a GPU")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained adapters and experts are kept")
    parser.add_argument("--chat", action="store_true", help="ask with messages, for the model's chat template")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--again", action="store_true", help="run also what the results hold already")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.jsonl")
    given = parser.parse_args()
    same = ("model", "n", "shots", "steps", "iterations", "cache", "chat", "dtype", "device")
    chosen = {key: getattr(given, key) for key in same}
    if given.model != models.TINY:
        chosen |= {
            "trained": ("gsm8k", "mbpp", "arc_easy"),
            "unseen": ("hendrycks_math", "humaneval", "arc_challenge"),
            "related": ("gsm8k", "mbpp", "arc_easy"),
        }
    chosen |= {key: tuple(getattr(given, key)) for key in ("trained", "unseen", "related") if getattr(given, key)}
    setup, console = Setup(**chosen), Console()
    if len(setup.related) != len(setup.unseen):
        parser.error(
            f"--related names {len(setup.related)} tasks for {len(setup.unseen)} unseen ones; one for each is wanted"
        )
    for name in (*setup.trained, *setup.unseen):
        try:
            setup.task(name).split("test", 1)
        except (ImportError, OSError, ValueError) as e:  # what is not there is said now, not after hours
            parser.error(f"task {name}: {e}")
    there = set() if given.again else measured(setup, given.out)
    facts = machine(("torch", "transformers", "peft")) | {"settings": settings(setup), "jobs": given.jobs}
    for stage in cells(setup, given.parts, given.seeds, given.siblings):
        waiting = [
            c
            for c in stage
            if (setup.model, c[0], label(c[0], c[1]), c[2]) not in there
            and not (c[0] == "lora" and setup.adapter(c[1]).is_dir())
        ]
        waiting = [c for c in waiting if c[0] != "experts" or not setup.experts[c[1]].is_file()]
        jobs = 1 if stage and stage[0][0] == "speed" else given.jobs
        for done, row in enumerate(work(setup, waiting, jobs), 1):
            append(given.out, row | facts)
            shown = {k: v for k, v in row.items() if k in ("accuracy", "modes")}
            console.print(
                f"{done}/{len(waiting)} {row['part']} {row['task']} {row['seed']}: {row['seconds']} s {shown}",
                highlight=False,
            )


def work(setup: Setup, waiting: list[tuple[str, str, int]], jobs: int):
    """Rows as they are done, by `jobs` processes, or in this one."""
    if jobs == 1:
        yield from (run(setup, *cell) for cell in waiting)
        return
    threads = max(1, torch.get_num_threads() // jobs)  # more would only wait for each other
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for future in as_completed([pool.submit(run, setup, *cell) for cell in waiting]):
            yield future.result()


def settings(setup: Setup) -> dict:
    found = {"n": setup.n, "shots": setup.shots, "steps": setup.steps, "iterations": setup.iterations}
    return found | {"weights": weights()} if setup.is_tiny else found


def measured(setup: Setup, out: Path) -> set[tuple]:
    """The cells that rows hold already, for these settings and weights; what RL gains may be among the rows of
    rl.py."""
    now = settings(setup)
    there = {key(row) for row in read(out) if row["settings"] == now}
    if setup.is_tiny:
        rows = [r for r in read(RESULTS / "rl.jsonl") if (r["steps"], r["weights"]) == (setup.steps, now["weights"])]
        there |= {key({"model": setup.model, "part": "trained", **row}) for row in rows}
    return there


def key(row: dict) -> tuple:
    return row["model"], row["part"], f"{row['task']}:{row['arm']}" if "arm" in row else row["task"], row["seed"]


def label(part: str, task: str) -> str:
    """What a cell is called in rows, which hold no directories."""
    return task if part == "trained" else Path(task).stem


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
