"""Private names of torch and transformers that this library depends on, checked before they are needed.

A private name may be renamed in any version. Some renames would raise an AttributeError in the middle of a forward;
others would lose experts or gradients without an error. `require` turns both into one sentence at patch time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from t2kernels import T2Error


class UnsupportedVersionError(T2Error, RuntimeError):
    """An installed package lacks a private name that this library needs; the message names it."""


def require(owner: object, name: str, reason: str, parameters: Sequence[str] = (), package: Any = None) -> None:
    """Raise UnsupportedVersionError unless `owner` has the attribute `name`, with these parameters.

    owner: a module, a class or an object
    reason: what the attribute is needed for
    parameters: names that its signature must have; () leaves the signature alone
    package: the package to blame in the message; None: torch
    """
    if package is None:
        import torch as package

    if not hasattr(owner, name):
        wrong = "there is none"
    elif parameters and not set(parameters) <= set(found := _parameters(getattr(owner, name))):
        wrong = f"its parameters are {', '.join(found) or 'none'}"
    else:
        return
    of, listed = getattr(owner, "__name__", type(owner).__name__), ", ".join(parameters)
    raise UnsupportedVersionError(
        f"{package.__name__} {package.__version__}: {of}.{name}{f'({listed})' if listed else ''} "
        f"is expected ({reason}), but {wrong}; use a version that t2kernels supports (pyproject.toml)"
    )


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not callable, or without a signature
        return ()
