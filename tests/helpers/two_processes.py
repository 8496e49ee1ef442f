"""A training that `tests/train/test_processes.py` starts with torchrun: python two_processes.py FOLDER SETTINGS.

It trains on the built-in model and writes what the process drew and ended with to FOLDER/rank{RANK}.pt.
"""

import json
import os
import sys

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import t2kernels as t2
from t2kernels import train
from t2kernels.train import SVFConfig, SVFTrainer


class Recording(SVFTrainer):
    """Keeps the prompts, the completions and the rewards of each batch of this process."""

    def rollout(self, rows):
        out = super().rollout(rows)
        texts = self.sampler.decode(out, [row["prompt"] for row in rows for _ in range(self.args.num_generations)])
        self.batches.append(([row["prompt"] for row in rows], texts, self.score(rows, texts).tolist()))
        return out


def run(folder: str, settings: dict) -> dict:
    """Train once and return what happened."""
    one_prompt, experts, resume = (settings.pop(key, None) for key in ("one_prompt", "experts", "resume"))
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form=settings.pop("form", "delta"), rank=settings.pop("rank", 8))
    tasks = {name: t2.tasks.load(name) for name in experts or ["math"]}
    rows = {name: task.split("train", 48) for name, task in tasks.items()}
    if one_prompt:
        rows = {name: [part[0]] * 48 for name, part in rows.items()}
    config = SVFConfig(
        f"{folder}/run", use_cpu=True, report_to="none", logging_steps=1, max_new_tokens=16,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    tr = Recording(
        model, config, experts=rows, reward={name: task.reward for name, task in tasks.items()},
        processing_class=tokenizer, eval_dataset={name: task.split("validation", 11) for name, task in tasks.items()},
    )  # fmt: skip
    tr.batches = []
    tr.train(resume_from_checkpoint=resume)
    return {
        "z": {name: expert.z for name, expert in tr.experts.items()},
        "batches": tr.batches,
        "logs": [entry for entry in tr.state.log_history if "reward" in entry],
        "evaluation": tr.evaluate(),
        "world": tr.accelerator.num_processes,
    }


def block(folder: str, settings: dict) -> dict:
    """Train once with transformers' Trainer in `train.experts`, and return what happened."""
    resume = settings.pop("resume", None)
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model, form="delta", rank=8)
    texts = [tokenizer(r["prompt"] + "=" + r["answer"]) for r in t2.tasks.load("math").split("train", 400)]
    rows = [row for row in texts if len(row["input_ids"]) == 13][:40]  # one length: means over tokens are over rows
    assert len(rows) == 40
    args = TrainingArguments(
        f"{folder}/run", use_cpu=True, report_to="none", logging_steps=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", disable_tqdm=True, average_tokens_across_devices=True,
        ddp_find_unused_parameters=False, **settings,
    )  # fmt: skip
    with train.experts(model, "mine") as trained:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        tr = Trainer(model, args, collator, rows)
        tr.train(resume_from_checkpoint=resume)
    return {
        "z": {"mine": trained["mine"].z},
        "logs": [entry for entry in tr.state.log_history if "loss" in entry],
        "world": tr.accelerator.num_processes,
        "left": [
            *bank.in_training,
            *(name for name in vars(model) if name in ("save_pretrained", "_is_accelerate_prepared")),
        ],
    }


def start(folder: str, settings: dict) -> dict:
    """`run` or, if the settings say so, `block`."""
    return (block if settings.pop("block", False) else run)(folder, settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = {key: start(f"{sys.argv[1]}/{key}", settings) for key, settings in json.loads(sys.argv[2]).items()}
    torch.save(out, f"{sys.argv[1]}/rank{os.environ.get('RANK', '0')}.pt")
