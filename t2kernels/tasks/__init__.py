"""Tasks by name, or from a local JSONL file."""

import difflib
from pathlib import Path

from t2kernels.tasks import tiny
from t2kernels.tasks.base import Task, from_jsonl

__all__ = ["Task", "from_jsonl", "load", "names"]


def names() -> list[str]:
    """The tasks that `load` knows by name."""
    return [*tiny.TRAINED, *tiny.UNSEEN]


def load(name: str | Path) -> Task:
    """The task called `name`, or the one in the JSONL file at that path.

    Raises ValueError for a name that is not known, FileNotFoundError for a path that is not there.
    """
    if str(name).endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {str(name)!r}; wanted is a JSONL file with the columns prompt and answer")
        return from_jsonl(name)
    if name in names():
        return tiny.task(str(name))
    close = difflib.get_close_matches(str(name), names(), 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no task {str(name)!r}; {hint}Known are {', '.join(names())}, and any path to a .jsonl file")
