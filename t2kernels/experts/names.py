"""How experts are named in a batch, in a request, on a command line and as a file. Only this module knows the grammar.

A string names one expert, None is the base model, {name: weight} is a mixture. In text a mixture is
"mix:math=0.7,code=0.3". Reserved words are "base", "auto" and all that starts with "mix:".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from t2kernels import InputError, InputTypeError, T2Error

Name: TypeAlias = str | Mapping[str, float] | None
"""An expert's name, None for the base model, or a mixture {name: weight}."""
Names: TypeAlias = Name | Sequence[Name] | Sequence[Sequence[Name]]
"""One name for all tokens, a list [B] with one for each sequence, or lists [B, S] with one for each token."""
Key: TypeAlias = str | tuple[tuple[str, float], ...]
"""A name as a dictionary's key: an expert's name, or the sorted (name, weight) pairs of a mixture."""

BASE = "base"
"""The base model, where a text must stand."""
AUTO = "auto"
"""Asks a strategy to choose the expert."""
MIX = "mix:"
"""The start of a mixture's text."""
CLASSIFIER = "classify"
"""The default name of the classification expert."""
NAME: re.Pattern[str] = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names that an expert may have, reserved words aside."""
VERSION: re.Pattern[str] = re.compile(r"@[0-9]{1,18}\Z")
"""What may follow a name in a bank."""
MAX_WEIGHT = 1e3
"""The largest weight that a mixture's text may give an expert."""


class NameRefused(T2Error, ValueError):
    """A name that an expert cannot have."""


def check_name(name: str, version: bool = False) -> str:
    """Return the name if an expert may have it, else raise NameRefused.

    A name becomes a file, an address and a label. It has 1 to 64 letters, digits, ".", "_" and "-", starts with a
    letter or a digit, and is not a reserved word.

    version: whether "@" and a number may follow: the bank of a server keeps several versions of an expert
    """
    plain = name if not isinstance(name, str) or not version else VERSION.sub("", name)
    if not isinstance(plain, str) or not NAME.fullmatch(plain):
        shown = ascii(name)
        raise NameRefused(
            f"an expert cannot be called {shown if len(shown) < 80 else shown[:76] + '...'}: "
            "use a non-empty name of 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit: "
            "it becomes a file"
        )
    if plain in (BASE, AUTO):
        raise NameRefused(f"an expert cannot be called {name!r}: the word is reserved")
    return name


def check_files(names: Iterable[str], there: Iterable[str] = ()) -> None:
    """Raise NameRefused if two names would be one file where a file system ignores case.

    there: names of files in the folder that `names` are written to
    """
    seen = list(there)
    for name in names:
        other = same_file(check_name(name, version=True), seen)
        if other is not None:
            raise NameRefused(
                f"the experts {other!r} and {name!r} differ only in case and would be one file on some file systems; "
                "rename one of them"
            )
        seen.append(name)


def same_file(name: str, names: Iterable[str]) -> str | None:
    """The first of `names` that differs from `name` in case and in nothing else, or None."""
    folded = name.casefold()
    return next((n for n in names if n != name and n.casefold() == folded), None)


def parse_mixture(text: str) -> dict[str, float]:
    """{name: weight} from "mix:math=0.7,code=0.3"; "mix:" may be missing.

    Raises ValueError for another text, a name that stands twice, and a weight that is not finite or larger than 1000.
    """
    weights: dict[str, float] = {}
    for part in text.removeprefix(MIX).split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or name in weights or not abs(weight) <= MAX_WEIGHT:
            raise InputError(
                f"{text!r} is not a mixture: wanted mix:NAME=WEIGHT,NAME=WEIGHT with each name once, "
                "such as mix:math=0.7,code=0.3"
            )
        weights[name] = weight
    return weights


def write_mixture(weights: Mapping[str, float]) -> str:
    """The text that `parse_mixture` reads, with the names in alphabetical order and 6 digits of each weight."""
    return MIX + ",".join(f"{name}={weight:g}" for name, weight in sorted(weights.items()))


def flat_names(names: Names) -> Iterator[Name]:
    """The names of a batch in order. Raises TypeError for a value that is not a name."""
    if isinstance(names, (str, Mapping)) or names is None:
        yield names
    elif isinstance(names, Sequence):
        for n in names:
            yield from flat_names(n)
    else:
        raise InputTypeError(
            f"{names!r} names no experts: give a name, None, a mixture {{name: weight}}, or a list of these"
        )


def shape_of(names: Names) -> tuple[int, ...]:
    """() for one name, (B,) for a list, (B, S) for a list of lists.

    Raises ValueError if the inner lists differ in length.
    """
    if isinstance(names, (str, Mapping)) or names is None:
        return ()
    inner = {shape_of(n) for n in names}
    if len(inner) > 1:
        raise InputError("lists of expert names per token must all have the same length")
    return (len(names), *(inner.pop() if inner else ()))


def key_of(name: Name) -> Key | None:
    """The key of a name: the name itself, or a mixture's pairs with weight 0 left out; None for the base model.

    Raises TypeError for a value that is not a name, ValueError for a weight that is not finite.
    """
    if name is None or isinstance(name, str):
        return name
    if not isinstance(name, Mapping):
        raise InputTypeError(
            f"{name!r} is no expert: give a name, None for the base model, or a mixture {{name: weight}}"
        )
    for n, weight in name.items():
        if isinstance(weight, str) or not hasattr(weight, "__float__"):
            raise InputTypeError(f"the weight of {n!r} in a mixture is {weight!r}; wanted a number")
        if not math.isfinite(weight):
            raise InputError(f"the weight of {n!r} in a mixture is {weight}; wanted a finite number")
    return tuple(sorted((n, float(weight)) for n, weight in name.items() if weight)) or None
