"""`t2 train`: train an expert by reinforcement learning, with a live view of it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from t2kernels import InputError
from t2kernels.cli import models
from t2kernels.cli.console import bar, comma_list, err, out
from t2kernels.cli.learning import Stopped, learn
from t2kernels.evaluation import Score, scores
from t2kernels.experts.names import BASE, CLASSIFIER, check_name
from t2kernels.rollout.chat import prompt_form
from t2kernels.tasks.base import bucket

from .evaluate import show_accuracies

RECIPE = "\\[default: {}; {} with --check choice or --sft]"

FEWEST = 16
"""Least problems of a validation that is made of training problems: of fewer, chance would pick the best expert."""


def train(
    task: str = typer.Option(
        "math",
        "--task",
        "-t",
        help="A task by name, NAME:PATH, a .jsonl file with prompt and answer, or a .csv or .jsonl file with text and "
        "label.",
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
    chat: bool = models.ChatOption,
    system: str = models.SystemOption,
    check: str = models.CheckOption,
    sft: bool = typer.Option(
        False, "--sft", help="Supervised: train on the right answers, by cross-entropy, not on rewards."
    ),
    init: str = typer.Option(None, help="Start from this expert, not from the base model.", show_default=False),
    steps: int = typer.Option(None, min=1, help=f"Optimiser steps.  {RECIPE.format(150, 60)}", show_default=False),
    batch: int = typer.Option(None, min=1, help=f"Prompts a step.  {RECIPE.format(128, 32)}", show_default=False),
    samples: int = typer.Option(1, help="Completions of each prompt."),
    advantage: str = typer.Option(
        "none",
        help="Advantages: none, batch, or with --samples group, grpo or leave_one_out (docs/reference/training.md).",
    ),
    loss_type: str = typer.Option("sum", help="What a token counts: sum, grpo, dapo or dr_grpo."),
    policy_loss: str = typer.Option(
        None, help="With --check choice: log, -log E[r], or expected, -E[r].  \\[default: log]", show_default=False
    ),
    written: float = typer.Option(
        None, help="With --check choice: weight of -log P(any option is written).  \\[default: .1]", show_default=False
    ),
    lr: float = typer.Option(None, help=f"Adam's learning rate.  {RECIPE.format('.02', '.01')}", show_default=False),
    kl: float = typer.Option(
        None, help=f"Weight of the KL to the base model.  {RECIPE.format('.05', '0')}", show_default=False
    ),
    loss_batch: int = typer.Option(32, min=1, help="Rows of one forward and backward; fewer take less memory."),
    temperature: float = typer.Option(1.0, help="Sampling temperature of the completions; 0 is greedy."),
    rollout: str = typer.Option(
        "transformers", help="Who draws completions: transformers, vllm (here), or vllm:URL,URL, running servers."
    ),
    max_staleness: int = typer.Option(
        0, min=0, help="With vllm: draw so many steps ahead, while a step trains; 0: one after the other."
    ),
    param: str = typer.Option("raw", help="'raw': z = 1 + p; 'sigmoid': as the authors (needs --form factored)."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, help="The same seed gives the same expert on the same machine."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Tokens of the longest completion.  \\[default: the task's]", show_default=False
    ),
    eval_every: int = typer.Option(
        10, min=0, help="Measure on validation problems every so many steps, and keep the best expert; 0: never."
    ),
    validation: int = typer.Option(128, min=1, help="Most problems of a validation."),
    history: Path = typer.Option(
        None, help="JSONL file for the log of every step.  \\[default: beside the expert]", show_default=False
    ),
    plot: Path = typer.Option(None, help="Draw the run: a .png, .svg or .pdf file.", show_default=False),
    report_to: str = typer.Option(
        None, help="Also log to tensorboard, wandb, ... (transformers' report_to).", show_default=False
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
    With --sft it learns the right answers themselves.

    [dim]$[/] t2 train --task math --out experts/math

    [dim]$[/] t2 train --task classify --steps 60 --rank 1/8

    [dim]$[/] t2 train --task classify --classes gsm8k.jsonl,code.jsonl --model ./checkpoint

    [dim]$[/] t2 train --task problems.jsonl --model ./checkpoint --samples 8 --advantage group --batch 16

    [dim]$[/] t2 train --task problems.jsonl --model ./checkpoint --sft

    [dim]$[/] t2 train --task reviews.csv --check choice --model ./checkpoint --form delta --rank 1/16 --plot run.svg
    """
    import t2kernels as t2
    from t2kernels.rollout.engines import parse_spec
    from t2kernels.train.steering import curve
    from t2kernels.train.steering.history import read

    if into is not None and not into.name:
        raise InputError(f"--out {str(into)!r} names no file")
    if classes and task != "classify":
        raise InputError(f"--classes goes with --task classify, not with --task {task}")
    if plot is not None:
        curve.check(plot)
    parse_spec(rollout)
    parts = {Path(name).stem: t2.tasks.load(name) for name in comma_list(classes or "")}
    chosen = None if parts else t2.tasks.load(task, check=check)
    check_name(into.stem if into else chosen.name if chosen else CLASSIFIER)  # before the model is loaded
    for one in [] if parts else [chosen]:
        one.split("test", 1)
    for one in parts.values() or [chosen]:
        one.split("train", 1)  # fail before the model is loaded if there is none
    loaded = models.load(model, dtype, device)
    asked = None
    if parts:
        asked = t2.adapt.Question.for_experts(list(parts), loaded.tokenizer, loaded.is_tiny)
        chosen = t2.adapt.labelled(dict(zip(asked.labels, parts.values(), strict=False)), asked)
    start_from = None if init is None else t2.Expert.load(models.find_expert(init, model))
    form_of_prompts = None
    if not parts:
        manifests = [] if start_from is None else [start_from.manifest]
        form_of_prompts = prompt_form(loaded.tokenizer, chat, system, manifests, chosen)
        chosen = form_of_prompts.of_task(chosen)
        out.print(f"[dim]prompts: {form_of_prompts}[/]", highlight=False)
    chosen, rows = _validated(chosen, validation) if eval_every else (chosen, [])
    held_out = chosen.split("test")[:n]
    into = into or Path("experts") / chosen.name
    bank = models.patch(loaded, targets, rank, form, factors)
    out.print(f"[dim]{bank.describe()}[/]")
    start, log = time.perf_counter(), history or into.parent / f"{into.stem}.history.jsonl"
    own = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": lr,
        "kl_coef": kl,
        "policy_loss": policy_loss,
        "written_coef": written,
    }
    settings: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
    if rollout == "vllm" and factors and Path(factors).is_dir():
        settings["rollout_options"] = {"factors": factors}
    if report_to is not None:
        settings |= {"report_to": comma_list(report_to), "output_dir": str(into.parent / f"{into.stem}.runs")}
    if checkpoints is not None:
        settings |= {"output_dir": str(checkpoints), "save_strategy": "steps", "save_steps": 25}
    if rows:
        settings |= {"eval_strategy": "steps", "eval_steps": eval_every, "eval_on_start": True, "keep_best": True}
    stopped = None
    try:
        expert = learn(
            loaded,
            chosen,
            into.stem,
            init=start_from,
            validation=rows or None,
            history=str(log),
            num_generations=samples,
            advantage=advantage,
            loss_type=loss_type,
            loss_batch_size=loss_batch,
            temperature=temperature,
            rollout=rollout,
            max_staleness=max_staleness,
            parametrisation=param,
            supervised=sft,
            seed=seed,
            max_new_tokens=max_new_tokens,
            **settings,
        )
    except Stopped as e:
        stopped, expert = e, e.expert
    if form_of_prompts is not None:
        expert.manifest["prompt"] = form_of_prompts.record()
    if asked is not None:
        expert.manifest["question"] = asked.record()  # a Classifier asks it
    steps_seen = read(log)
    if plot is not None and any("accuracy" in row for row in steps_seen):
        out.print(f"curve in {curve.plot(steps_seen, plot, f'{into.stem}: {chosen.name}')}")
    if stopped is not None:
        out.print(
            f"stopped at step {stopped.step} of {stopped.of}; the expert of step {expert.manifest['steps']} is "
            f"saved to {expert.save(into)}"
        )
        raise typer.Exit(130)
    _say_best(expert.manifest, max(row.get("step", 0) for row in steps_seen))
    seconds = time.perf_counter() - start
    before, after = compare(loaded, chosen, held_out, into.stem)
    expert.manifest["test"] = {
        "problems": before.of,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
    }
    path = expert.save(into)
    out.print(
        f"{expert.numel:,} numbers trained in {seconds:.0f} s, saved to {path} ({path.stat().st_size / 1024:.0f} KiB)"
    )


def _validated(task: Any, count: int) -> tuple[Any, list[Any]]:
    """(the task, at most `count` problems to validate on). A task without any gives a tenth of its training problems:
    those whose prompts the hash sends to validation. The task then trains on the others."""
    with contextlib.suppress(InputError):
        return task, task.split("validation")[:count]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for row in task.rows("train", None, 0):
        parts[bucket(str(row["prompt"])) == "validation"].append(row)
    if len(parts[True]) < FEWEST or not parts[False]:
        err.print(
            f"{len(parts[True])} problems would be kept for validation, {FEWEST} are needed to compare experts: all "
            "are trained on, and the last expert is kept",
            soft_wrap=True,
        )
        return task, []
    err.print(f"{len(parts[True])} of the training problems are kept for validation")
    own = {"train": parts[False], "validation": parts[True]}
    rows = task.rows
    made = replace(task, rows=lambda split, n, seed: own[split][:n] if split in own else rows(split, n, seed))
    return made, made.split("validation")[:count]


def _say_best(facts: dict[str, Any], steps: int) -> None:
    """Print which step was best in validation, and what to do if none was better than the base model."""
    from t2kernels.train.steering.watch import ADVICE

    before, after = facts.get("accuracy_before"), facts.get("accuracy_after")
    if before is None or after is None:
        return
    out.print(
        f"best of {steps} steps in validation: step {facts['steps']}, {after:.1%} of {facts['evaluated_on']} problems "
        f"(base {before:.1%})"
    )
    if after <= before:
        out.print(f"no step was better than the base model: {ADVICE}")


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
