"""What every verb shares: where it prints, its progress bars, and errors as one line."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# What bad input, files and machines raise, with a message that is meant to be read. Anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, KeyError, IndexError, OSError, RuntimeError, ImportError)


class Commands(TyperGroup):
    """The verbs; takes --debug out of the arguments wherever it stands."""

    debug: ClassVar[bool] = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        type(self).debug = "--debug" in args[:end]
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])


def verb(function: Callable) -> Callable:
    """A verb whose expected errors end as one line on stderr and exit code 1; with --debug they keep their traceback."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        hush()
        wait_quietly()
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(130) from None
        except EXPECTED as e:
            if Commands.debug:
                raise
            err.print(f"[bold red]error:[/] {escape(one_line(e))}", soft_wrap=True)
            raise typer.Exit(1) from None

    return run


def one_line(e: BaseException) -> str:
    """An exception's message without its line breaks; its class where it has no message."""
    text = e.args[0] if isinstance(e, KeyError) and e.args else e  # str of a KeyError is its message in quotes
    return " ".join(str(text).split()) or type(e).__name__


def bar(*fields: str) -> Progress:
    """A progress bar on stderr; `fields` are further columns, as format strings of a rich task ("{task.fields[kl]:.2f}")."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, *map(TextColumn, fields), console=err)


def table(name: str, *numbers: str) -> Table:
    """A table of a name and numbers a row; the numbers are never cut."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column(name, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def show(title: str, made: Table, note: str = "") -> None:
    """A heading, a table, and what its columns mean."""
    out.print("", f"[bold]{title}[/]", made, *([f"[dim]{note}[/]"] if note else []), sep="\n")


NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "from kernels-community",
}
"""Messages by logger that say nothing about what is run here: optional kernels that other packages look for when they are imported."""


def hush() -> None:
    """Drop NOISE. Every other warning stays."""
    for name, message in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Without) for f in logger.filters):
            logger.addFilter(_Without(message))


def wait_quietly() -> None:
    """Let threads of a parallel region sleep, not spin, while they wait; torch reads this when it is imported.

    On two cores that other programs used as well, ten steps of `t2 train` took 54 s with spinning threads and 6 s with sleeping ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class _Without(logging.Filter):
    def __init__(self, message: str):
        super().__init__()
        self.message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return self.message not in record.getMessage()


def comma_list(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def is_missing(place: str) -> bool:
    """Whether this can only be a path, and nothing is there; what could be a model's id on the hub is left to transformers."""
    return not Path(place).expanduser().exists() and (place.startswith((".", "/", "~")) or place.count("/") > 1)
