"""Warnings for two steps that training with another trainer than `SVFTrainer` needs, where one was forgotten.

Neither mistake fails by itself: the loss is logged, and falls or not. They show when a backward pass reaches a forward
of the model while an expert is in training.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from t2kernels.experts.bank import ExpertBank

logger: logging.Logger = logging.getLogger(__name__)

_warned: weakref.WeakKeyDictionary[ExpertBank, set[str]] = weakref.WeakKeyDictionary()


def watch(model: Any, as_base: bool, output: object) -> None:
    """Warn, once for each bank, when backward reaches a forward of the base model, or base weights that train.

    model: patched, with experts in training; output: of its forward; as_base: whether the forward had no experts
    """
    bank = model.t2_bank
    if len(_warned.get(bank, ())) == 2:
        return
    nodes = [t.grad_fn for t in _outputs(output) if t.grad_fn is not None]
    if nodes:
        nodes[0].register_prehook(lambda grads: _reached(model, bank, as_base))


def _reached(model: nn.Module, bank: ExpertBank, as_base: bool) -> None:
    names = bank.in_training
    if not names:
        return
    warned = _warned.setdefault(bank, set())
    if as_base and "use" not in warned:
        warned.add("use")
        logger.warning(
            "a backward pass reached a forward of the base model, while %s is in training: such a forward gives it no "
            "gradient. Run the training inside `with bank.use(%r):`, or pass experts= to the model",
            " and ".join(map(repr, names)),
            names[0],
        )
    if "freeze" in warned:
        return
    own = {id(p) for name in names for p in bank.trained_parameters(name).values()}
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    warned.add("freeze")  # looked at once
    if others:
        logger.warning(
            "%d numbers beside the experts in training require gradients, so the base model trains as well; if that is "
            "not wanted, call model.requires_grad_(False) before bank.start_training",
            others,
        )


def _outputs(output: object) -> list[Tensor]:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return [value for value in values if isinstance(value, Tensor)]
