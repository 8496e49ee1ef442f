"""Four tasks, learned one after the other: what is left of the first when the last has been learned?

    python benchmarks/continual.py      three ways, three seeds, on the built-in model

    experts     an expert of its own for each task, in one bank; every expert by its name, or by the router
    one z       the numbers of one expert, trained on all four tasks in sequence
    one LoRA    one LoRA adapter, trained on all four tasks in sequence

The same RL for all (REINFORCE, as in beyond_z.py, with the rates that it tuned). After each stage every task is
answered greedily: by its expert, where it has one; else by the base model, or by the one adapter. A row for each way,
seed and stage is appended to benchmarks/results/continual.jsonl. `beyond_pages.py` makes the page.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from beyond_z import OUT as TUNED
from beyond_z import best_rates, settings
from measure import RESULTS, append, machine, weights
from paper import read
from rl import LoraTrainer, lora

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.adapt import Classifier, Question
from t2kernels.evaluation import answers
from t2kernels.rollout.rewards import Scorer
from t2kernels.train import SVFTrainer
from t2kernels.train.data import problems

OUT = RESULTS / "continual.jsonl"
SEQUENCE = ("math", "code", "reason", "classify")
WAYS = ("experts", "one z", "one LoRA")
RANK = 8
STEPS, N = 40, 150


class Learner:
    """One way to learn tasks in sequence on one model. numbers: how many it has learned so far"""

    def __init__(self, way: str, seed: int, rate: float, steps: int) -> None:
        self.way, self.seed, self.rate, self.steps = way, seed, rate, steps
        self.model, self.tokenizer = tiny.load()
        self.numbers = 0
        if way == "one LoRA":
            self.model = lora(self.model, RANK, seed)
            self.numbers = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        else:
            self.bank = t2.patch_model(self.model)

    def learn(self, name: str) -> None:
        """Train on one task, after those before it."""
        task = tasks.load(name)
        args = settings("continual", task, self.seed, self.rate, self.steps)
        if self.way == "one LoRA":
            data, scorers = problems({"lora": task}, "train", "train"), {"lora": Scorer.of(task.reward)}
            LoraTrainer(self.model, args, data, None, scorers, processing_class=self.tokenizer).train()
            return
        expert, before = (name, None) if self.way == "experts" else ("one", None)
        if expert in self.bank:
            before = self.bank[expert]
            self.bank.remove(expert)
        SVFTrainer(self.model, args, task, experts=expert, init=before, processing_class=self.tokenizer).train()
        self.numbers = sum(self.bank[e].numel for e in self.bank.names)

    def answers(self, name: str, rows: Sequence[dict], expert: str | None = None) -> list[str]:
        """What is written to the problems of a task now. expert: None: that of the task"""
        task, prompts = tasks.load(name), [row["prompt"] for row in rows]
        if self.way == "one LoRA":
            return answers(self.model, self.tokenizer, prompts, None, task.max_new_tokens)
        expert = expert or (name if self.way == "experts" else "one")
        who = [expert if expert in self.bank else None] * len(rows)
        return answers(self.model, self.tokenizer, prompts, who, task.max_new_tokens)


def right(name: str, rows: Sequence[dict], written: Sequence[str]) -> float:
    """The share of answers that are right."""
    rewards = tasks.load(name).reward(
        [row["prompt"] for row in rows], list(written), answer=[row["answer"] for row in rows]
    )
    return round(sum(r > 0 for r in rewards) / len(rows), 4)


def routed(learner: Learner, test: dict[str, list[dict]]) -> dict:
    """Traffic of three tasks in one batch, each prompt to the expert that the fourth, the classifier, names."""
    names = SEQUENCE[:3]
    rows = [(name, row) for name in names for row in test[name]]
    prompts = [row["prompt"] for _, row in rows]
    chosen = Classifier(learner.model, learner.tokenizer, Question.tiny(names)).choose(prompts)
    longest = max(tasks.load(name).max_new_tokens for name in names)
    written = answers(learner.model, learner.tokenizer, prompts, chosen, longest)
    by_task = {n: [t for (name, _), t in zip(rows, written, strict=True) if name == n] for n in names}
    sent = sum(name == expert for (name, _), expert in zip(rows, chosen, strict=True)) / len(rows)
    return {"sent_right": round(sent, 4), "accuracy": {n: right(n, test[n], by_task[n]) for n in names}}


def run(way: str, seed: int, rate: float, steps: int = STEPS, count: int = N) -> list[dict]:
    """The rows of one way and seed, one for each stage; stage 0 is the base model."""
    learner = Learner(way, seed, rate, steps)
    test = {name: tasks.load(name).split("test", count) for name in SEQUENCE}
    first: dict[str, list[str]] = {}  # what was written right after a task was learned
    rows, start = [], time.process_time()
    for stage in range(len(SEQUENCE) + 1):
        if stage:
            learner.learn(SEQUENCE[stage - 1])
        written = {name: learner.answers(name, test[name]) for name in SEQUENCE}
        for name in SEQUENCE[:stage]:
            first.setdefault(name, written[name])
        unchanged = {
            name: sum(a == b for a, b in zip(kept, written[name], strict=True)) for name, kept in first.items()
        }
        row = {
            "way": way,
            "seed": seed,
            "stage": stage,
            "N": count,
            "steps": steps,
            "learning_rate": rate,
            "numbers": learner.numbers,
            "accuracy": {name: right(name, test[name], written[name]) for name in SEQUENCE},
            "unchanged": unchanged,
            "weights": weights(),
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        if way == "experts" and stage == len(SEQUENCE):
            row["routed"] = routed(learner, test)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rates = best_rates(read(TUNED))
    there = {(r["way"], r["seed"]) for r in read(given.out) if r["stage"] == len(SEQUENCE)}
    waiting = [(way, seed) for seed in given.seeds for way in given.ways if (way, seed) not in there]
    facts = machine(("torch", "transformers", "peft"))
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        work = [
            pool.submit(run, way, seed, rates[f"lora {RANK}" if way == "one LoRA" else "z 128"])
            for way, seed in waiting
        ]
        for done, future in enumerate(as_completed(work), 1):
            rows = future.result()
            append(given.out, *(row | facts for row in rows))
            print(f"{done}/{len(work)} {rows[-1]['way']} {rows[-1]['seed']}: {rows[-1]['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
