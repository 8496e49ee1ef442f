"""Run a model in eval mode, or frozen, and leave it as it was. Several threads may do the first with one model."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

_lock = threading.Lock()
_running: weakref.WeakKeyDictionary[nn.Module, _Run] = weakref.WeakKeyDictionary()


class _Run:
    """The blocks of `eval_mode` that run now on one model.

    count: how many; before: {module: its mode before the first of them}
    """

    def __init__(self, before: dict[nn.Module, bool]) -> None:
        self.count = 0
        self.before = before


@contextlib.contextmanager
def restored_mode(model: nn.Module) -> Iterator[None]:
    """Restore the mode (training or eval) of every module after the block, where it has changed."""
    before = _modes(model)
    try:
        yield
    finally:
        _restore(before)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode. A model that is in eval mode already is not touched.

    Where several threads do so at once, the last one restores the modes: none of them leaves eval mode before its end.
    """
    with _lock:
        if model not in _running and not any(module.training for module in model.modules()):
            run = None
        else:
            run = _running.setdefault(model, _Run({}))
            run.before = run.before or _modes(model)
            run.count += 1
            model.eval()
    try:
        yield
    finally:
        if run is not None:
            with _lock:
                run.count -= 1
                if not run.count:
                    del _running[model]
                    _restore(run.before)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every weight. After the block requires_grad, the modes and gradient checkpointing are as before."""
    grads = {p: p.requires_grad for p in model.parameters()}
    checkpointing = recomputes_activations(model)
    model.requires_grad_(False)
    try:
        with restored_mode(model):
            yield
    finally:
        for p, grad in grads.items():
            p.requires_grad_(grad)
        if recomputes_activations(model) and not checkpointing:
            # transformers 5.23 renamed it.
            stop: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            stop()


def recomputes_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in a module."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _restore(before: dict[nn.Module, bool]) -> None:
    for module, training in before.items():
        if module.training != training:
            module.training = training
