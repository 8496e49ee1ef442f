"""Tasks by name: the built-in ones, datasets of the Hugging Face hub or copies of their files, and files."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from t2kernels import InputError

from . import tiny
from .base import Task
from .hub import TASKS
from .hub.source import Rows
from .problems import classification, from_jsonl, load_file

__all__ = ["Task", "classification", "from_jsonl", "hub_names", "load", "names"]


def names() -> list[str]:
    """The tasks of the built-in model. They need only this package."""
    return [*tiny.TRAINED, *tiny.UNSEEN]


def hub_names() -> list[str]:
    """The tasks whose problems are a dataset on the Hugging Face hub."""
    return list(TASKS)


def load(
    name: str | Path,
    path: str | Path | Mapping[str, str | Path] | None = None,
    *,
    chat: bool = False,
    checker: str = "auto",
    holdout: int = 0,
    check: str | None = None,
) -> Task:
    """The task called `name`, or the task in the JSONL or CSV file at that path.

    name: NAME:PATH is the task NAME with path=PATH
    path: for a task of `hub_names`, a copy of its dataset to read instead of the hub: a .jsonl or .parquet file with
        the dataset's own columns, a directory of such files, or {"train": file, "test": file}
    chat: if True, prompts are messages for the model's chat template, not plain text
    checker: for MATH: "plain", "math-verify", or "auto", which is math-verify if it is installed. `Task.checker` says
        which one was chosen
    check: how completions are checked, for the rows of a file that do not say it: exact, label, number, contains, regex
        or choice. For ARC "choice": the options by their likelihood; None: by letter
    holdout: for a dataset with test rows only, how many of them to use for training and validation, not for testing

    Raises ValueError for an unknown name or malformed rows, FileNotFoundError for a missing path, ImportError for a
    missing package. The hub is read when `Task.split` is called, not before.
    """
    name = str(name)
    head, colon, tail = name.partition(":")
    if colon and head.replace("-", "_") in TASKS and path is None:
        name, path = head, tail
    if (listed := name.replace("-", "_")) in TASKS:
        dataset = TASKS[listed]
        made = dataset.make(listed, Rows(listed, dataset.source, path, holdout), checker)
        return replace(made if check is None else dataset.checked(made, check), chat=chat)
    if path is not None or holdout:
        raise InputError(f"path and holdout are for {', '.join(TASKS)}; not for {name!r}")
    if name.endswith((".jsonl", ".csv")):
        made = load_file(name, check)
        return replace(made, chat=chat or made.chat)
    if name in names():
        if check is not None:
            raise InputError(f"check {check!r} is for files and ARC; {name!r} has a check of its own")
        return replace(tiny.task(name), chat=chat)
    known = [*names(), *TASKS]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        f"no task {name!r}; {hint}Known are {', '.join(known)}, NAME:PATH for a copy of a dataset, "
        "and any path to a .jsonl or .csv file"
    )
