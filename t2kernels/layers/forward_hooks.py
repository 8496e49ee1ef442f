"""Forward hooks found by their function. This file is the only one that touches torch's private dictionaries of hooks.

A handle of `register_forward_hook` is lost when a module is copied; the function stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a forward hook or forward pre-hook from a module. Does nothing if it is not there."""
    for hooks, *extras in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [k for k, h in hooks.items() if h is hook]:
            for d in (hooks, *extras):
                d.pop(key, None)


def has_other_hooks(module: nn.Module, own: Callable[..., Any] | None = None) -> bool:
    """True if a module has a forward hook or forward pre-hook besides `own`."""
    return bool(module._forward_pre_hooks) or any(h is not own for h in module._forward_hooks.values())
