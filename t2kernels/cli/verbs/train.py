"""`t2 train`: train an expert by reinforcement learning, with a live view of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from t2kernels import InputError
from t2kernels.cli import models
from t2kernels.cli.console import bar, comma_list, out
from t2kernels.evaluation import Score, scores
from t2kernels.experts.names import BASE, CLASSIFIER, check_name

from .evaluate import show_accuracies


def train(
    task: str = typer.Option(
        "math", "--task", "-t", help="A task by name, NAME:PATH, or a .jsonl file with prompt and answer."
    ),
    classes: str = typer.Option(
        None,
        help="For --task classify: the tasks that the expert tells apart, by name or .jsonl file, comma-separated.",
        show_default=False,
    ),
    into: Path = typer.Option(
        None, "--out", "-o", help="File to save the expert to.  \\[default: experts/TASK]", show_default=False
    ),
    model: str = models.ModelOption,
    init: str = typer.Option(None, help="Start from this expert, not from the base model.", show_default=False),
    steps: int = typer.Option(150, min=1, help="Optimiser steps."),
    batch: int = typer.Option(128, min=1, help="Prompts a step."),
    samples: int = typer.Option(1, help="Completions of each prompt."),
    advantage: str = typer.Option(
        "none", help="Advantages: none, batch, or with --samples group or leave_one_out (docs/reference/training.md)."
    ),
    lr: float = typer.Option(0.02, help="Adam's learning rate."),
    kl: float = typer.Option(0.05, help="Weight of the KL to the base model."),
    temperature: float = typer.Option(1.0, help="Sampling temperature of the completions; 0 is greedy."),
    param: str = typer.Option("raw", help="'raw': z = 1 + p; 'sigmoid': as the authors (needs --form factored)."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, help="The same seed gives the same expert on the same machine."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Tokens of the longest completion.  \\[default: the task's]", show_default=False
    ),
    n: int = typer.Option(1000, "-n", min=1, help="Most held-out problems for the accuracy before and after."),
    checkpoints: Path = typer.Option(
        None, help="Directory to save to every 25 steps, and to resume from.", show_default=False
    ),
    targets: str = models.TargetsOption,
    rank: str = models.RankOption,
    form: str = models.FormOption,
    factors: str = models.FactorsOption,
    dtype: str = models.DtypeOption,
    device: str = models.DeviceOption,
) -> None:
    """Train an expert by REINFORCE on the reward of a task: it takes prompts and a check of answers, no solutions.

    [dim]$[/] t2 train --task math --out experts/math

    [dim]$[/] t2 train --task classify --steps 60 --rank 1/8

    [dim]$[/] t2 train --task classify --classes gsm8k.jsonl,code.jsonl --model ./checkpoint

    [dim]$[/] t2 train --task problems.jsonl --model ./checkpoint --samples 8 --advantage group --batch 16
    """
    import t2kernels as t2

    if into is not None and not into.name:
        raise InputError(f"--out {str(into)!r} names no file")
    if classes and task != "classify":
        raise InputError(f"--classes goes with --task classify, not with --task {task}")
    parts = {Path(name).stem: t2.tasks.load(name) for name in comma_list(classes or "")}
    chosen = None if parts else t2.tasks.load(task)
    check_name(into.stem if into else chosen.name if chosen else CLASSIFIER)  # before the model is loaded
    held_out = None if parts else chosen.split("test")[:n]
    for one in parts.values() or [chosen]:
        one.split("train", 1)  # fail before the model is loaded if there is none
    loaded = models.load(model, dtype, device)
    asked = None
    if parts:
        asked = t2.adapt.Question.for_experts(list(parts), loaded.tokenizer, loaded.is_tiny)
        chosen = t2.adapt.labelled(dict(zip(asked.labels, parts.values(), strict=False)), asked)
        held_out = chosen.split("test")[:n]
    into = into or Path("experts") / chosen.name
    bank = models.patch(loaded, targets, rank, form, factors)
    out.print(f"[dim]{bank.describe()}[/]")
    start = time.perf_counter()
    expert = learn(
        loaded,
        chosen,
        into.stem,
        init=None if init is None else t2.Expert.load(models.find_expert(init, model)),
        max_steps=steps,
        per_device_train_batch_size=batch,
        num_generations=samples,
        advantage=advantage,
        learning_rate=lr,
        kl_coef=kl,
        temperature=temperature,
        parametrisation=param,
        seed=seed,
        max_new_tokens=max_new_tokens,
        **({} if checkpoints is None else {"output_dir": str(checkpoints), "save_strategy": "steps", "save_steps": 25}),
    )
    seconds = time.perf_counter() - start
    before, after = compare(loaded, chosen, held_out, into.stem)
    expert.manifest["test"] = {
        "problems": before.of,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
    }
    if asked is not None:
        expert.manifest["question"] = asked.record()  # a Classifier asks it
    path = expert.save(into)
    out.print(
        f"{expert.numel:,} numbers trained in {seconds:.0f} s, saved to {path} ({path.stat().st_size / 1024:.0f} KiB)"
    )


def learn(loaded: models.Loaded, task: Any, name: str, init: Any = None, **settings: Any) -> Any:
    """Train an expert of a patched model on a task, with a progress bar. Returns the expert, which is in the bank too.

    init: the Expert to start from; settings: fields of `SVFConfig`
    """
    from transformers.trainer_utils import get_last_checkpoint

    from t2kernels.train import SVFConfig, SVFTrainer

    config = SVFConfig(logging_steps=1, use_cpu=loaded.model.device.type == "cpu", report_to="none", **settings)
    resume = (
        get_last_checkpoint(config.output_dir)
        if config.save_strategy != "no" and Path(config.output_dir).is_dir()
        else None
    )
    with bar(
        "reward {task.fields[reward]:+.2f}", "right {task.fields[accuracy]:.0%}", "KL {task.fields[kl]:.2f}"
    ) as progress:
        watch = _watcher(
            progress, progress.add_task(f"training {name}", total=config.max_steps, reward=0.0, accuracy=0.0, kl=0.0)
        )
        trainer = SVFTrainer(
            loaded.model, config, task, experts=name, init=init, processing_class=loaded.tokenizer, callbacks=[watch]
        )
        trainer.train(resume_from_checkpoint=resume)
    return trainer.experts[name]


def _watcher(progress: Any, bar_: Any) -> Any:
    """A callback that moves the bar, and shows means over the last 5 steps: a single batch is noisy."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress.update(bar_, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            recent = [entry for entry in state.log_history[-5:] if "reward" in entry]
            if recent:
                means = {
                    k: sum(entry.get(k, 0.0) for entry in recent) / len(recent) for k in ("reward", "accuracy", "kl")
                }
                progress.update(bar_, **means)

    return Watch()


def compare(loaded: models.Loaded, task: Any, held_out: list[dict[str, Any]], name: str) -> tuple[Score, Score]:
    """Print and return the accuracy of the base model and of an expert on the same problems, in the same batches."""
    with bar() as progress:
        count = progress.add_task("answering", total=2 * len(held_out))
        before, after = scores(
            loaded.model, loaded.tokenizer, task, held_out, [None, name], done=lambda k: progress.advance(count, k)
        )
    labels = [f"{BASE} (before)", f"{name} (after)"]
    show_accuracies(f"{task.name}: {len(held_out)} held-out problems", labels, [before, after])
    return before, after
