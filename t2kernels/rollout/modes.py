"""Run a model in eval mode, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def restored_mode(model: nn.Module) -> Iterator[None]:
    """Restore the mode (training or eval) of every module after the block, where it has changed."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            if module.training != training:
                module.training = training


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode. A model that is in eval mode already is not touched, so threads may share it."""
    if not any(module.training for module in model.modules()):
        yield
        return
    with restored_mode(model):
        model.eval()
        yield
