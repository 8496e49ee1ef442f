"""What would an expert of a real model gain that carries more than a diagonal? The kinds of beyond_z.py on SmolLM2.

    python benchmarks/beyond_real.py --data DIR

For each kind: two learning rates on one seed and validation rows of TREC, then every task and seed at the better rate.
DIR holds trec.csv, subj.csv and sst2.csv with text, label and split. The model and the recipe are those of real.py: a
softmax over the options, exact gradients, `SVFConfig.choices`, but in 30 steps of 16 rows. An expert is learned on TREC
or Subj, and judged on it and on SST-2, by the likeliest option. A row for each run is appended to
benchmarks/results/beyond_real.jsonl. `beyond_pages.py` makes the page.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from beyond_z import BASE, ChangeTrainer, best_rates, change, linear_layers
from measure import RESULTS, append, machine
from paper import read
from torch import Tensor, nn

from t2kernels import tasks
from t2kernels.cli import models
from t2kernels.factors.factor import Factor, svd
from t2kernels.patching.gguf import unmark
from t2kernels.rollout.chat import prompt_form
from t2kernels.rollout.rewards import Scorer
from t2kernels.tasks import Task
from t2kernels.train import SVFConfig
from t2kernels.train.data import problems

OUT = RESULTS / "beyond_real.jsonl"
KINDS = {
    "z 32": (0.02, 0.05),
    "output 32": (0.01, 0.03),
    "core 6": (0.01, 0.03),
    "z 4": (0.03, 0.1),
    "core 2": (0.03, 0.1),
    "tied 840": (0.01, 0.03),
    "z 576": (0.006, 0.02),
    "core 22": (0.002, 0.006),
    "band 11": (0.01, 0.03),
    "tied 13": (0.02, 0.06),
}
"""{kind: the learning rates that are tried}: about 7,000 numbers, 840, 100,000, 13. "z 576" is every component."""
LABELS = {"trec": None, "subj": {"opinion": "review", "plot": "story"}, "sst2": None}
"""{task: {label in the file: its word}}. Between these words the base model cannot choose: it says one of them always.
And each is one token, so that an answer costs one row ("opinion" has two)."""
LONGEST = {"trec": 60, "subj": 90, "sst2": 70}
"""{task: characters of the longest text that is used}: it leaves 200 test rows, and short runs."""
TASKS, OTHER = ("trec", "subj"), "sst2"
TUNING_SEED = 100
STEPS, BATCH, COUNT, COUNT_OTHER = 30, 16, 200, 100


class OptionTrainer(ChangeTrainer):
    """Trains changes on tasks that are answered by options, and keeps what `evaluate` answered."""

    answered: list[str] | None = None

    def score(self, rows: Sequence, completions: Sequence, completion_ids: Any = None) -> Tensor:
        if self.answered is not None:
            self.answered += [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return super().score(rows, completions, completion_ids)


class Base(SimpleNamespace):
    """The model, its tokenizer, the factors of its linear layers, and the tasks."""

    model: nn.Module
    tokenizer: Any
    factors: list[Factor]
    tasks: dict[str, Task]


def load(name: str, data: Path) -> Base:
    """Everything that the runs share."""
    loaded = models.load(name)
    model = loaded.model.requires_grad_(False)
    unmark(model)
    form = prompt_form(loaded.tokenizer)
    found = {task: form.of_task(tasks.classification(data / f"{task}.csv", labels=LABELS[task])) for task in LABELS}
    factors = [svd(layer.weight) for layer in linear_layers(model)]
    return Base(model=model, tokenizer=loaded.tokenizer, factors=factors, tasks=found)


def short(task: Task, split: str, count: int | None = None) -> list[dict]:
    """The first rows of a split whose text is no longer than LONGEST."""
    rows = [r for r in task.split(split) if len(r["prompt"][0]["content"].split("\n\nText: ")[1]) <= LONGEST[task.name]]
    return rows[:count]


def prepare(base: Base, task: Task, kind: str, seed: int, rate: float, steps: int = STEPS) -> OptionTrainer:
    """The trainer of one run, on a copy of the model."""
    model = copy.deepcopy(base.model)
    changes = change(model, kind, seed, base.factors)
    args = SVFConfig.choices(
        f"beyond-{os.getpid()}",
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,  # less padding
        learning_rate=rate,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
    )
    data, scorers = problems({"change": short(task, "train")}, "train", "train"), {"change": Scorer.of(task)}
    trainer = OptionTrainer(model, args, data, None, scorers, base.tokenizer, {"change": task})
    trainer.changes = changes
    return trainer


def judged(trainer: OptionTrainer, task: Task, split: str, count: int) -> tuple[float, float]:
    """(accuracy by the likeliest option, the share of the most common answer) on the first rows of a split."""
    trainer.scorers, trainer.choosers = {"change": Scorer.of(task)}, {"change": task}
    trainer.answered = []
    rows = problems({"change": short(task, split, count)}, "test", "test")
    accuracy = trainer.evaluate(rows)["eval_accuracy"]
    answers, trainer.answered = Counter(trainer.answered), None
    return round(accuracy, 4), round(answers.most_common(1)[0][1] / answers.total(), 4)


def run(base: Base, task: str, kind: str, seed: int, rate: float, split: str, steps: int) -> dict:
    """One run: trained, and judged on its own task and, but for validation, on the other."""
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = prepare(base, base.tasks[task], "z 1" if kind == BASE else kind, seed, rate, max(1, steps))
    if steps:
        trainer.train()
    trained = time.process_time() - cpu
    logs = [log for log in trainer.state.log_history if "reward" in log]
    own = judged(trainer, base.tasks[task], split, COUNT)
    other = judged(trainer, base.tasks[OTHER], split, COUNT_OTHER) if split == "test" else (None, None)
    return {
        "task": task,
        "kind": kind,
        "seed": seed,
        "split": split,
        "learning_rate": rate,
        "steps": steps,
        "batch": BATCH,
        "N": len(short(base.tasks[task], split, COUNT)),
        "N_other": COUNT_OTHER if split == "test" else 0,
        "numbers": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if steps else 0,
        "accuracy": own[0],
        "most_common": own[1],
        "other": other[0],
        "other_most_common": other[1],
        "rewards": [round(log["reward"], 4) for log in logs],
        "written": [round(log["written"], 3) for log in logs],
        "train_cpu_seconds": round(trained, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }


def cells(rows: Sequence[dict], kind: str, chosen: Sequence[str], seeds: Sequence[int]) -> list:
    """The arguments of `run` of what is to be done next for a kind: its rates, then its seeds. What the rows hold is
    left out."""
    rates = best_rates(rows)
    wanted = [(task, BASE, 0, 0.0, "test", 0) for task in chosen]
    wanted += [("trec", kind, TUNING_SEED, rate, "validation", STEPS) for rate in KINDS[kind]]
    there = {(r["task"], r["kind"], r["seed"], r["learning_rate"]) for r in rows}
    waiting = [cell for cell in wanted if cell[:4] not in there]
    if waiting:
        return waiting
    wanted = [(task, kind, seed, rates[kind], "test", STEPS) for seed in seeds for task in chosen]
    return [cell for cell in wanted if cell[:4] not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where the CSV files are")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    base = load(given.model, given.data)
    facts = machine(("torch", "transformers"))
    for kind in given.kinds:
        while waiting := cells(read(given.out), kind, given.tasks, given.seeds):
            row = run(base, *waiting[0])
            append(given.out, {"model": given.model} | row | facts)
            shown = ("task", "kind", "seed", "learning_rate", "accuracy", "other", "cpu_seconds")
            print({key: row[key] for key in shown}, flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
