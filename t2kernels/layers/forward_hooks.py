"""Forward hooks found by their function. This file is the only one that touches torch's private dictionaries of hooks.

A handle of `register_forward_hook` is lost when a module is copied; the function stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .private import require

FORWARD: tuple[str, ...] = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
BEFORE: tuple[str, ...] = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
# Methods of every module that layers override: with other names, a cast would round their tables, and a checkpoint
# would lack the base model's weights.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_apply": ("fn", "recurse"),
    "_save_to_state_dict": ("destination", "prefix", "keep_vars"),
    "_load_from_state_dict": ("state_dict", "prefix", "strict", "missing_keys", "error_msgs"),
}


def check_hooks(module: nn.Module) -> None:
    """Raise UnsupportedVersionError if torch's modules lack a private name that hooks or layers need."""
    for name in (*FORWARD, *BEFORE):
        require(module, name, "a hook is found and removed there")
    for name, parameters in OVERRIDDEN.items():
        require(nn.Module, name, "the layers of a patched model override it", parameters)


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a forward hook or forward pre-hook from a module. Does nothing if it is not there."""
    for names in (FORWARD, BEFORE):
        hooks, *extras = (getattr(module, name) for name in names)
        for key in [k for k, h in hooks.items() if h is hook]:
            for d in (hooks, *extras):
                d.pop(key, None)


def foreign_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """The forward hooks and forward pre-hooks of a module that are not of this library."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return tuple(h for h in hooks if not (getattr(h, "__module__", None) or "").startswith("t2kernels."))


def has_other_hooks(module: nn.Module, own: Callable[..., Any] | None = None) -> bool:
    """True if a module has a forward hook or forward pre-hook besides `own`."""
    return bool(module._forward_pre_hooks) or any(h is not own for h in module._forward_hooks.values())
