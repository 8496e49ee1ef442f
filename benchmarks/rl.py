"""What does reinforcement learning of z gain on the built-in tasks, for how many numbers and seconds?

    python benchmarks/rl.py                                        every task, arm and seed: hours on two cores
    python benchmarks/rl.py --tasks math --arms "svf R/8" --seeds 0   one cell

Each arm learns from the training split and is judged greedily on the frozen test file. LoRA is PEFT's, under the same
rollouts, rewards, loss, schedule and evaluation. The supervised arms maximise the likelihood of the right answer, given
at once. A row for each run is appended to benchmarks/results/rl.jsonl. No run is chosen by its test accuracy: the
learning rates below were fixed beforehand.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import peft
import torch
from measure import RESULTS, append, machine, weights
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from transformers import TrainerCallback

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.rewards import Scorer
from t2kernels.train import ReinforceTrainer, SVFConfig, SVFTrainer
from t2kernels.train.data import problems

TASKS = ("math", "code", "reason", "classify")


class Supervised:
    """Mixed into a trainer: its rollouts are the right answers. With every advantage 1 and no KL, REINFORCE is the
    likelihood of those."""

    def rollout(self, rows) -> Rollout:
        ids, mask = self.sampler.encode([row["prompt"] for row in rows], self.args.device)
        tokenizer = self.processing_class
        answers = [f"={row['answer']}{tokenizer.eos_token}" for row in rows]
        encoded = tokenizer(answers, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        experts = [row.get("expert") for row in rows]
        self._counts(experts)
        ones = torch.ones(len(rows))
        both = torch.cat([ids, encoded["input_ids"]], 1), torch.cat([mask, encoded["attention_mask"]], 1)
        return Rollout(*both, encoded["attention_mask"].bool(), ones, ones / len(rows), experts)


class SupervisedSVF(Supervised, SVFTrainer):
    pass


class LoraTrainer(ReinforceTrainer):
    """The weights that require grad are an adapter's; the reference is the model without it."""

    def reference(self) -> AbstractContextManager:
        return self.model.disable_adapter()


class SupervisedLora(Supervised, LoraTrainer):
    pass


class Arm(NamedTuple):
    """rank, as `patch_model` takes it; lr; what else is not the default"""

    trainer: type
    rank: int | float | None
    lr: float
    patch: Mapping = MappingProxyType({})
    config: Mapping = MappingProxyType({})


ARMS = {
    "svf R": Arm(SVFTrainer, None, 0.02),
    "svf R/4": Arm(SVFTrainer, 1 / 4, 0.02),
    "svf R/8": Arm(SVFTrainer, 1 / 8, 0.03),
    "svf R/16": Arm(SVFTrainer, 1 / 16, 0.05),
    "svf sigmoid R": Arm(SVFTrainer, None, 0.05, {"form": "factored"}, {"parametrisation": "sigmoid"}),
    "svf mlp": Arm(SVFTrainer, None, 0.02, {"targets": "mlp"}),
    "svf attention": Arm(SVFTrainer, None, 0.02, {"targets": "attention"}),
    "lora r=16": Arm(LoraTrainer, 16, 2e-3),
    "svf R supervised": Arm(SupervisedSVF, None, 0.02, {}, {"kl_coef": 0.0}),
    "lora r=16 supervised": Arm(SupervisedLora, 16, 1e-3, {}, {"kl_coef": 0.0}),
}


class Advance(TrainerCallback):
    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()


def prepare(
    task_name: str,
    arm_name: str,
    seed: int,
    steps: int,
    test: list[dict] | None = None,
    advance: Callable = lambda: None,
):
    """(trainer, how many numbers it trains) of one cell, on a fresh model. test: what it is judged on; None: the
    validation split."""
    arm, task = ARMS[arm_name], tasks.load(task_name)
    model, tokenizer = tiny.load()
    args = SVFConfig(
        f"rl-{os.getpid()}",
        seed=seed,
        max_steps=steps,
        learning_rate=arm.lr,
        max_new_tokens=task.max_new_tokens,
        use_cpu=True,
        **arm.config,
    )
    shared = {"processing_class": tokenizer, "callbacks": [Advance(advance)]}
    if issubclass(arm.trainer, SVFTrainer):
        t2.patch_model(model, rank=arm.rank, **arm.patch)
        return arm.trainer(model, args, task, test, **shared), sum(model.t2_bank.matrices.values())
    model = lora(model, arm.rank, seed)
    data = (
        problems({"lora": task}, "train", "train"),
        problems({"lora": test or task.split("validation")}, "test", "test"),
    )
    trainer = arm.trainer(model, args, *data, {"lora": Scorer.of(task.reward)}, **shared)
    return trainer, sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora(model, rank: int, seed: int):
    """The model with a PEFT adapter on every linear layer of its blocks."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)  # of its first factor
    return peft.get_peft_model(model, config)


def run(task_name: str, arm_name: str, seed: int, steps: int, count: int | None, advance: Callable[[], None]) -> dict:
    """One cell: a fresh model, trained and judged. Returns what was measured."""
    test = tasks.load(task_name).split("test", count)
    trainer, numbers = prepare(task_name, arm_name, seed, steps, test, advance)
    before = trainer.evaluate()
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = trainer.evaluate()
    return {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "steps": steps,
        "N": len(test),
        "base_accuracy": round(before["eval_accuracy"], 4),
        "accuracy": round(after["eval_accuracy"], 4),
        "standard_error": round(after["eval_accuracy_se"], 4),
        "numbers": numbers,
        "weights": weights(),
        "learning_rate": ARMS[arm_name].lr,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=tasks.names(), metavar="TASK")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--n", type=int, help="only the first N test problems; all of them by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "rl.jsonl")
    arguments = parser.parse_args()
    cells = [(task, arm, seed) for task in arguments.tasks for arm in arguments.arms for seed in arguments.seeds]
    console, rows = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(cells) * arguments.steps)
        for task, arm, seed in cells:
            progress.update(bar, description=f"{task}, {arm}, seed {seed}")
            facts = machine(("torch", "transformers", "peft"))
            row = run(task, arm, seed, arguments.steps, arguments.n, lambda: progress.advance(bar))
            rows.append(row)
            append(arguments.out, row | facts)
    console.print(table(rows))


def table(rows: list[dict]) -> Table:
    """Means over seeds; spread is the range between them, which the standard error does not include."""
    out = Table(
        "task", Column("arm", no_wrap=True), "numbers", "base", "accuracy", "standard error", "seeds", "N", "seconds"
    )
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        cell = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        accuracies = [row["accuracy"] for row in cell]
        spread = f" [{min(accuracies):.3f}, {max(accuracies):.3f}]" if len(cell) > 1 else ""
        mean = lambda key, cell=cell: sum(row[key] for row in cell) / len(cell)  # noqa: E731
        accuracy = f"{mean('accuracy'):.3f}{spread}"
        figures = (
            f"{mean('base_accuracy'):.3f}",
            accuracy,
            f"{mean('standard_error'):.3f}",
            str(len(cell)),
            str(cell[0]["N"]),
        )
        out.add_row(task, arm, f"{cell[0]['numbers']:,}", *figures, f"{mean('seconds'):.0f}")
    return out


if __name__ == "__main__":
    main()
