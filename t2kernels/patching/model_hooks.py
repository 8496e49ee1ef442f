"""A patched transformers model takes `expert_ids` (and `experts`) and passes them to its layers.

Hooks carry the ids into a forward. A subclass of the model's own class, with the same name, lets `generate` pass them
on. The model's `forward` is never replaced: a copied model would go on running the forward of the original, and
trainers that replace it themselves would lose the ids.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from t2kernels.experts.bank import ExpertBank
from t2kernels.layers import subclass
from t2kernels.layers.active import Route, Routing
from t2kernels.layers.hooks import remove_hook
from t2kernels.layers.subclass import Mixin

logger: Any = logging.get_logger(__name__)

# The private methods of transformers that `PatchedModel` overrides, and why. `install` refuses a version without them:
# under another name they would run unchanged, and experts would be lost without an error.
OVERRIDDEN: dict[str, str] = {
    "_validate_model_kwargs": "generate refuses arguments that it does not know; expert_ids is known",
    "_get_candidate_generator": "a draft model must not get the rows of this model",
    "_set_gradient_checkpointing": "the recomputation must use the experts of its forward",
}


class PatchedModel(Mixin):
    """Mixed into the class of a patched transformers model."""

    t2_bank: ExpertBank  # imported at run time: transformers evaluates the annotations of its models

    def generate(self, *args: Any, experts: Any = None, expert_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`generate` of transformers, with one expert for each row of the batch.

        experts: one name, a mixture {name: weight} or None (base model) for all prompts; a list with one for each; or a
            strategy of `t2kernels.adapt`, which first chooses one for each prompt
        expert_ids: the same as a tensor, 0-dim or [B] (`bank.ids`)
        Raises ValueError if both are given, or for one expert per token; KeyError for an unknown name.
        """
        bank = self.t2_bank
        if experts is not None and expert_ids is not None:
            raise ValueError("give experts or expert_ids, not both")
        if expert_ids is not None:
            ids = bank.check_ids(expert_ids)
        elif experts is not None:
            if hasattr(experts, "choose_for"):
                experts = experts.choose_for(self, _input_ids(args, kwargs), kwargs.get("attention_mask"))
            ids = bank.ids(experts)
        else:
            return super().generate(*args, **kwargs)
        if ids.dim() == 2:
            raise ValueError(
                "generate takes one expert for all prompts, or a list with one for each; "
                "one expert a token is for forward"
            )
        # The route around the whole call is for what runs outside a hooked forward: the encoder of an encoder-decoder.
        # There the rows are not yet expanded to beams.
        with bank.routing.use(Route(ids)):
            if ids.dim() == 1:
                kwargs["expert_ids"] = ids
            return super().generate(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the base model, dense, as it was before `patch_model`. `bank.save(folder)` saves the experts."""
        if len(self.t2_bank):
            logger.warning_once(
                "save_pretrained writes the base model; the experts of its bank are saved with bank.save(folder)"
            )
        return super().save_pretrained(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> Any:
        return super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "expert_ids"})

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # The draft model proposes as its own base model; this model decides which proposals it accepts.
        if kwargs.get("assistant_model") is not None and "model_kwargs" in kwargs:
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k != "expert_ids"}
        return super()._get_candidate_generator(*args, **kwargs)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if enable:
            gradient_checkpointing_func = checkpoint_with_route(gradient_checkpointing_func, self.t2_bank.routing)
        return super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)


def install(model: nn.Module, bank: ExpertBank) -> None:
    """Give a model its hooks and, if it is a transformers model that generates, the subclass of its class.

    Raises ValueError for gradient checkpointing that cannot carry experts, RuntimeError for an unknown transformers.
    """
    generates = isinstance(model, transformers.GenerationMixin)
    missing = [name for name in OVERRIDDEN if not hasattr(model, name)]
    if missing and generates and isinstance(model, transformers.PreTrainedModel):
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {' and no '.join(missing)} ({OVERRIDDEN[missing[0]]}); "
            "use a version that t2kernels supports (pyproject.toml)"
        )
    routed: dict[Any, Callable[..., Any]] = {
        module: checkpoint_with_route(module._gradient_checkpointing_func, bank.routing)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    }
    for module, function in routed.items():
        module._gradient_checkpointing_func = function
    for module in _entrances(model):
        module.t2_bank = bank
        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)
    if generates:
        subclass.install(PatchedModel, model)


def remove(model: nn.Module) -> None:
    """Undo `install`. Does nothing to a model without hooks."""
    for module in _entrances(model):
        if hasattr(module, "t2_bank"):
            del module.t2_bank
        remove_hook(module, _enter)
        remove_hook(module, _leave)
    subclass.remove(PatchedModel, model)
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial):
            contexts = function.keywords.get("context_fn")
            if isinstance(getattr(contexts, "__self__", None), Routing):
                keywords = {**function.keywords, "context_fn": _no_contexts}
                module._gradient_checkpointing_func = functools.partial(function.func, *function.args, **keywords)


def checkpoint_with_route(func: Callable[..., Any], routing: Routing) -> Callable[..., Any]:
    """A checkpoint function whose recomputation uses the experts of its forward.

    Without it, a backward that runs after the forward's experts are no longer active recomputes with other experts: the
    gradients are wrong, without an error.
    func: `torch.utils.checkpoint.checkpoint`, or a partial of it
    Raises ValueError for another function, for reentrant checkpointing and for one that has a context_fn.
    """
    keywords = func.keywords if isinstance(func, functools.partial) else {}
    if (func.func if isinstance(func, functools.partial) else func) is not checkpoint:
        raise ValueError(f"gradient checkpointing through {func} cannot carry experts; use torch.utils.checkpoint")
    if keywords.get("use_reentrant", False):
        raise ValueError(
            "reentrant gradient checkpointing cannot carry experts into its recomputation, so gradients would be "
            "wrong; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if keywords.get("context_fn", _no_contexts) is not _no_contexts:
        raise ValueError("gradient checkpointing already has a context_fn, which experts need; remove it")
    return functools.partial(func, use_reentrant=False, context_fn=routing.checkpoint_contexts)


def _no_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _entrances(model: nn.Module) -> list[Any]:
    """The model and its backbone.

    Some trainers call the backbone directly. It accepts **kwargs and would silently ignore expert_ids, so it is hooked
    as well.
    """
    backbone = getattr(model, "base_model", None)
    return [model] if backbone is None or backbone is model else [model, backbone]


def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    bank = module.t2_bank
    routing = bank.routing
    routing.push(routing.active)  # first of all: `_leave` is always called and pops it
    ids, names = kwargs.pop("expert_ids", None), kwargs.pop("experts", None)
    if names is not None:
        if ids is not None:
            raise ValueError("give experts or expert_ids, not both")
        ids = bank.ids(names)
    route = routing.active
    if ids is None and route is None:
        return args, kwargs
    tokens = _tokens(args, kwargs)
    ids = route.ids if ids is None else bank.check_ids(ids)
    if tokens is not None and ids.shape != torch.Size(tokens)[: ids.dim()]:
        raise ValueError(
            f"expert_ids has shape {list(ids.shape)}, the batch has {tokens[0]} sequences of {tokens[1]} tokens; "
            "pass one id (0-dim), one per sequence [B], or one per token [B, S]"
        )
    routing.pop()
    routing.push(Route(ids, tokens))
    return args, kwargs


def _leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
    module.t2_bank.routing.pop()


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The prompts that were passed to `generate`, under any of its names for them."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None):
        if isinstance(x, torch.Tensor):
            return x
    return None


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(B, S) of a forward's text input; None if it has none."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(x, torch.Tensor) and x.dim() >= 2:
            return x.shape[0], x.shape[1]
    return None
