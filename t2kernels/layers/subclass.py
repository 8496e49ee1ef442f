"""Change one module by giving it a subclass of its own class.

The module keeps its class name, can be copied and pickled, and can be changed back. Replacing `module.forward` would
not do: a copied module would go on running the forward of the original.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Mixin:
    """Base of the classes that `install` puts in front of a module's own class."""

    made_from: tuple[type[Mixin], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time, so it is pickled as the two classes that it was made from.
        return _rebuild, type(self).made_from, self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def install(mixin: type[Mixin], module: nn.Module) -> None:
    """Replace the module's class by a subclass of it with `mixin` in front."""
    module.__class__ = _mixed(mixin, type(module))


def remove(mixin: type[Mixin], module: nn.Module) -> None:
    """Undo `install`. Does nothing to a module without the mixin."""
    found, cls = getattr(type(module), "made_from", (None, None))
    if found is mixin:
        module.__class__ = cls


@functools.cache
def _mixed(mixin: type[Mixin], cls: type[nn.Module]) -> type[Any]:
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**same, "made_from": (mixin, cls)})


def _rebuild(mixin: type[Mixin], cls: type[nn.Module]) -> nn.Module:
    new = _mixed(mixin, cls)
    return new.__new__(new)
