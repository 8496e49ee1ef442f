"""`DeltaForward`: the class that a dense layer gets in delta form, so that a group's change is added in one call.

The forward of q computes the products of q, k and v and adds the three changes in one op; the forwards of k and v find
their outputs ready. A hook on each could not do that: a hook comes after a product that has been made.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import subclass
from .subclass import Mixin


class DeltaForward(Mixin):
    """Mixed into the class of a dense layer whose child "svf" adds the change of each token's expert."""

    _modules: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """y = x Wᵀ by the layer's own class, plus the change."""
        svf = self._modules.get("svf")
        route = None if svf is None else svf.routing.active  # None: a copy of the class that outlived its child
        if route is None:
            return super().forward(x, *args, **kwargs)
        if not args and not kwargs and (y := svf.together(x, route)) is not None:
            return y
        return svf.add_to(super().forward(x, *args, **kwargs), x)


def install(module: nn.Module) -> bool:
    """Give a dense layer the class. False, with nothing done, if its forward is not the one of its class."""
    if "forward" in vars(module):
        return False
    subclass.install(DeltaForward, module)
    return True


def remove(module: nn.Module) -> None:
    """Undo `install`."""
    for name in ("forward", "_old_forward"):  # accelerate kept the bound forward of a layer that it dispatched
        kept = vars(module).get(name)
        if getattr(kept, "__func__", None) is DeltaForward.forward:
            setattr(module, name, dense_class(module).forward.__get__(module))
    subclass.remove(DeltaForward, module)


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The class that a dense layer had before `install`."""
    mixin, cls = getattr(type(module), "made_from", (None, None))
    return cast("type[nn.Module]", cls) if mixin is DeltaForward else type(module)


def dense(module: Any, x: Tensor) -> Tensor:
    """x Wᵀ of a dense layer, without its change and without hooks."""
    return dense_class(module).forward(module, x)


def makes_new(module: nn.Module) -> bool:
    """True if the output of a layer's own forward is a tensor that nobody else holds."""
    return dense_class(module) in (nn.Linear, Conv1D)


def plain_parameters(module: nn.Module) -> dict[str, Any]:
    """{"weight": ..., "bias": ...} of a layer that computes `linear(x, weight, bias)`, as it holds them; else {}."""
    held: dict[str, Any] = module._parameters
    return held if dense_class(module) is nn.Linear and {"weight", "bias"} <= held.keys() else {}
