"""`t2 eval`: accuracy of experts, and of strategies that choose one, on tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from t2kernels import InputError, MissingFileError
from t2kernels.cli import models, strategies
from t2kernels.cli.console import bar, comma_list, out, show, table
from t2kernels.evaluation import Measured, Score, measure
from t2kernels.experts.names import BASE
from t2kernels.rollout.chat import prompt_form


@strategies.with_strategy_options
def evaluate(
    task: str = typer.Option(
        "math",
        "--task",
        "-t",
        help="Tasks, comma-separated: a name, NAME:PATH for a copy of a dataset, a .jsonl file with prompt and answer, "
        "or a .csv or .jsonl file with text and label.",
    ),
    experts: str = typer.Option(
        "", "--experts", "-e", help="Experts by path or name, comma-separated; the base model is always measured too."
    ),
    by: str = typer.Option(
        None, "--by", help="Measure also the experts that this column names for each problem.", show_default=False
    ),
    adapt: str = typer.Option(
        "",
        "--adapt",
        help=f"Measure also strategies that choose the expert of each prompt, comma-separated: {strategies.NAMES}.",
        show_default=False,
    ),
    strategy_options: dict[str, Any] = strategies.EACH,
    model: str = models.ModelOption,
    n: int = typer.Option(None, "-n", help="Problems of each task.  \\[default: the whole split]", show_default=False),
    split: str = typer.Option("test", help="train, validation or test."),
    chat: bool = models.ChatOption,
    system: str = models.SystemOption,
    check: str = models.CheckOption,
    batch: int = typer.Option(256, min=1, help="Prompts of a batch; all experts share it."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Tokens of the longest answer.  \\[default: the task's]", show_default=False
    ),
    save: Path = typer.Option(
        None, "--json", dir_okay=False, help="Write the numbers to this file as well.", show_default=False
    ),
    targets: str = models.TargetsOption,
    rank: str = models.RankOption,
    form: str = models.FormOption,
    factors: str = models.FactorsOption,
    dtype: str = models.DtypeOption,
    device: str = models.DeviceOption,
) -> None:
    """Measure the accuracy of experts on tasks, with greedy answers and 95 % confidence intervals.

    [dim]$[/] t2 eval --task math,code --experts math,code,reason

    [dim]$[/] t2 eval --task math,code,reason --adapt classify,prompt

    [dim]$[/] t2 eval --task gsm8k,humaneval -n 200 --model ./checkpoint --experts experts/math,experts/code

    [dim]$[/] t2 eval --task reviews.csv,arc_easy --check choice --model ./checkpoint

    [dim]$[/] t2 eval --task problems.jsonl --model ./checkpoint --experts experts/mine --json scores.json
    """
    from t2kernels import tasks

    if save is not None and not save.parent.is_dir():
        raise MissingFileError(f"--json {save}: there is no directory {save.parent}")
    asked = comma_list(task)
    if not asked:
        raise InputError("--task is empty; name a task, such as --task math")
    chosen = [tasks.load(name, check=check) for name in asked]
    labels = [
        one.name if sum(one.name == other.name for other in chosen) == 1 else name
        for one, name in zip(chosen, asked, strict=True)
    ]
    if max_new_tokens is not None:
        chosen = [replace(one, max_new_tokens=max_new_tokens) for one in chosen]
    for one in chosen:
        check_labels(one.name, one.split(split, n), by, [Path(name).stem for name in comma_list(experts)])
    for kind in comma_list(adapt):
        strategies.check(kind, strategy_options)
    loaded = models.load(model, dtype, device)
    names: list[str | None] = [None]
    if experts or adapt or by:  # the base model alone needs no bank
        bank = models.patch(loaded, targets, rank, form, factors)
        names += models.add_experts(bank, experts, model)
    arms: dict[str, Any] = {name or BASE: name for name in names}
    for kind in comma_list(adapt):
        arms[f"adapt {kind}"] = strategies.strategy(kind, loaded, comma_list(experts), strategy_options, chat, system)
    chosen = [models.prompt_form(loaded, chat, system, names, one).of_task(one) for one in chosen]
    problems = [one.split(split, n) for one in chosen]
    found: dict[str, Measured] = {}
    with bar() as progress:
        count = progress.add_task("answering", total=sum(map(len, problems)) * (len(arms) + bool(by)))
        for label, one, rows in zip(labels, chosen, problems, strict=True):
            if by:
                arms[f"by {by}"] = [None if row[by] == BASE else row[by] for row in rows]
            found[label] = measure(
                loaded.model, loaded.tokenizer, one, rows, arms, batch, lambda k: progress.advance(count, k)
            )
    for label, one in zip(labels, chosen, strict=True):
        show_measured(label, one, split, found[label])
    if save:
        save.write_text(
            json.dumps(_record(model, split, dict(zip(labels, chosen, strict=True)), found), indent=1) + "\n"
        )


def check_labels(task: str, rows: Sequence[Mapping[str, Any]], column: str | None, names: Sequence[str]) -> None:
    """Raise ValueError if a column does not name one of the experts in every row. column: None checks nothing."""
    for i, row in enumerate(rows if column else (), 1):
        if row.get(column) not in (*names, BASE):
            raise InputError(
                f"--by {column}: problem {i} of {task!r} has {row.get(column)!r} there, which is none of --experts; "
                f"given are {', '.join([*names, BASE])}"
            )


def styled(task: Any, chat: bool | None, tokenizer: Any) -> Any:
    """The task with its prompts in the form that `prompt_form` decides on. Raises ValueError as it does."""
    return prompt_form(tokenizer, chat, task=task).of_task(task)


def show_measured(label: str, task: Any, split: str, measured: Measured) -> None:
    """Print the tables of one task: accuracy, accuracy by category, the choices of strategies, and the time."""
    labels, arms = list(measured.arms), list(measured.arms.values())
    show_accuracies(f"{label}: {arms[0].score.of} {split} problems", labels, [arm.score for arm in arms])
    if arms[0].parts:
        shown = table("category", "problems", *labels)
        for category, first in arms[0].parts.items():
            shown.add_row(category, str(first.of), *(f"{arm.parts[category].accuracy:.1%}" for arm in arms))
        show("by category", shown)
    for label, arm in measured.arms.items():
        if arm.routes is not None:
            chosen = list(dict.fromkeys(name for counts in arm.routes.values() for name in counts))
            shown = table("category", *chosen)
            for category, counts in arm.routes.items():
                shown.add_row(category, *(str(counts.get(name, 0)) for name in chosen))
            share = f", {arm.seconds / measured.meter.seconds:.1%} of all answers" if measured.meter.seconds else ""
            show(f"chosen: {label}", shown, f"first pass {arm.seconds:.2f} s{share}")
    meter = measured.meter
    together = "; all experts in the same batches" if len(arms) > 1 else ""
    rate = meter.tokens / meter.seconds if meter.seconds else 0.0
    work = f"{meter.tokens:,} tokens, {rate:,.0f} tokens/s" if meter.tokens else "nothing written"
    asked = "asked through the chat template" if task.chat else "asked in plain text"
    out.print(f"[dim]{meter.seconds:.1f} s, {work}{together}; {asked}; right by {task.checker}[/]")


def show_accuracies(title: str, labels: list[str], row: list[Score]) -> None:
    """Print a table of accuracies with their intervals."""
    forms = any(score.well_formed is not None for score in row)
    shown = table("expert", "right", "accuracy", "95 % interval", *(["well-formed"] if forms else []))
    for label, score in zip(labels, row, strict=True):
        low, high = score.interval
        form = [] if score.well_formed is None else [f"{score.well_formed:.1%}"]
        shown.add_row(label, str(score.right), f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}", *form)
    show(title, shown)


def _record(model: str, split: str, chosen: Mapping[str, Any], found: Mapping[str, Measured]) -> dict[str, Any]:
    """The content of the JSON file."""

    def numbers(score: Score) -> dict[str, Any]:
        form = {} if score.well_formed is None else {"well_formed": score.well_formed}
        return {"right": score.right, "of": score.of, "accuracy": score.accuracy, "interval": score.interval, **form}

    return {
        "model": model,
        "split": split,
        "accuracy": {task: {label: numbers(arm.score) for label, arm in m.arms.items()} for task, m in found.items()},
        "categories": {
            task: {label: {c: numbers(score) for c, score in arm.parts.items()} for label, arm in m.arms.items()}
            for task, m in found.items()
            if any(arm.parts for arm in m.arms.values())
        },
        "routes": {
            task: {
                label: {"first_pass_seconds": a.seconds, "chosen": a.routes}
                for label, a in m.arms.items()
                if a.routes is not None
            }
            for task, m in found.items()
        },
        "time": {
            task: {
                "seconds": m.meter.seconds,
                "tokens": m.meter.tokens,
                "tokens_per_second": m.meter.tokens / max(m.meter.seconds, 1e-9),
            }
            for task, m in found.items()
        },
        "tasks": {
            task: {"checker": one.checker, "chat": one.chat, "max_new_tokens": one.max_new_tokens}
            | ({} if one.system is None else {"system": one.system})
            for task, one in chosen.items()
        },
    }
