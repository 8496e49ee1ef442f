"""Shared by the verbs: consoles, progress bars, tables, and errors as one line."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
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

from t2kernels import InputError, T2Error, one_line

out: Console = Console(highlight=False)
err: Console = Console(stderr=True, highlight=False)

ENVIRONMENT: frozenset[int] = frozenset(
    getattr(errno, name)
    for name in (
        *(
            "ENOENT",
            "EEXIST",
            "EISDIR",
            "ENOTDIR",
            "ENOTEMPTY",
            "ENAMETOOLONG",
            "ELOOP",
        ),  # another file is there, or none
        *("EACCES", "EPERM", "EROFS"),  # it may not be used
        *(
            "ENOSPC",
            "EDQUOT",
            "EFBIG",
            "EIO",
            "EMFILE",
            "ENFILE",
            "ENOMEM",
        ),  # the disk or the machine is full or broken
    )
    if hasattr(errno, name)
)
"""Numbers of the OSErrors that a user's files and disks cause."""

OPTIONAL: frozenset[str] = frozenset(
    "bitsandbytes datasets fastapi gguf llguidance lm_eval math_verify peft prometheus_client pyarrow sentencepiece "
    "tiktoken torchao torchvision triton uvicorn vllm".split()
)
"""Packages that may be missing."""


def is_expected(e: BaseException) -> bool:
    """True for an error whose message is enough: one that is meant to be read, or one of files, memory and packages.

    Any other error is a bug and keeps its traceback.
    """
    torch = sys.modules.get("torch")
    return (
        isinstance(e, T2Error)
        or (isinstance(e, OSError) and e.errno in ENVIRONMENT)
        or (isinstance(e, ModuleNotFoundError) and (e.name or "").partition(".")[0] in OPTIONAL)
        or (torch is not None and isinstance(e, torch.OutOfMemoryError))
    )


class Commands(TyperGroup):
    """The group of verbs. It takes --debug out of the arguments wherever it stands."""

    debug: ClassVar[bool] = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As TyperGroup's, without --debug."""
        end = args.index("--") if "--" in args else len(args)
        type(self).debug = "--debug" in args[:end]
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a verb: an expected error is one line on stderr and exit code 1.

    With --debug, and for an error that is not expected, the traceback is shown; the exit code is 1 as well.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        hush()
        wait_quietly()
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(130) from None
        except Exception as e:
            if Commands.debug or not is_expected(e):
                raise
            err.print(f"[bold red]error:[/] {escape(one_line(e))}", soft_wrap=True)
            raise typer.Exit(1) from None

    return run


def bar(*fields: str) -> Progress:
    """A progress bar on stderr. fields: more columns, as format strings of a rich task: "{task.fields[kl]:.2f}"."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, *map(TextColumn, fields), console=err)


def table(name: str, *numbers: str) -> Table:
    """An empty table with a column for a name and columns for numbers, which are never cut."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column(name, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def show(title: str, made: Table, note: str = "") -> None:
    """Print a heading, a table, and a note about its columns."""
    out.print("", f"[bold]{title}[/]", made, *([f"[dim]{note}[/]"] if note else []), sep="\n")


NOISE: dict[str, str] = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "from kernels-community",
}
"""{logger: message} of other packages about their own optional kernels, which a user of `t2` does not need."""


def hush() -> None:
    """Drop the messages of NOISE. Every other warning stays."""
    for name, message in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Without) for f in logger.filters):
            logger.addFilter(_Without(message))


def wait_quietly() -> None:
    """Make OpenMP threads sleep, not spin, while they wait. torch reads this when it is imported.

    On two cores that other programs used as well, ten steps of `t2 train` took 54 s with spinning threads and 6 s with
    sleeping ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class _Without(logging.Filter):
    """Drops messages that contain a text."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message: str = message

    def filter(self, record: logging.LogRecord) -> bool:
        return self.message not in record.getMessage()


def comma_list(text: str) -> list[str]:
    """Split "a, b" into ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_text(text: str) -> str:
    """Returns the text. Raises InputError if it is not Unicode, as an argument with a byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{text!a} is not valid Unicode: {e.reason} at position {e.start}") from None
    return text


def is_missing(place: str) -> bool:
    """True for a path to nothing. A text that can be the id of a model on the hub is left to transformers."""
    return not Path(place).expanduser().exists() and (place.startswith((".", "/", "~")) or place.count("/") > 1)
