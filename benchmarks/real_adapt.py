"""Experts of a real language model on mixed traffic and on tasks that none was trained for.

    python benchmarks/real_adapt.py --experts experts --seed 0 --trained trec.csv sst2.csv --unseen subj.csv

The experts are DIR/TASK-SEED.safetensors, from `real.py --save`, of each task in --trained; with --experts shipped,
those that come with the model. Accuracy is the share of test rows whose likeliest label is right; nothing is written.

- part "routing": the test rows of all trained tasks in one stream. `base`, `own` (each row by the expert of its task),
  `nearest` (`adapt.Nearest` with four training prompts of each task), and each expert on everything.
- part "few-shot": for each unseen task a search over mixtures of the experts on --shots training rows. `single` is the
  expert that the same rows choose, `found` the mixture, `cautious` what `FewShot` keeps of it by default.

Rows are appended to benchmarks/results/real_adapt.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from measure import RESULTS, append, machine
from real import load
from rich.console import Console
from rich.table import Table

import t2kernels as t2
from t2kernels import evaluation, tiny
from t2kernels.adapt import CEMConfig, Examples, FewShot, Nearest
from t2kernels.cli import models
from t2kernels.tasks import Task

SHOTS = 4  # training prompts of each task that `Nearest` sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--experts", default="shipped", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the experts, the examples and the search")
    parser.add_argument("--trained", nargs="+", required=True, metavar="TASK", help="as of real.py")
    parser.add_argument("--unseen", nargs="*", default=[], metavar="TASK")
    parser.add_argument("--n", type=int, default=200, help="at most so many test rows of a task")
    parser.add_argument("--shots", type=int, default=16, help="labelled rows of an unseen task")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_adapt.jsonl")
    arguments = parser.parse_args()
    loaded = models.load(arguments.model)
    bank = t2.patch_model(loaded.model.requires_grad_(False), rows=64)
    trained = [load(name, loaded.tokenizer) for name in arguments.trained]
    shipped = tiny.experts(arguments.model) if arguments.experts == "shipped" else {}
    for task, file in zip(trained, arguments.trained, strict=True):
        path = Path(arguments.experts) / f"{task.name}-{arguments.seed}.safetensors"
        bank.add(task.name, shipped[Path(file).stem] if shipped else t2.Expert.load(path))
    facts = {"model": loaded.name, "seed": arguments.seed, "experts": [task.name for task in trained]}
    facts |= machine(("torch", "transformers"))
    shown = Table("part", "task", "arm", "N", "accuracy", "")
    rows = list(routing(loaded, trained, arguments.n))
    for name in arguments.unseen:
        task = load(name, loaded.tokenizer)
        rows += few_shot(loaded, task, [task.name for task in trained], arguments)
    for row in rows:
        append(arguments.out, {**row, **facts})
        note = row.get("right_routes", row.get("note", ""))
        shown.add_row(
            row["part"],
            row["task"],
            row["arm"],
            str(row["N"]),
            f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
            str(note),
        )
    Console().print(shown)


def right(loaded: models.Loaded, task: Task, rows: Sequence[dict], experts: Sequence[str | None]) -> list[bool]:
    """Whether the likeliest option of each row is right, each row with its own expert."""
    prompts, options = [row["prompt"] for row in rows], [task.options(row) for row in rows]
    chosen = evaluation.choices(loaded.model, loaded.tokenizer, prompts, options, experts, task.norm, batch=32)
    return [said == row["answer"] for said, row in zip(chosen, rows, strict=True)]


def row_of(part: str, task: str, arm: str, found: Sequence[bool], **more: object) -> dict:
    """A row of the results, with the binomial standard error."""
    share, count = sum(found) / len(found), len(found)
    error = sqrt(share * (1 - share) / count)
    numbers = {"N": count, "accuracy": round(share, 4), "standard_error": round(error, 4)}
    return {"part": part, "task": task, "arm": arm, **numbers, **more}


def routing(loaded: models.Loaded, trained: Sequence[Task], count: int) -> list[dict]:
    """Each arm on the test rows of all trained tasks."""
    stream = [(task, row) for task in trained for row in task.split("test")[:count]]
    examples = {task.name: [row["prompt"] for row in task.split("train", SHOTS)] for task in trained}
    start = time.process_time()
    nearest = Nearest(loaded.model, loaded.tokenizer, examples).choose([row["prompt"] for _, row in stream])
    seconds = round((time.process_time() - start) / len(stream), 4)
    own: list[str | None] = [task.name for task, _ in stream]
    known: dict[tuple[int, str | None], bool] = {}
    for expert in [None, *examples]:  # every expert on every row: the other arms are made of these
        at = 0
        for task in trained:
            rows = [row for other, row in stream if other is task]
            found = right(loaded, task, rows, [expert] * len(rows))
            known |= {(at + i, expert): value for i, value in enumerate(found)}
            at += len(rows)
    arms: dict[str, Sequence[str | None]] = {"base": [None] * len(stream), "own": own, "nearest": nearest}
    arms |= {name: [name] * len(stream) for name in examples}
    out = []
    for arm, chosen in arms.items():
        more: dict[str, object] = {}
        if arm == "nearest":
            routes = sum(a == b for a, b in zip(chosen, own, strict=True)) / len(stream)
            more = {"right_routes": round(routes, 4), "cpu_seconds_a_prompt": seconds}
        out.append(row_of("routing", "mixed", arm, [known[i, name] for i, name in enumerate(chosen)], **more))
    return out


def few_shot(loaded: models.Loaded, task: Task, experts: Sequence[str], arguments: argparse.Namespace) -> list[dict]:
    """Base, single expert and found mixture on a task that no expert was trained for."""
    bank = loaded.model.t2_bank
    shots = task.split("train", None, arguments.seed)[arguments.seed * arguments.shots :][: arguments.shots]
    examples = Examples(loaded.model, loaded.tokenizer, shots, task)
    start = time.process_time()
    config = CEMConfig(seed=arguments.seed)
    strategy = FewShot(loaded.model, loaded.tokenizer, examples, experts, config, name="found", replace=True)
    seconds = round(time.process_time() - start, 1)
    single = experts[int(examples.score(bank.ids(list(experts))).rewards.mean(1).argmax())]
    arms: dict[str, str | None] = {"base": None, **{name: name for name in experts}, "found": "found"}
    test = task.split("test")[: arguments.n]
    found = {arm: right(loaded, task, test, [name] * len(test)) for arm, name in arms.items()}
    shared = {"shots": len(shots)}
    out = [row_of("few-shot", task.name, arm, values, **shared) for arm, values in found.items()]
    out.append(row_of("few-shot", task.name, "single", found[single], note=single, **shared))
    kept = "found" if strategy.name else "base"
    weights = [round(a, 2) for a in strategy.found.alpha.flatten().tolist()]
    more = {"alpha": weights, "candidates": strategy.found.candidates, "cpu_seconds": seconds}
    out.append(row_of("few-shot", task.name, "cautious", found[kept], note=kept, **shared, **more))
    return out


if __name__ == "__main__":
    main()
