"""What a manifest must hold. A schema is data: {key: kind}. A key that ends with "?" may be missing.

A kind is a `Kind`, another schema (an object), or `Each(kind)`: an object with any keys, all values of one kind. Keys
that a schema does not name are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from t2kernels import printable


@dataclass(frozen=True)
class Kind:
    """A test of one value. wanted: what passes, in words, for the message."""

    wanted: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """An object whose values are all of one kind."""

    kind: Kind | Mapping[str, Any]


Schema: TypeAlias = Mapping[str, Any]
"""{key: Kind, Each or Schema}."""

LARGEST: int = 2**53  # of an integer: what JSON keeps exactly


# --- kinds


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list of values of one kind. length: how many; None: any number."""
    wanted = f"a list of {'' if length is None else f'{length} times '}{kind.wanted}"
    return Kind(
        wanted, lambda v: isinstance(v, list) and length in (None, len(v)) and all(kind.test(item) for item in v)
    )


def optional(kind: Kind) -> Kind:
    """A value of one kind, or null."""
    return Kind(f"{kind.wanted} or null", lambda v: v is None or kind.test(v))


TEXT: Kind = Kind("a string", lambda v: isinstance(v, str))
COUNT: Kind = Kind("an integer from 1", lambda v: type(v) is int and 1 <= v <= LARGEST)
INDEX: Kind = Kind("an integer from 0", lambda v: type(v) is int and 0 <= v <= LARGEST)
NUMBER: Kind = Kind("a finite number", lambda v: type(v) in (int, float) and abs(v) <= LARGEST and math.isfinite(v))
TEXTS: Kind = list_of(TEXT)
DIGEST: Kind = Kind(
    "a sha256 of 64 hexadecimal digits",
    lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef"),
)
PLAIN_NAME: Kind = Kind(
    "the bare name of a file",
    lambda v: isinstance(v, str) and 0 < len(v) <= 255 and not set(v) & set("/\\\0") and v not in (".", ".."),
)


# --- schemas

# FACTORS: the manifest of a directory. MATRIX: one matrix in it. WRITTEN: the header of the matrix's file. DECOMPOSED:
# what `decompose` adds to it.
MATRIX: Schema = {
    "shape": list_of(COUNT, 2),
    "rank": COUNT,
    "fingerprint": DIGEST,
    "file": PLAIN_NAME,
    "digest?": DIGEST,
    "runs?": list_of(INDEX),
    "dtype?": TEXT,
    "weight_hash?": DIGEST,
    "asked?": COUNT,
    "max_error?": optional(NUMBER),
    "algorithm?": TEXT,
    "residual?": NUMBER,
    "error?": NUMBER,
    "format_error?": NUMBER,
    "dense_int8_error?": NUMBER,
    "columns?": COUNT,
    "residual_columns?": INDEX,
    "measured?": TEXT,
}
WRITTEN: Schema = {**MATRIX, "format": COUNT, "name": TEXT}
DECOMPOSED: Schema = {"algorithm": TEXT, "residual": NUMBER, "error": NUMBER}
FACTORS: Schema = {
    "matrices": Each(MATRIX),
    "order?": TEXTS,
    "fingerprint?": DIGEST,
    "spectra?": DIGEST,
    "base_model?": optional(TEXT),
    "revision?": optional(TEXT),
    "dtype?": optional(TEXT),
    "rank?": optional(NUMBER),
    "algorithm?": TEXTS,
}


def check(value: Any, schema: Schema, where: object, error: type[Exception], advice: str) -> dict[str, Any]:
    """Compare a manifest with its schema.

    where: the file, for the message
    error: what to raise: `where`, the key, what was found and what was wanted, then `advice`
    Returns `value`.
    """
    found = _misfit(value, schema, "")
    if found:
        raise error(f"{printable(where)}: {found}; {advice}")
    return value


def _misfit(value: Any, kind: Any, key: str) -> str | None:
    if isinstance(kind, Kind):
        return None if kind.test(value) else f"{key} is {shortened(value)}, wanted {kind.wanted}"
    if not isinstance(value, dict):
        return f"{key or 'its manifest'} is {shortened(value)}, wanted an object"
    inside = f"{key}." if key else ""
    if isinstance(kind, Each):
        parts = [(name, kind.kind) for name in value]
    else:
        parts = [(n.removesuffix("?"), part) for n, part in kind.items() if n[-1] != "?" or n[:-1] in value]
    for name, part in parts:
        if name not in value:
            return f"{inside}{name} is missing"
        if found := _misfit(value[name], part, f"{inside}{name}"):
            return found
    return None


def shortened(value: Any) -> str:
    """A value as a message shows it: in at most 60 letters."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) > LARGEST:  # repr of a huge one raises ValueError
        return "an integer beyond 2**53"
    return printable(repr(value))[:60]
