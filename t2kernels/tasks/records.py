"""Rows of a file with one JSON object a line, and their columns, checked."""

import json
from collections.abc import Iterator
from pathlib import Path

Raw = tuple[str, dict]
"""Where a row stands, for error messages, and its columns."""


def json_lines(path: Path) -> Iterator[Raw]:
    """The objects of a file with one JSON object a line; blank lines do not count. Raises ValueError."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a {type(row).__name__}, not an object with columns in braces")
            yield where, row


def text(raw: dict, column: str) -> str:
    """A column that must hold text. Raises ValueError."""
    if column not in raw:
        raise ValueError(f"no {column!r}; its columns are {', '.join(raw) or 'none'}")
    if not isinstance(raw[column], str) or not raw[column].strip():
        raise ValueError(f"{column!r} is {raw[column]!r:.60}; wanted is text in quotes, not empty")
    return raw[column]


def texts(raw: dict, column: str) -> list[str]:
    """A column that must hold a list of texts. Raises ValueError."""
    if column not in raw:
        raise ValueError(f"no {column!r}; its columns are {', '.join(raw) or 'none'}")
    found = raw[column]
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(t, str) for t in found):
        raise ValueError(f"{column!r} is {found!r:.60}; wanted is a list of texts, not empty")
    return list(found)
