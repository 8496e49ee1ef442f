"""Experts of a real language model on mixed traffic and on tasks that none of them was trained for.

    python benchmarks/real_adapt.py --experts experts --trained trec.csv sst2.csv subj.csv --expert-seeds 1 0 0 \\
        --unseen trec.csv sst2.csv subj.csv tickets trec.csv=explanation,amount,human,location,object

The experts are DIR/TASK-SEED.safetensors, from `real.py --save`, of each task in --trained; with --experts shipped,
those that come with the model. Accuracy is the share of test rows whose likeliest label is right; nothing is written.

- part "routing": the test rows of all trained tasks in one stream. `base`, `own` (each row by the expert of its task),
  `nearest` (`adapt.Nearest` with four training prompts of each task), `prompt` (`adapt.Prompt`: the base model names
  the task, calibrated on those prompts), and each expert on everything.
- part "few-shot": for each unseen task a search over mixtures of the experts on --shots training rows, for each seed.
  An expert of the task itself does not take part. FILE=WORD,WORD,... asks the texts of a file with these words in the
  place of its labels, in the order of the alphabet: the task is known, its words are not. `single` is the expert that
  the same rows choose by the same score, `found` the mixture, `cautious` what `FewShot` keeps of it by default.
  Of a task with fewer than 100 test rows, all rows but the shots are test rows.

Rows are appended to benchmarks/results/real_adapt.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
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
from t2kernels.adapt import CEMConfig, Examples, FewShot, Nearest, Prompt, Question
from t2kernels.cli import models
from t2kernels.tasks import Task

SHOTS = 4  # training prompts of each task that the routers see
NAMES = {"trec": "questions", "sst2": "reviews", "subj": "opinions"}  # what the prompts of a task are called
FEW = 100  # a task with fewer test rows is tested on all rows but the shots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--experts", default="shipped", metavar="DIR")
    parser.add_argument("--trained", nargs="+", required=True, metavar="TASK", help="as of real.py")
    parser.add_argument("--expert-seeds", nargs="+", type=int, help="of the trained tasks' experts; 0 if not given")
    parser.add_argument("--unseen", nargs="*", default=[], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the examples and the search")
    parser.add_argument("--routers", nargs="+", default=["nearest", "prompt"], choices=["nearest", "prompt"])
    parser.add_argument("--no-routing", action="store_true")
    parser.add_argument("--n", type=int, default=200, help="at most so many test rows of a task")
    parser.add_argument("--shots", type=int, default=16, help="labelled rows of an unseen task")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_adapt.jsonl")
    arguments = parser.parse_args()
    loaded = models.load(arguments.model)
    bank = t2.patch_model(loaded.model.requires_grad_(False), rows=64)
    trained = [load(name, loaded.tokenizer) for name in arguments.trained]
    shipped = tiny.experts(arguments.model) if arguments.experts == "shipped" else {}
    seeds = arguments.expert_seeds or [0] * len(trained)
    for task, file, seed in zip(trained, arguments.trained, seeds, strict=True):
        path = Path(arguments.experts) / f"{task.name}-{seed}.safetensors"
        bank.add(task.name, shipped[Path(file).stem] if shipped else t2.Expert.load(path))
    facts = {"model": loaded.name, "experts": [task.name for task in trained], "expert_seeds": seeds}
    facts |= machine(("torch", "transformers"))
    judge = Judge(loaded, arguments.n)
    shown = Table("part", "task", "seed", "arm", "N", "accuracy", "")

    def write(row: dict) -> None:
        append(arguments.out, {**row, **facts})
        note = row.get("right_routes", row.get("note", ""))
        rate = f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}"
        shown.add_row(row["part"], row["task"], str(row.get("seed", "")), row["arm"], str(row["N"]), rate, str(note))

    if not arguments.no_routing:
        for row in routing(judge, trained, arguments.routers):
            write(row)
    for name in arguments.unseen:
        known = next((task for task, file in zip(trained, arguments.trained, strict=True) if file == name), None)
        task = known or unseen(name, loaded.tokenizer)
        for seed in arguments.seeds:
            names = [other.name for other in trained if other is not known]
            for row in few_shot(judge, task, names, seed, arguments.shots):
                write(row)
    Console().print(shown)


def unseen(name: str, tokenizer: object) -> Task:
    """The task of a file, of a name of `real.load`, of "tickets" (the package's), or of FILE=WORD,WORD,..."""
    file, _, words = name.partition("=")
    if file == "tickets":
        return load(str(tiny.tickets()), tokenizer)
    if not words:
        return load(file, tokenizer)
    with open(file, newline="") as source:
        rows = list(csv.DictReader(source))
    labels = sorted({row["label"] for row in rows})
    other = dict(zip(labels, words.split(","), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(file).stem}_reworded.csv"
        with open(path, "w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "label": other[row["label"]]} for row in rows)
        task = load(str(path), tokenizer)
        task.split("train", 1)  # the file is read here, at the latest
        return task


class Judge:
    """Which test rows an expert or a mixture gets right. Each is asked once.

    loaded: the patched model; count: at most so many test rows of a task
    """

    def __init__(self, loaded: models.Loaded, count: int) -> None:
        self.loaded = loaded
        self.count = count
        self._known: dict[tuple, list[bool]] = {}

    def rows(self, task: Task) -> list[dict]:
        """The test rows of a task; of one with few of them, all its rows."""
        test = task.split("test")
        return test[: self.count] if len(test) >= FEW else [*task.split("train"), *test]

    def right(self, task: Task, expert: str | None, alpha: Sequence[float] | None = None) -> list[bool]:
        """Whether the likeliest option of each test row is right. alpha: what a mixture is made of."""
        key = (id(task), expert if alpha is None else tuple(alpha))
        if key not in self._known:
            rows, model, tokenizer = self.rows(task), self.loaded.model, self.loaded.tokenizer
            prompts, options = [row["prompt"] for row in rows], [task.options(row) for row in rows]
            experts = [expert] * len(rows)
            chosen = evaluation.choices(model, tokenizer, prompts, options, experts, task.norm, batch=32)
            self._known[key] = [said == row["answer"] for said, row in zip(chosen, rows, strict=True)]
        return self._known[key]


def row_of(part: str, task: str, arm: str, found: Sequence[bool], **more: object) -> dict:
    """A row of the results, with the binomial standard error."""
    share, count = sum(found) / len(found), len(found)
    error = sqrt(share * (1 - share) / count)
    numbers = {"N": count, "accuracy": round(share, 4), "standard_error": round(error, 4)}
    return {"part": part, "task": task, "arm": arm, **numbers, **more}


def routing(judge: Judge, trained: Sequence[Task], routers: Sequence[str]) -> list[dict]:
    """Each arm on the test rows of all trained tasks."""
    model, tokenizer = judge.loaded.model, judge.loaded.tokenizer
    stream = [(task, i, row) for task in trained for i, row in enumerate(judge.rows(task))]
    prompts = [row["prompt"] for _, _, row in stream]
    examples = {task.name: [row["prompt"] for row in task.split("train", SHOTS)] for task in trained}
    own: list[str | None] = [task.name for task, _, _ in stream]
    chosen: dict[str, Sequence[str | None]] = {"base": [None] * len(stream), "own": own}
    seconds = {}
    for arm in routers:
        start = time.process_time()
        if arm == "nearest":
            router = Nearest(model, tokenizer, examples)
        else:
            router = Prompt(
                model,
                tokenizer,
                Question.about(
                    {NAMES.get(n, n): n for n in examples}, other=None, chat=not isinstance(prompts[0], str)
                ),
            )
            router.calibrate([prompt for some in examples.values() for prompt in some])
        chosen[arm] = router.choose(prompts)
        seconds[arm] = round((time.process_time() - start) / len(stream), 4)
    chosen |= {name: [name] * len(stream) for name in examples}
    out = []
    for arm, names in chosen.items():
        more: dict[str, object] = {}
        if arm in seconds:
            routes = sum(a == b for a, b in zip(names, own, strict=True)) / len(stream)
            more = {"right_routes": round(routes, 4), "cpu_seconds_a_prompt": seconds[arm]}
        found = [judge.right(task, name)[i] for (task, i, _), name in zip(stream, names, strict=True)]
        out.append(row_of("routing", "mixed", arm, found, **more))
    return out


def few_shot(judge: Judge, task: Task, experts: Sequence[str], seed: int, count: int) -> list[dict]:
    """Base, each expert, single expert and found mixture on a task that no expert was trained for."""
    model, tokenizer = judge.loaded.model, judge.loaded.tokenizer
    shots = task.split("train", None, seed)[seed * count :][:count]
    examples = Examples(model, tokenizer, shots, task)
    start = time.process_time()
    config = CEMConfig.options(seed=seed)
    strategy = FewShot(model, tokenizer, examples, experts, config, name="found", replace=True)
    seconds = round(time.process_time() - start, 1)
    scores = examples.score(model.t2_bank.ids([None, *experts]))
    worth = dict(zip([None, *experts], scores.expected.mean(1).tolist(), strict=True))
    single = max(experts, key=worth.__getitem__)
    alpha = strategy.found.alpha.flatten().tolist()
    seen = [row["prompt"] for row in shots]
    kept_rows = [i for i, row in enumerate(judge.rows(task)) if row["prompt"] not in seen]
    only = lambda values: [values[i] for i in kept_rows]  # noqa: E731
    arms = {"base": judge.right(task, None), **{name: judge.right(task, name) for name in experts}}
    arms["found"] = judge.right(task, "found", [*map(str, experts), *alpha])
    shared = {"seed": seed, "shots": len(shots), "unseen_for": list(experts)}
    out = [row_of("few-shot", task.name, arm, only(values), **shared) for arm, values in arms.items()]
    out.append(row_of("few-shot", task.name, "single", only(arms[single]), note=single, **shared))
    kept = "found" if strategy.name else "base"
    more = {
        "alpha": [round(a, 3) for a in alpha],
        "worth": {str(name or "base"): round(value, 4) for name, value in worth.items()},
        "gain": round(strategy.gain, 4),
        "error": round(strategy.error, 4),
        "candidates": strategy.found.candidates,
        "cpu_seconds": seconds,
    }
    out.append(row_of("few-shot", task.name, "cautious", only(arms[kept]), note=kept, **shared, **more))
    return out


if __name__ == "__main__":
    main()
