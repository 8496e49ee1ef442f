"""`t2 eval`: accuracy of experts, and of ways to choose one, on tasks."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from t2kernels.cli import models
from t2kernels.cli import strategies as adaptation
from t2kernels.cli.console import bar, comma_list, out, show, table
from t2kernels.evaluation import Meter, Score, verdicts
from t2kernels.experts.names import Name

Choose = Callable[[Sequence], Sequence[Name]]
"""Prompts, text or chats, to the expert that each is to be answered with: the first of two passes."""


def evaluate(
    task: str = typer.Option(
        "math",
        "--task",
        "-t",
        help="Tasks, comma-separated: by name, NAME:PATH for a copy of a dataset, or a .jsonl file with prompt and answer.",
    ),
    experts: str = typer.Option(
        "", "--experts", "-e", help="Experts by path or name, comma-separated; the base model is always there."
    ),
    by: str = typer.Option(
        None, "--by", help="A column that names each problem's expert: an arm that answers with it.", show_default=False
    ),
    adapt: str = typer.Option(
        "",
        "--adapt",
        help=f"Ways to choose an expert for each prompt, comma-separated: {', '.join(adaptation.KINDS)}.",
        show_default=False,
    ),
    classifier: str = adaptation.ClassifierOption,
    examples: Path = adaptation.ExamplesOption,
    margin: float = adaptation.MarginOption,
    model: str = models.ModelOption,
    n: int = typer.Option(None, "-n", help="Problems of each task.  \\[default: the whole split]", show_default=False),
    split: str = typer.Option("test", help="train, validation or test."),
    chat: bool = typer.Option(
        None,
        "--chat/--no-chat",
        help="Ask through the chat template, or not.  \\[default: datasets of the hub, if the model has one]",
    ),
    batch: int = typer.Option(256, help="Rows of a batch; all experts share it."),
    max_new_tokens: int = typer.Option(None, help="Longest answer.  \\[default: the task's]", show_default=False),
    save: Path = typer.Option(None, "--json", help="Write the numbers to this file, too.", show_default=False),
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

    [dim]$[/] t2 eval --task problems.jsonl --model ./checkpoint --experts experts/mine --json scores.json
    """
    from t2kernels import tasks

    asked = comma_list(task)
    if not asked:
        raise ValueError("--task is empty; name a task, such as --task math")
    chosen = [tasks.load(name) for name in asked]
    labels = [
        one.name if sum(one.name == other.name for other in chosen) == 1 else name
        for one, name in zip(chosen, asked, strict=True)
    ]
    if max_new_tokens is not None:
        chosen = [replace(one, max_new_tokens=max_new_tokens) for one in chosen]
    for one in chosen:
        check_labels(one.name, one.split(split, n), by, [Path(name).stem for name in comma_list(experts)])
    for kind in comma_list(adapt):
        adaptation.check(kind, examples)
    loaded = models.load(model, dtype, device)
    chosen = [styled(one, chat, loaded.tokenizer) for one in chosen]
    problems = [one.split(split, n) for one in chosen]
    bank = models.patch(loaded, targets, rank, form, factors)
    arms: dict[str, Name | Choose] = {
        name or models.BASE: name for name in [None, *models.add_experts(bank, experts, model)]
    }
    for kind in comma_list(adapt):
        arms[f"adapt {kind}"] = adaptation.strategy(kind, loaded, comma_list(experts), classifier, examples, margin)
    found: dict[str, Measured] = {}
    with bar() as progress:
        count = progress.add_task("answering", total=sum(map(len, problems)) * (len(arms) + bool(by)))
        for label, one, rows in zip(labels, chosen, problems, strict=True):
            named = {f"by {by}": [None if row[by] == models.BASE else row[by] for row in rows]} if by else {}
            found[label] = measure(loaded, one, rows, arms, named, batch, lambda k: progress.advance(count, k))
    for label, one in zip(labels, chosen, strict=True):
        show_measured(label, one, split, found[label])
    if save:
        save.write_text(
            json.dumps(_record(model, split, dict(zip(labels, chosen, strict=True)), found), indent=1) + "\n"
        )


def check_labels(task: str, rows: Sequence[dict], column: str | None, names: Sequence[str]) -> None:
    """Whether a column names an expert in every row. Raises ValueError with the row that does not."""
    for i, row in enumerate(rows if column else (), 1):
        if row.get(column) not in (*names, models.BASE):
            listed = ", ".join([*names, models.BASE])
            raise ValueError(
                f"--by {column}: problem {i} of {task!r} has {row.get(column)!r} there, which is none of --experts; given are {listed}"
            )


def styled(task: Any, chat: bool | None, tokenizer: Any) -> Any:
    """The task with messages or plain text as its prompts. Raises ValueError for messages without a template, and for images."""
    from t2kernels import tasks

    template = bool(getattr(tokenizer, "chat_template", None))
    if chat is None:
        chat = template and task.name in tasks.hub_names() and not task.images
    if chat and not template:
        raise ValueError("--chat: this model's tokenizer has no chat template")
    if chat and task.images:
        raise ValueError(
            f"--chat: the messages of {task.name!r} hold images, which need a vision-language model; --no-chat asks with the words in them"
        )
    return replace(task, chat=chat)


# --- measuring


@dataclass(frozen=True)
class Arm:
    """What one expert, or one way to choose, is worth.

    parts: by category, where the problems have one. routes: by category, how often each expert was chosen; None for a fixed expert.
    seconds: of choosing, the first pass.
    """

    score: Score
    parts: dict[str, Score]
    routes: dict[str, dict[str, int]] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """The arms of one task, and the tokens and seconds of all their answers: the second pass."""

    arms: dict[str, Arm]
    meter: Meter


def measure(
    loaded: models.Loaded,
    task: Any,
    rows: Sequence[dict],
    arms: Mapping[str, Name | Choose],
    named: Mapping[str, Sequence[Name]] | None = None,
    batch: int = 256,
    done: Callable[[int], object] | None = None,
) -> Measured:
    """Answer every problem in every arm, all in the same batches.

    arms: {label: an expert's name, a mixture, None for the base model, or a `Choose`, also as the method of an object}
    named: {label: an expert for each row}
    """
    made: dict[str, list[Name]] = {}
    seconds: dict[str, float] = {}
    for label, arm in arms.items():
        choose = getattr(arm, "choose", arm)
        if callable(choose):
            start = time.perf_counter()
            made[label] = list(choose([row["prompt"] for row in rows]))
            seconds[label] = time.perf_counter() - start
        else:
            made[label] = [arm] * len(rows)
    for label, names in (named or {}).items():
        made[label], seconds[label] = list(names), 0.0
    for label, names in made.items():
        if len(names) != len(rows):
            raise ValueError(f"{label} chose {len(names)} experts for {len(rows)} prompts; wanted one for each")
    rights, meter = verdicts(loaded.model, loaded.tokenizer, task, rows, list(made.values()), batch, done)
    categories = [str(row.get("category", task.name)) for row in rows]
    found = {}
    for (label, names), right in zip(made.items(), rights, strict=True):
        parts = {
            c: Score(*_count(r for r, at in zip(right, categories, strict=True) if at == c))
            for c in sorted(set(categories))
        }
        routes = None
        if label in seconds:
            routes = {
                c: dict(Counter(_label(name) for name, at in zip(names, categories, strict=True) if at == c))
                for c in parts
            }
        found[label] = Arm(
            Score(sum(right), len(right)), parts if len(parts) > 1 else {}, routes, seconds.get(label, 0.0)
        )
    return Measured(found, meter)


def _count(rights: Any) -> tuple[int, int]:
    rights = list(rights)
    return sum(rights), len(rights)


def _label(name: Name) -> str:
    if isinstance(name, Mapping):
        return " + ".join(f"{weight:.2g} {expert}" for expert, weight in name.items())
    return name or models.BASE


# --- what is shown


def show_measured(label: str, task: Any, split: str, measured: Measured) -> None:
    """The tables of one task: accuracy, accuracy by category, what was chosen for what, and the time it took."""
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
    out.print(
        f"[dim]{meter.seconds:.1f} s, {meter.tokens:,} tokens, {rate:,.0f} tokens/s{together}; right by {task.checker}[/]"
    )


def show_accuracies(title: str, labels: list[str], row: list[Score]) -> None:
    """The table of one task."""
    shown = table("expert", "right", "accuracy", "95 % interval")
    for label, score in zip(labels, row, strict=True):
        low, high = score.interval
        shown.add_row(label, str(score.right), f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}")
    show(title, shown)


def _record(model: str, split: str, chosen: Mapping[str, Any], found: Mapping[str, Measured]) -> dict:
    def numbers(score: Score) -> dict:
        return {"right": score.right, "of": score.of, "accuracy": score.accuracy, "interval": score.interval}

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
            for task, one in chosen.items()
        },
    }
