"""Problems of one or several experts as one dataset: rows with a prompt, an expert's name, and the columns of the reward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch.utils.data import Dataset


class Problems(Dataset):
    """The rows of {expert: dataset}, one dataset after the other; row i is a dict with at least "prompt" and "expert".

    A dataset is a list of dicts, a `datasets.Dataset`, or anything with a length that gives a dict for an index. An expert None leaves the
    column "expert" of its rows as it is.
    Raises ValueError for a dataset that is empty or has no column "prompt".
    """

    def __init__(self, parts: Mapping[str | None, Sequence[Mapping]], what: str = "train_dataset"):
        self.parts = dict(parts)
        for name, rows in self.parts.items():
            self._check(rows, f"{what}[{name!r}]" if len(self.parts) > 1 else what, name is None)
        self.ends = list(accumulate(len(rows) for rows in self.parts.values()))

    def _check(self, rows: Sequence[Mapping], what: str, by_column: bool) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, (str, Mapping)):
            raise ValueError(f"{what} is a {type(rows).__name__}; wanted a list of dicts, a datasets.Dataset or a task")
        if not len(rows):
            raise ValueError(f"{what} is empty")
        checked = enumerate(rows) if isinstance(rows, list) else [(0, rows[0])]
        for i, row in checked:
            if not isinstance(row, Mapping):
                raise ValueError(f"{what}[{i}] is a {type(row).__name__}; wanted a dict with a prompt")
            for column in ("prompt", "expert") if by_column else ("prompt",):
                if column not in row:
                    raise ValueError(
                        f"{what}[{i}] has no {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}"
                    )

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        part = bisect_right(self.ends, i)
        name, rows = list(self.parts.items())[part]
        row = dict(rows[i - (self.ends[part - 1] if part else 0)])
        return row if name is None else {**row, "expert": name}

    @property
    def experts(self) -> list[str]:
        """The names, in order of appearance."""
        if None not in self.parts:
            return list(self.parts)
        return list(dict.fromkeys(self[i]["expert"] for i in range(len(self))))


def is_task(data: object) -> bool:
    """Whether this is a `t2kernels.tasks.Task`, or the like: it has splits, and its own reward."""
    return callable(getattr(data, "reward", None)) and callable(getattr(data, "split", None))


def problems(data, split: str, what: str) -> Problems | None:
    """`Problems` of a dataset, a task (its `split`), {expert: one of these}, or None. Rows without an expert belong to None."""
    if data is None or isinstance(data, Problems):
        return data
    parts = data if isinstance(data, Mapping) else {None: data}
    parts = {name: d.split(split) if is_task(d) else d for name, d in parts.items()}
    return Problems(parts, what)
