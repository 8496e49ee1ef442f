"""`t2 eval`: accuracy of experts on tasks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import typer

from t2kernels.cli import models
from t2kernels.cli.answers import Score, scores
from t2kernels.cli.console import bar, comma_list, out, show, table


def evaluate(
    task: str = typer.Option("math", "--task", "-t", help="Tasks by name, comma-separated, or a .jsonl file with prompt and answer."),
    experts: str = typer.Option("", "--experts", "-e", help="Experts by path or name, comma-separated; the base model is always there."),
    model: str = models.ModelOption,
    n: int = typer.Option(None, "-n", help="Problems of each task.  \\[default: the whole split]", show_default=False),
    split: str = typer.Option("test", help="train, validation or test."),
    batch: int = typer.Option(256, help="Rows of a batch; all experts share it."),
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

    [dim]$[/] t2 eval --task problems.jsonl --model ./checkpoint --experts experts/mine --json scores.json
    """
    from t2kernels import tasks

    chosen = [tasks.load(name) for name in comma_list(task)]
    problems = [one.split(split, n) for one in chosen]
    loaded = models.load(model, dtype, device)
    bank = models.patch(loaded, targets, rank, form, factors)
    names = list(dict.fromkeys([None, *models.add_experts(bank, experts, model)]))
    start, found = time.perf_counter(), {}
    with bar() as progress:
        count = progress.add_task("answering", total=sum(map(len, problems)) * len(names))
        for one, rows in zip(chosen, problems, strict=True):
            found[one.name] = scores(loaded.model, loaded.tokenizer, one, rows, names, batch, lambda k: progress.advance(count, k))
    labels = [name or models.BASE for name in names]
    for name, row in found.items():
        show_accuracies(f"{name}: {row[0].of} {split} problems", labels, row)
    out.print(f"[dim]{time.perf_counter() - start:.1f} s{'; all experts in the same batches' if len(names) > 1 else ''}[/]")
    if save:
        save.write_text(json.dumps(_record(model, split, labels, found), indent=1) + "\n")


def show_accuracies(title: str, labels: list[str], row: list[Score]) -> None:
    """The table of one task."""
    shown = table("expert", "right", "accuracy", "95 % interval")
    for label, score in zip(labels, row, strict=True):
        low, high = score.interval
        shown.add_row(label, str(score.right), f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}")
    show(title, shown)


def _record(model: str, split: str, labels: list[str], found: dict[str, list[Score]]) -> dict:
    return {
        "model": model,
        "split": split,
        "accuracy": {
            task: {
                label: {"right": s.right, "of": s.of, "accuracy": s.accuracy, "interval": s.interval}
                for label, s in zip(labels, row, strict=True)
            }
            for task, row in found.items()
        },
    }
