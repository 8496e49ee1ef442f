"""Problems of one or several experts as one dataset: rows with a prompt, an expert and the columns of the reward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from t2kernels import InputError
from t2kernels.rollout.rewards import is_task


class Problems(Dataset[dict[str, Any]]):
    """The rows of {expert: dataset}, one dataset after the other. Row i is a dict with at least "prompt" and "expert".

    parts: a dataset is a list of dicts, a `datasets.Dataset`, or anything with a length that gives a dict for an index.
        The rows of expert None name their own expert in a column "expert".
    what: the name of the argument, for errors
    Raises ValueError for a dataset that is empty or lacks a column.
    """

    def __init__(self, parts: Mapping[str | None, Any], what: str = "train_dataset") -> None:
        self.parts: dict[str | None, Any] = dict(parts)
        for name, rows in self.parts.items():
            self._check(rows, f"{what}[{name!r}]" if len(self.parts) > 1 else what, name is None)
        self.ends: list[int] = list(accumulate(len(rows) for rows in self.parts.values()))

    def _check(self, rows: Any, what: str, by_column: bool) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, (str, Mapping)):
            raise InputError(f"{what} is a {type(rows).__name__}; wanted a list of dicts, a datasets.Dataset or a task")
        if not len(rows):
            raise InputError(f"{what} is empty")
        checked = enumerate(rows) if isinstance(rows, list) else [(0, rows[0])]
        for i, row in checked:
            if not isinstance(row, Mapping):
                raise InputError(f"{what}[{i}] is a {type(row).__name__}; wanted a dict with a prompt")
            for column in ("prompt", "expert") if by_column else ("prompt",):
                if column not in row:
                    raise InputError(
                        f"{what}[{i}] has no {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}"
                    )

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        part = bisect_right(self.ends, i)
        name, rows = list(self.parts.items())[part]
        row = dict(rows[i - (self.ends[part - 1] if part else 0)])
        return row if name is None else {**row, "expert": name}

    @property
    def experts(self) -> list[str]:
        """The names of the experts, in order of appearance."""
        if None not in self.parts:
            return [name for name in self.parts if name is not None]
        return list(dict.fromkeys(self[i]["expert"] for i in range(len(self))))


def problems(data: Any, split: str, what: str) -> Problems | None:
    """`Problems` of a dataset, of a task (its `split`), or of {expert: one of these}. None stays None.

    what: the name of the argument, for errors
    """
    if data is None or isinstance(data, Problems):
        return data
    parts = data if isinstance(data, Mapping) else {None: data}
    parts = {name: d.split(split) if is_task(d) else d for name, d in parts.items()}
    return Problems(parts, what)


def by_expert(train_dataset: Any, experts: str | Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Sort out the two ways to say what to train on.

    Returns ({expert: data}, or a dataset with a column "expert"; {expert: its task}). Raises ValueError if there is no
    data, or if both arguments bring some.
    """
    if isinstance(experts, Mapping):
        if train_dataset is not None:
            raise InputError("experts={name: dataset} already says what to train on: leave out train_dataset")
        if not experts:
            raise InputError("experts={} names none; wanted {name: dataset}")
        data = dict(experts)
    elif train_dataset is None:
        raise InputError("there is nothing to train on: pass train_dataset, or experts={name: dataset}")
    elif experts is None and not is_task(train_dataset) and len(train_dataset) and "expert" in train_dataset[0]:
        return train_dataset, {}
    else:
        data = {experts or getattr(train_dataset, "name", None) or "expert": train_dataset}
    return data, {name: d for name, d in data.items() if is_task(d)}


def validation_of(tasks: Mapping[str, Any], needed: bool) -> dict[str, Any] | None:
    """The tasks, if they have problems to validate on; None if one has none.

    needed: whether to raise the task's own InputError instead
    """
    for task in tasks.values():
        try:
            task.split("validation", 1)
        except InputError:
            if needed:
                raise
            return None
    return dict(tasks)
