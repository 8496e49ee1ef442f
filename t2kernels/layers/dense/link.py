"""`Link`: a reference from a layer to a module that holds it. It keeps nothing alive and follows copies."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn


class Link:
    """A weak reference to a module.

    A strong one would close a circle (module, layer, module), and a deleted model would keep its memory until the
    garbage collector runs. A plain weak reference can be neither copied nor pickled.

    In a copy of the model the link points to the copied module. In a copy of the layer alone it points to nothing.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._reference = None if module is None else weakref.ref(module)

    def __call__(self) -> Any:
        """The module, or None if it is gone."""
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        # Copied here if it is not yet: a group of layers reaches a layer before its module is copied.
        return Link(copy.deepcopy(self(), memo))

    def __copy__(self) -> Link:
        return Link(self())

    def __reduce__(self) -> tuple[Any, ...]:
        return Link, (self(),)
