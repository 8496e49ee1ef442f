"""`t2 demo`: everything once, on the built-in model, with numbers that are computed while you watch.

It is also an example: each step is one small function that uses the library as any program would.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from t2kernels.cli import models
from t2kernels.cli.console import bar, out, show, table
from t2kernels.cli.learning import learn
from t2kernels.cli.race import race
from t2kernels.cli.real_model import real_model
from t2kernels.evaluation import Score, answers, scores
from t2kernels.experts.names import BASE

from .train import compare

LIVE, TASK = "yours", "math"
SERVED = ("math", "code", "reason")


def demo(
    quick: bool = typer.Option(
        False, "--quick", metavar="", help="Few steps and few problems: to see that it runs; its numbers mean nothing."
    ),
) -> None:
    """Train an expert, serve many in one batch, and time it, on the built-in model and on SmolLM2.

    Five minutes on two cores.

    [dim]$[/] t2 demo
    """
    from t2kernels import tasks, tiny

    start = time.perf_counter()
    steps, problems, counts, repeats = (3, 20, (4,), 1) if quick else (40, 250, (1, 4, 16, 32), 5)

    step(
        "1  A model that takes experts",
        "patch_model, in place: experts will be rows of a table beside each linear layer",
    )
    loaded = models.load(models.TINY)
    parameters = loaded.model.num_parameters()
    bank = models.patch(loaded)
    out.print(f"{type(loaded.model).__name__} of {parameters:,} parameters; {bank.describe()}")
    out.print(
        f"an expert is {sum(bank.matrices.values()):,} numbers, one for each singular value of {len(bank.matrices)} "
        "matrices"
    )

    step("2  One expert, trained by RL", f"only prompts and a check of the answer; the task is {TASK}")
    task = tasks.load(TASK)
    train_live(loaded, task, steps, problems)
    shipped = [name for name in tiny.experts() if name != LIVE]
    for name in shipped:
        bank.add(name, tiny.experts()[name])
    served = [name for name in SERVED if name in bank] or [LIVE]

    step("3  One batch, many experts", "each row has its own; the base model is row 0")
    mixed_batch(loaded, served)

    step(
        "4  Every expert on every task", f"{problems} held-out problems each; all experts of a task share their batches"
    )
    cross_table(loaded, [None, LIVE, *shipped], problems)

    step(
        "5  Against rebuilding the weights",
        "the authors' release takes one expert at a time: it rebuilds W' = U diag(sigma z) Vᵀ in every layer, answers "
        "its requests, and takes the next expert",
    )
    race(loaded, bank, {name: task_of(name) for name in served}, counts, repeats)

    step(
        "6  A real model",
        "SmolLM2, 135 million parameters: experts for English prompts, and one more trained on labelled texts",
    )
    real_model(quick)

    what_next(time.perf_counter() - start)


def step(title: str, explanation: str) -> None:
    """Print the heading of a step."""
    out.print("", Rule(f"[bold]{title}[/]", align="left"), f"[dim]{explanation}[/]")


def train_live(loaded: models.Loaded, task: Any, steps: int, problems: int) -> None:
    """Train an expert from the base model, and print its accuracy on held-out problems before and after."""
    held_out = task.split("test", problems)
    start = time.perf_counter()
    expert = learn(loaded, task, LIVE, max_steps=steps, per_device_train_batch_size=64)
    seconds = time.perf_counter() - start
    compare(loaded, task, held_out, LIVE)
    out.print(f"{steps} steps in {seconds:.0f} s moved {expert.numel:,} numbers; no weight was copied or changed")


def mixed_batch(loaded: models.Loaded, served: list[str]) -> None:
    """Answer a problem of each task in one batch, by the base model and by the task's expert."""
    from t2kernels import tasks

    rows = []
    for number, name in enumerate(served):
        one = tasks.load(task_of(name))
        problem = one.split("test", number + 1)[number]
        rows += [(one, problem, expert) for expert in (None, name)]
    limit = max(one.max_new_tokens for one, _, _ in rows)
    written = answers(loaded.model, loaded.tokenizer, [p["prompt"] for _, p, _ in rows], [e for _, _, e in rows], limit)
    shown = Table("prompt", "expert", "answer", "", box=None, pad_edge=False)
    for (one, problem, expert), text in zip(rows, written, strict=True):
        right = one.reward([problem["prompt"]], [text], answer=[problem["answer"]])[0] > 0
        verdict = "[green]right[/]" if right else f"[red]wrong[/], it is {escape(problem['answer'])}"
        shown.add_row(escape(problem["prompt"]), expert or BASE, escape(text), verdict)
    out.print(shown)


def cross_table(loaded: models.Loaded, experts: list[str | None], problems: int) -> None:
    """Print the accuracy of each expert (rows) on each task of an expert (columns)."""
    from t2kernels import tasks, tiny

    names = list(tiny.experts()) or [TASK]
    columns: dict[str, list[Score]] = {}
    with bar() as progress:
        count = progress.add_task("answering", total=len(names) * len(experts) * problems)
        for name in names:
            one = tasks.load(name)
            columns[name] = scores(
                loaded.model,
                loaded.tokenizer,
                one,
                one.split("test", problems),
                experts,
                done=lambda k: progress.advance(count, k),
            )
    shown = table("expert", *names)
    for i, expert in enumerate(experts):
        cells = []
        for name in names:
            best = max(s.right for s in columns[name])
            text = f"{columns[name][i].accuracy:.1%}"
            cells.append(f"[bold]{text}[/]" if columns[name][i].right == best else text)
        shown.add_row(expert or BASE, *cells)
    worst = max(s.standard_error for column in columns.values() for s in column)
    show(
        "accuracy on held-out problems", shown, f"standard errors are at most {worst:.1%}; {LIVE}: the expert of part 2"
    )


def what_next(seconds: float) -> None:
    """Print commands to go on with."""
    from t2kernels import tasks

    prompt, t2 = tasks.load(TASK).split("test", 1)[0]["prompt"], program()
    commands = {
        f'{t2} generate "{prompt}" -e base -e {TASK}': "several experts in one batch",
        f"{t2} train --task code --out experts/code": "an expert to keep",
        f"{t2} eval --task code --experts experts/code": "measure it",
        f"{t2} inspect experts/code": "look into it",
        f"{t2} train --help": "your model, your problems",
    }
    shown = Table(show_header=False, box=None, pad_edge=False)
    shown.add_column(no_wrap=True, style="bold")
    shown.add_column(style="dim")
    for command, what in commands.items():
        shown.add_row(escape(command), what)
    step("What next", f"this took {seconds:.0f} s")
    out.print(shown)


def program() -> str:
    """The command to type for `t2`: after `make demo` it is in .venv/bin, which is not on the path."""
    typed = Path(sys.argv[0])
    return "t2" if shutil.which("t2") or typed.name != "t2" else str(typed)


def task_of(expert: str) -> str:
    """The task that an expert of this demo was trained on."""
    return TASK if expert == LIVE else expert
