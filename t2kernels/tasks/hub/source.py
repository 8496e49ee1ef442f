"""Rows of a known dataset: from the Hugging Face hub, or from JSONL or parquet files with the same columns."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from t2kernels.tasks.base import SPLITS, split_of
from t2kernels.tasks.records import Raw, json_lines

SUFFIXES = (".jsonl", ".parquet")
INSTALL = "pip install 't2kernels[tasks]'"


@dataclass(frozen=True)
class Source:
    """A dataset on the hub.

    id: of its repository. configs: read side by side: the first row of each, the second of each, and so on.
    train, test: the names of its splits; train None where there is none, or where its answers are not to be learned from.
    problem: a raw row -> the row of a task. Raises ValueError with what is wrong with it.
    """

    id: str
    problem: Callable[[dict], dict] = field(repr=False)
    configs: tuple[str | None, ...] = (None,)
    train: str | None = "train"
    test: str = "test"


class Rows:
    """(split, n, seed) -> rows of a task, with the authors' protocol: every second training row is for training, the rest for validation.

    path: a file or a directory to read instead of the hub, or {"train": path, "test": path}
    holdout: for a set without training rows, how many of its test rows are for training and validation, and no longer for testing
    Files are read and checked at once; the hub is asked when a split is.
    """

    def __init__(
        self, name: str, source: Source, path: str | Path | Mapping[str, str | Path] | None = None, holdout: int = 0
    ):
        if holdout and source.train:
            raise ValueError(f"holdout={holdout}: {name!r} has training rows of its own; holdout is for sets without")
        if holdout < 0:
            raise ValueError(f"holdout={holdout}; it must be 0 or more")
        self.name, self.source, self.holdout = name, source, holdout
        self.parts: dict[str, list[dict]] | None = None  # split -> rows, where the files say it themselves
        self.raw: dict[str, Sequence[Raw]] = {}
        if path is None:
            need("datasets", f"{name!r} is loaded from the hub ({source.id})", name)
        else:
            self._read(path)

    def __call__(self, split: str, n: int | None, seed: int) -> list[dict]:
        if self.parts is not None:
            return self.parts[split][:n]
        if self.source.train:
            rows = self._raw("test") if split == "test" else self._raw("train")[split == "validation" :: 2]
        elif split == "test":
            rows = self._raw("test")[self.holdout :]
        elif self.holdout:
            rows = self._raw("test")[: self.holdout][split == "validation" :: 2]
        else:
            raise ValueError(
                f"{self.name!r} has test rows only; tasks.load({self.name!r}, holdout=20) sets the first 20 aside for training and validation"
            )
        return [self.row(where, raw) for where, raw in rows[:n]]

    def row(self, where: str, raw: dict) -> dict:
        """A checked row. Raises ValueError that says where."""
        try:
            return self.source.problem(raw)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None

    def _raw(self, part: str) -> Sequence[Raw]:
        if part not in self.raw:
            if self.raw:  # from files, and not among them
                raise ValueError(
                    f"the files given for {self.name!r} hold its {' and '.join(self.raw)} rows, no {part} rows"
                )
            return hub_rows(self.name, self.source, getattr(self.source, part))
        return self.raw[part]

    # --- files

    def _read(self, path: str | Path | Mapping[str, str | Path]) -> None:
        names = {"train": self.source.train, "test": self.source.test}
        if isinstance(path, Mapping):
            unknown = [part for part in path if not names.get(part)]
            if unknown or not path:
                raise ValueError(
                    f"path={dict(path)!r}: wanted {{split: file}} with {' and '.join(k for k, v in names.items() if v)}"
                )
            self.raw = {part: records(existing(file)) for part, file in path.items()}
        elif (place := existing(path)).is_dir():
            files = {part: self._files(place, name) for part, name in names.items() if name}
            self.raw = {
                part: [row for file in found for row in records(file)] for part, found in files.items() if found
            }
            if not self.raw:
                wanted = " or ".join(f"{name}.jsonl" for name in names.values() if name)
                raise ValueError(f"{place} holds no file of a split; wanted {wanted}, or the same as .parquet")
        else:
            words = re.split("[^a-z]+", place.stem.lower())
            part = next((part for part, name in names.items() if name in words), None if self.source.train else "test")
            if part is None:
                self._sort(records(place))
                if not any(self.parts.values()):
                    raise ValueError(f"{path} holds no row")
            else:
                self.raw = {part: records(place)}
        for part, rows in self.raw.items():
            for where, raw in rows:
                self.row(where, raw)
            if not rows:
                raise ValueError(f"{path if not isinstance(path, Mapping) else path[part]} holds no {part} row")

    def _files(self, folder: Path, name: str) -> list[Path]:
        """The files of a split, and of the configs where their names are folders."""
        folders = [folder / config for config in self.source.configs if config and (folder / config).is_dir()] or [
            folder
        ]
        files = [f for place in folders for f in sorted(place.rglob("*")) if f.suffix in SUFFIXES and f.is_file()]
        return [f for f in files if name in re.split("[^a-z]+", f.stem.lower())]

    def _sort(self, rows: Sequence[Raw]) -> None:
        """Rows of a file whose name says no split: a column `split` does, else the hash of the prompt, as in any file of problems."""
        self.parts = {split: [] for split in SPLITS}
        for where, raw in rows:
            row = self.row(where, raw)
            try:
                self.parts[split_of(raw, row["prompt"])].append(row)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None


def existing(path: str | Path) -> Path:
    """The path of a file or directory. Raises FileNotFoundError, or ValueError for a file of another kind."""
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"no file or directory {str(path)!r}")
    if place.is_file() and place.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no {' or '.join(SUFFIXES)} file")
    return place


def records(path: Path) -> list[Raw]:
    """The rows of a JSONL or parquet file. Raises ValueError with the file, the line and what is wrong with it."""
    if path.suffix == ".parquet":
        parquet = need("pyarrow.parquet", f"{path} is a parquet file")
        try:
            table = parquet.read_table(path)
        except Exception as e:  # pyarrow has errors of its own, not all of them ValueErrors
            raise ValueError(f"{path}: no parquet file that can be read ({e})") from None
        return [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    return list(json_lines(path))


# --- the hub


class Remote(Sequence):
    """Rows of loaded datasets, side by side; a row is read when it is asked for."""

    def __init__(self, parts: Sequence[tuple[str, Any]], order: Sequence[tuple[int, int]] | None = None):
        self.parts = parts
        self.order = order or [
            pair
            for many in zip_longest(*([(p, i) for i in range(len(rows))] for p, (_, rows) in enumerate(parts)))
            for pair in many
            if pair
        ]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return Remote(self.parts, self.order[at]) if self.order[at] else []
        part, i = self.order[at]
        label, rows = self.parts[part]
        return f"{label} row {i}", rows[i]


def hub_rows(name: str, source: Source, split: str) -> Remote:
    """A split of a dataset, from the hub or from the cache of `datasets`. Raises ImportError, or OSError that says what to do."""
    datasets = need("datasets", f"{name!r} is loaded from the hub ({source.id})", name)
    parts = []
    for config in source.configs:
        label = f"{source.id}{f' ({config})' if config else ''}, {split}"
        try:
            rows = datasets.load_dataset(source.id, config, split=split)
        except (OSError, ValueError) as e:
            raise OSError(
                f"cannot load {label} from the hub: {e}. Without a network give a copy of its files: tasks.load({name!r}, path=...), "
                f"or --task {name}:PATH, a .jsonl or .parquet file or a directory of them"
            ) from e
        if "image" in rows.features:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        parts.append((label, rows))
    return Remote(parts)


def need(package: str, why: str, task: str | None = None) -> Any:
    """An optional package. Raises ImportError with how to get it."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as e:
        instead = f"; or give a copy of its files: tasks.load({task!r}, path=...), --task {task}:PATH" if task else ""
        raise ImportError(f"{why}, which needs the package {package.split('.')[0]}: {INSTALL}{instead} ({e})") from e
