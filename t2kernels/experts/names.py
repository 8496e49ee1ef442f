"""How experts are named: in a batch, in a request, on a command line and as a file. This is the only place that knows the grammar.

A name is one expert. None is the base model. {name: weight} is a mixture, which requests and command lines write as
"mix:math=0.7,code=0.3". Three words are reserved: "base", "auto" and whatever starts with "mix:".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

Name = str | None | Mapping[str, float]

BASE = "base"
"""The name of the base model where a text must stand."""
AUTO = "auto"
"""The name that asks a strategy to choose."""
MIX = "mix:"
"""What the text of a mixture starts with."""
CLASSIFIER = "classify"
"""The name of the classification expert unless another is given."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_WEIGHT = 1e3


def check_name(name: str) -> str:
    """The name, if an expert may have it. Raises ValueError.

    A name becomes a file, an address and a label: 1 to 64 letters, digits, ".", "_" and "-", the first a letter or digit, and none of the
    reserved words.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"an expert cannot be called {name!r}: use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    if name in (BASE, AUTO):
        raise ValueError(f"an expert cannot be called {name!r}: the word is reserved")
    return name


def parse_mixture(text: str) -> dict[str, float]:
    """ "mix:math=0.7,code=0.3", or the same without "mix:", as {"math": 0.7, "code": 0.3}. Raises ValueError.

    Each name may stand once, and no weight may be larger than 1000.
    """
    weights: dict[str, float] = {}
    for part in text.removeprefix(MIX).split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or name in weights or not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"{text!r} is no mixture: write mix:NAME=WEIGHT,NAME=WEIGHT, each name once, such as mix:math=0.7,code=0.3"
            )
        weights[name] = weight
    return weights


def write_mixture(weights: Mapping[str, float]) -> str:
    """The text that `parse_mixture` reads, with the names in order."""
    return MIX + ",".join(f"{name}={weight:g}" for name, weight in sorted(weights.items()))


def flat_names(names: Name | Sequence) -> Iterator[Name]:
    """The names of a batch in order. Raises TypeError for what names no expert."""
    if isinstance(names, (str, Mapping)) or names is None:
        yield names
    elif isinstance(names, Sequence):
        for n in names:
            yield from flat_names(n)
    else:
        raise TypeError(
            f"{names!r} names no experts: give a name, None, a mixture {{name: weight}}, or a list of these"
        )


def shape_of(names: Name | Sequence) -> tuple[int, ...]:
    """() for one name, (B,) for a list, (B, S) for a list of lists. Raises ValueError where inner lists differ in length."""
    if isinstance(names, (str, Mapping)) or names is None:
        return ()
    inner = {shape_of(n) for n in names}
    if len(inner) > 1:
        raise ValueError("lists of expert names per token must all have the same length")
    return (len(names), *(inner.pop() if inner else ()))


def key_of(name: Name) -> str | tuple[tuple[str, float], ...] | None:
    """What a row is remembered by: None for the base model, a name, or a mixture's sorted (name, weight) pairs without zeros.

    Raises TypeError for what is no name, ValueError for a weight that is not finite.
    """
    if name is None or isinstance(name, str):
        return name
    if not isinstance(name, Mapping):
        raise TypeError(f"{name!r} is no expert: give a name, None for the base model, or a mixture {{name: weight}}")
    for n, weight in name.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {n!r} in a mixture is {weight}; wanted a finite number")
    return tuple(sorted((n, float(weight)) for n, weight in name.items() if weight)) or None
