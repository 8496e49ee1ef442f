"""Rows of a dataset: from the Hugging Face hub, or from JSONL or parquet files with the same columns."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, overload

from t2kernels import HubError, InputError, MissingFileError, PackageError
from t2kernels.tasks.base import SPLITS, Task, split_of
from t2kernels.tasks.records import MissingColumnError, Raw, Row, json_lines

from .network import from_cache_only, unreachable

SUFFIXES = (".jsonl", ".parquet")
INSTALL = "pip install 't2kernels[tasks]'"


@dataclass(frozen=True)
class Source:
    """A dataset on the hub.

    id: the name of its repository.
    problem: row of the dataset -> row of a task. Raises ValueError with the reason if the row is malformed.
    configs: the configurations to read, in turn: the first row of each, then the second row of each, and so on.
    train, test: the names of its splits. train is None if the dataset has no training rows.
    """

    id: str
    problem: Callable[[Row], Row] = field(repr=False)
    configs: tuple[str | None, ...] = (None,)
    train: str | None = "train"
    test: str = "test"


class Rows:
    """(split, n, seed) -> rows of a task.

    As in the authors' release, every second training row is for training and the others are for validation.

    path: a file or a directory to read instead of the hub, or {"train": path, "test": path}
    holdout: for a dataset without training rows, how many test rows to use for training and validation, not for testing

    Files are read and checked at once. The hub is read when a split is requested.
    """

    def __init__(
        self, name: str, source: Source, path: str | Path | Mapping[str, str | Path] | None = None, holdout: int = 0
    ) -> None:
        if holdout and source.train:
            raise InputError(f"holdout={holdout}: {name!r} has training rows of its own; holdout is for sets without")
        if holdout < 0:
            raise InputError(f"holdout={holdout}; it must be 0 or more")
        self.name: str = name
        self.source: Source = source
        self.holdout: int = holdout
        self.parts: dict[str, list[Row]] | None = None  # split -> rows, if the file itself assigns rows to splits
        self.raw: dict[str, Sequence[Raw]] = {}
        if path is None:
            need("datasets", f"{name!r} is loaded from the hub ({source.id})", name)
        else:
            self._read(path)

    def __call__(self, split: str, n: int | None, seed: int) -> list[Row]:
        """The first `n` rows of a split, or all. The seed is ignored: a dataset has no other rows."""
        if self.parts is not None:
            return self.parts[split][:n]
        if self.source.train:
            rows = self._raw("test") if split == "test" else self._raw("train")[split == "validation" :: 2]
        elif split == "test":
            rows = self._raw("test")[self.holdout :]
        elif self.holdout:
            rows = self._raw("test")[: self.holdout][split == "validation" :: 2]
        else:
            raise InputError(
                f"{self.name!r} has test rows only; tasks.load({self.name!r}, holdout=20) sets the first 20 aside "
                "for training and validation"
            )
        return [self.row(where, raw) for where, raw in rows[:n]]

    def row(self, where: str, raw: Row) -> Row:
        """The row of the task for a row of the dataset. Raises ValueError with the place and the reason."""
        try:
            return self.source.problem(raw)
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None

    def _raw(self, part: str) -> Sequence[Raw]:
        if part in self.raw:
            return self.raw[part]
        if self.raw:  # the rows come from files, and no file has this part
            raise InputError(
                f"the files given for {self.name!r} hold its {' and '.join(self.raw)} rows, no {part} rows"
            )
        return hub_rows(self.name, self.source, getattr(self.source, part))

    # --- files

    def _read(self, path: str | Path | Mapping[str, str | Path]) -> None:
        names = {"train": self.source.train, "test": self.source.test}
        if isinstance(path, Mapping):
            unknown = [part for part in path if not names.get(part)]
            if unknown or not path:
                known = " and ".join(k for k, v in names.items() if v)
                raise InputError(f"path={dict(path)!r}: expected {{split: file}} with {known}")
            self.raw = {part: records(existing(file)) for part, file in path.items()}
        elif (place := existing(path)).is_dir():
            files = {part: self._files(place, name) for part, name in names.items() if name}
            self.raw = {part: self._own(found) for part, found in files.items() if found}
            if not self.raw:
                expected = " or ".join(f"{name}.jsonl" for name in names.values() if name)
                raise InputError(f"{place} holds no file of a split; expected {expected}, or the same as .parquet")
        else:
            words = re.split("[^a-z]+", place.stem.lower())
            part = next((part for part, name in names.items() if name in words), None if self.source.train else "test")
            if part is None:
                self.parts = self._sorted(records(place))
                if not any(self.parts.values()):
                    raise InputError(f"{path} holds no row")
            else:
                self.raw = {part: records(place)}
        for part, rows in self.raw.items():
            for where, raw in rows:
                self.row(where, raw)
            if not rows:
                raise InputError(f"{path if not isinstance(path, Mapping) else path[part]} holds no {part} row")

    def _files(self, folder: Path, name: str) -> list[Path]:
        """The files of a split, in the folder or in its subfolders named after the configs."""
        named = {config for config in self.source.configs if config}
        places = sorted(place for place in folder.rglob("*") if place.name in named and place.is_dir())
        files = [
            file
            for place in places or [folder]
            for file in sorted(place.rglob("*"))
            if file.suffix in SUFFIXES and file.is_file()
        ]
        return [file for file in files if name in re.split("[^a-z]+", file.stem.lower())]

    def _own(self, files: Sequence[Path]) -> list[Raw]:
        """The rows of the files that have the columns of this dataset; of all files if none has."""
        read = [records(file) for file in files]
        own = [rows for rows in read if not rows or not self._foreign(rows[0][1])]
        return [row for rows in own or read for row in rows]

    def _foreign(self, raw: Row) -> bool:
        try:
            self.source.problem(raw)
        except MissingColumnError:
            return True
        except ValueError:
            return False
        return False

    def _sorted(self, rows: Sequence[Raw]) -> dict[str, list[Row]]:
        """Split -> rows, for a file whose name gives no split: by the column `split`, else by the prompt's hash."""
        parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for where, raw in rows:
            row = self.row(where, raw)
            try:
                parts[split_of(raw, row["prompt"])].append(row)
            except ValueError as e:
                raise InputError(f"{where}: {e}") from None
        return parts


@dataclass(frozen=True)
class Dataset:
    """How a hub file declares a task: where its rows are, and how to make the task from them.

    make: (name, rows, checker) -> the task. checker is the argument of `tasks.load`; most tasks ignore it.
    choice: the task -> the same with check "choice"; None if its rows have no options
    """

    source: Source
    make: Callable[[str, Rows, str], Task]
    choice: Callable[[Task], Task] | None = None

    def checked(self, task: Task, check: str) -> Task:
        """The task with another check than its own. Raises ValueError for any but "choice" where there are options."""
        if check != "choice" or self.choice is None:
            can = "'choice'" if self.choice else "none but its own"
            raise InputError(f"check {check!r}: {task.name!r} can be checked by {can}")
        return self.choice(task)


def existing(path: str | Path) -> Path:
    """The path of a file or directory. Raises FileNotFoundError, or ValueError for a file of another kind."""
    place = Path(path).expanduser()
    if not place.exists():
        raise MissingFileError(f"no file or directory {str(path)!r}")
    if place.is_file() and place.suffix not in SUFFIXES:
        raise InputError(f"{path} is no {' or '.join(SUFFIXES)} file")
    return place


def records(path: Path) -> list[Raw]:
    """The rows of a JSONL or parquet file. Raises ValueError with the file, the line and the reason."""
    if path.suffix == ".parquet":
        parquet = need("pyarrow.parquet", f"{path} is a parquet file")
        try:
            table = parquet.read_table(path)
        except Exception as e:  # pyarrow raises errors of its own, and not all of them are ValueErrors
            raise InputError(f"{path}: no parquet file that can be read ({e})") from None
        return [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    return list(json_lines(path))


# --- the hub


class Remote(Sequence[Raw]):
    """Rows of several loaded datasets, in turn. A row is read when it is accessed."""

    def __init__(
        self, parts: Sequence[tuple[str, Sequence[Row]]], order: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self.parts: Sequence[tuple[str, Sequence[Row]]] = parts
        self.order: Sequence[tuple[int, int]] = order or [
            pair
            for many in zip_longest(*([(p, i) for i in range(len(rows))] for p, (_, rows) in enumerate(parts)))
            for pair in many
            if pair
        ]

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, at: int) -> Raw: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Raw]: ...

    def __getitem__(self, at: int | slice) -> Raw | Sequence[Raw]:
        if isinstance(at, slice):
            return Remote(self.parts, self.order[at]) if self.order[at] else []
        part, i = self.order[at]
        label, rows = self.parts[part]
        return f"{label} row {i}", rows[i]


def hub_rows(name: str, source: Source, split: str) -> Remote:
    """A split of a dataset, from the hub or the cache of `datasets`. Raises ImportError, or OSError with a remedy."""
    datasets = need("datasets", f"{name!r} is loaded from the hub ({source.id})", name)
    parts = []
    why = None if Path(source.id).is_dir() else unreachable()
    for config in source.configs:
        label = f"{source.id}{f' ({config})' if config else ''}, {split}"
        try:
            with contextlib.nullcontext() if why is None else from_cache_only():
                rows = datasets.load_dataset(source.id, config, split=split)
        except (OSError, ValueError) as e:
            reason = f"{why}; {e}" if why else str(e)
            raise HubError(
                f"cannot load {label} from the hub: {reason}. Without a network give a copy of its files: "
                f"tasks.load({name!r}, path=...), or --task {name}:PATH, a .jsonl or .parquet file or a directory of "
                "them"
            ) from e
        if "image" in rows.features:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        parts.append((label, rows))
    return Remote(parts)


def need(package: str, why: str, task: str | None = None) -> Any:
    """Import an optional package. Raises ImportError that says how to install it."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as e:
        instead = f"; or give a copy of its files: tasks.load({task!r}, path=...), --task {task}:PATH" if task else ""
        raise PackageError(f"{why}, which needs the package {package.split('.')[0]}: {INSTALL}{instead} ({e})") from e
