"""Read JSON Lines files and check the columns of their rows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t2kernels import InputError


class MissingColumnError(InputError):
    """A row lacks a column, so it may be one of another dataset."""


Row = dict[str, Any]
"""A problem: column name -> value."""

Raw = tuple[str, Row]
"""The place of a row, for error messages, and its columns as the file has them."""


def json_lines(path: Path) -> Iterator[Raw]:
    """The objects in a file with one JSON object per line. Blank lines are skipped.

    Raises ValueError with the file, the line and the reason.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error})") from None
            except RecursionError:
                raise InputError(f"{where}: not usable JSON (lists or objects are nested too deeply)") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__}, not an object with columns in braces")
            yield where, row


def text(raw: Mapping[str, Any], column: str) -> str:
    """The value of a column that must hold a non-empty string. Raises ValueError."""
    value = _column(raw, column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{column!r} is {value!r:.60}; expected a non-empty string")
    return _encodable(column, value)


def texts(raw: Mapping[str, Any], column: str) -> list[str]:
    """The value of a column that must hold a non-empty list of strings. Raises ValueError."""
    value = _column(raw, column)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(t, str) for t in value):
        raise InputError(f"{column!r} is {value!r:.60}; expected a non-empty list of strings")
    return [_encodable(column, t) for t in value]


def _column(raw: Mapping[str, Any], column: str) -> Any:
    if column not in raw:
        raise MissingColumnError(f"no {column!r}; the columns are {', '.join(raw) or 'none'}")
    return raw[column]


def _encodable(column: str, value: str) -> str:
    """`value`, if a tokenizer can take it: JSON allows half of a surrogate pair ("\\ud800"), UTF-8 does not."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise InputError(
            f"{column!r} has {half!r} at position {error.start}, half of a surrogate pair; expected valid Unicode"
        ) from None
    return value
