"""Changing what one module does by a subclass of its own class: it keeps its name, is copied and pickled like itself, and goes back.

Replacing a module's `forward` would not do: a copied module would go on running the original's.
"""

from __future__ import annotations

import functools

from torch import nn


class Mixin:
    """Base of classes that `put_before` puts in front of a module's own."""

    def __reduce_ex__(self, protocol):
        # The class is made on the fly, so it is pickled as the two that it was made from.
        return _rebuild, type(self).made_from, self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def put_before(mixin: type[Mixin], module: nn.Module) -> None:
    """Make the module's class a subclass of itself with `mixin` in front."""
    module.__class__ = _mixed(mixin, type(module))


def take_off(mixin: type[Mixin], module: nn.Module) -> None:
    """Undo `put_before`; nothing where it was not done."""
    if getattr(type(module), "made_from", (None,))[0] is mixin:
        module.__class__ = type(module).made_from[1]


@functools.cache
def _mixed(mixin: type[Mixin], cls: type) -> type:
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**same, "made_from": (mixin, cls)})


def _rebuild(mixin: type[Mixin], cls: type) -> nn.Module:
    new = _mixed(mixin, cls)
    return new.__new__(new)
