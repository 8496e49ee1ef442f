"""How experts are named for a batch: one name, None for the base model, a mixture {name: weight}, or lists of these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

Name = str | None | Mapping[str, float]


def flat_names(names: Name | Sequence) -> Iterator[Name]:
    """The names of a batch in order. Raises TypeError for what names no expert."""
    if isinstance(names, (str, Mapping)) or names is None:
        yield names
    elif isinstance(names, Sequence):
        for n in names:
            yield from flat_names(n)
    else:
        raise TypeError(f"{names!r} names no experts: give a name, None, a mixture {{name: weight}}, or a list of these")


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
