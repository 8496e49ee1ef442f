"""Tasks by name, from the hub, from copies of its files, or from a JSONL file of one's own."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from . import tiny
from .base import Task, from_jsonl

__all__ = ["Task", "from_jsonl", "hub_names", "load", "names"]

_HUB = ("gsm8k", "math500", "hendrycks_math", "mbpp", "humaneval", "arc_easy", "arc_challenge", "textvqa")


def names() -> list[str]:
    """The tasks of the built-in model, which need nothing but this package."""
    return [*tiny.TRAINED, *tiny.UNSEEN]


def hub_names() -> list[str]:
    """The tasks whose problems are a dataset on the Hugging Face hub."""
    return list(_HUB)


def load(
    name: str | Path,
    path: str | Path | Mapping[str, str | Path] | None = None,
    *,
    chat: bool = False,
    checker: str = "auto",
    holdout: int = 0,
) -> Task:
    """The task called `name`, or the one in the JSONL file at that path. `NAME:PATH` is the task NAME with `path=PATH`.

    path: for a task of `hub_names`, a copy of its dataset to read instead of the hub: a .jsonl or .parquet file with the dataset's own columns, a
        directory of such files, or {"train": file, "test": file}
    chat: ask with messages, for the model's chat template, instead of with plain text
    checker: of MATH's answers: "plain", "math-verify", or "auto", the second where it is installed; `Task.checker` says which it is
    holdout: for a dataset that has test rows only, how many of them are for training and validation, and no longer for testing

    Raises ValueError for a name that is not known and for malformed rows, FileNotFoundError for a path that is not there, ImportError for a package
    that is missing. The hub is asked when a split is.
    """
    name = str(name)
    head, colon, tail = name.partition(":")
    if colon and head in _HUB and path is None:
        name, path = head, tail
    if name in _HUB:
        return replace(_from_hub(name, path, checker, holdout), chat=chat)
    if path is not None or holdout:
        raise ValueError(f"path and holdout are for {', '.join(_HUB)}; not for {name!r}")
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name!r}; wanted is a JSONL file with the columns prompt and answer")
        return replace(from_jsonl(name), chat=chat)
    if name in names():
        return replace(tiny.task(name), chat=chat)
    known = [*names(), *_HUB]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"no task {name!r}; {hint}Known are {', '.join(known)}, NAME:PATH for a copy of a dataset, and any path to a .jsonl file"
    )


def _from_hub(name: str, path: str | Path | Mapping[str, str | Path] | None, checker: str, holdout: int) -> Task:
    from t2kernels.tasks.hub.source import Rows

    from .hub import arc, competition_math, gsm8k, python_code, textvqa

    match name:
        case "gsm8k":
            make, source = Task, gsm8k.SOURCE
            kind = {
                "extract": gsm8k.extract,
                "max_new_tokens": 512,
                "stop": gsm8k.STOP,
                "checker": "equality of numbers",
            }
        case "math500" | "hendrycks_math":
            make, source = (
                Task,
                {"math500": competition_math.MATH500, "hendrycks_math": competition_math.HENDRYCKS_MATH}[name],
            )
            judge, words = competition_math.judge(checker)
            kind = {
                "extract": competition_math.extract,
                "judge": judge,
                "checker": words,
                "max_new_tokens": 1024,
                "stop": competition_math.STOP,
            }
        case "mbpp" | "humaneval":
            make, source = python_code.CodeTask, {"mbpp": python_code.MBPP, "humaneval": python_code.HUMANEVAL}[name]
            kind = {
                "max_new_tokens": 512,
                "checker": "tests, in a sandbox",
                "stop": python_code.STOP if name == "humaneval" else (),
            }
        case "arc_easy" | "arc_challenge":
            make, source = Task, {"arc_easy": arc.EASY, "arc_challenge": arc.CHALLENGE}[name]
            kind = {"judge": arc.judge, "max_new_tokens": 32, "stop": arc.STOP, "checker": "the option named"}
        case _:
            make, source = Task, textvqa.SOURCE
            kind = {
                "judge": textvqa.judge,
                "max_new_tokens": 32,
                "stop": ("\n",),
                "images": True,
                "checker": "an answer of three people or more",
            }
    return make(name, Rows(name, source, path, holdout), **kind)
