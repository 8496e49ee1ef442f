"""What a patched transformers model does differently: it takes `expert_ids` (and `experts`), and hands them to its layers.

Hooks carry the ids into a forward; a subclass of the model's own class, with the same name, lets `generate` pass them on. The model's
`forward` is never replaced: a copied model would go on running the original's, and trainers that replace it themselves would lose the ids.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from t2kernels.layers.active import Route, Routing
from t2kernels.layers.subclass import Mixin, put_before, take_off

logger = logging.get_logger(__name__)


class PatchedModel(Mixin):
    """Mixed into the class of a patched transformers model."""

    def generate(self, *args, experts=None, expert_ids=None, **kwargs):
        """`generate` of transformers, with a row of the batch per expert.

        experts: one name, mixture {name: weight} or None (base model) for all prompts, a list with one for each, or a strategy of
            `t2kernels.adapt`, which chooses one for each prompt first
        expert_ids: the same as a tensor, 0-dim or [B] (`bank.ids`)
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
                "one expert a token is for forward; generate takes one for all prompts or a list with one for each"
            )
        # The route around the whole call serves what runs outside the routed forward (an encoder); there rows are not yet expanded to beams.
        with bank.routing.use(Route(ids)):
            if ids.dim() == 1:
                kwargs["expert_ids"] = ids
            return super().generate(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Saves the base model, dense, as it was before `patch_model`. Experts are saved by `bank.save(folder)`."""
        if len(self.t2_bank):
            logger.warning_once(
                "save_pretrained writes the base model; the experts of its bank are saved with bank.save(folder)"
            )
        return super().save_pretrained(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        return super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "expert_ids"})

    def _get_candidate_generator(self, *args, **kwargs):
        # A draft model has rows of its own, or none: it proposes as its base model, and what is accepted is this model's choice.
        if kwargs.get("assistant_model") is not None and "model_kwargs" in kwargs:
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k != "expert_ids"}
        return super()._get_candidate_generator(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, *args, **kwargs):
        if enable:
            gradient_checkpointing_func = checkpoint_with_route(gradient_checkpointing_func, self.t2_bank.routing)
        return super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)


def dress(model: nn.Module, bank) -> None:
    """Give a model its hooks and, where it is a transformers model, its class."""
    for module in _entrances(model):
        module.t2_bank = bank
        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)
    if hasattr(model, "_validate_model_kwargs"):
        put_before(PatchedModel, model)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint_with_route(
                module._gradient_checkpointing_func, bank.routing
            )


def undress(model: nn.Module) -> None:
    """Undo `dress`."""
    for module in _entrances(model):
        del module.t2_bank
        remove_hook(module, _enter)
        remove_hook(module, _leave)
    take_off(PatchedModel, model)
    for module in model.modules():
        func = getattr(module, "_gradient_checkpointing_func", None)
        if (
            isinstance(func, functools.partial)
            and getattr(func.keywords.get("context_fn"), "__self__", None).__class__ is Routing
        ):
            module._gradient_checkpointing_func = functools.partial(
                func.func, *func.args, **{**func.keywords, "context_fn": _no_contexts}
            )


def remove_hook(module: nn.Module, hook: Callable) -> None:
    """Take a forward (pre-)hook off a module by the function itself, which survives copying, unlike its handle."""
    for hooks, *extras in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [k for k, h in hooks.items() if h is hook]:
            for d in (hooks, *extras):
                d.pop(key, None)


def checkpoint_with_route(func: Callable, routing: Routing) -> Callable:
    """A checkpoint function whose recomputation runs with the experts of its forward.

    Without it a backward pass that comes after the forward's experts are no longer active recomputes with others: wrong gradients, silently.
    """
    keywords = func.keywords if isinstance(func, functools.partial) else {}
    if (func.func if isinstance(func, functools.partial) else func) is not checkpoint:
        raise ValueError(f"gradient checkpointing through {func} cannot carry experts; use torch.utils.checkpoint")
    if keywords.get("use_reentrant", False):
        raise ValueError(
            "reentrant gradient checkpointing cannot carry experts into its recomputation: gradients would be wrong; "
            "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if keywords.get("context_fn", _no_contexts) is not _no_contexts:
        raise ValueError("gradient checkpointing already has a context_fn; experts need it")
    return functools.partial(func, use_reentrant=False, context_fn=routing.checkpoint_contexts)


def _no_contexts():
    return contextlib.nullcontext(), contextlib.nullcontext()


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The model, and its backbone, which some trainers call directly; its **kwargs would swallow expert_ids without a word."""
    backbone = getattr(model, "base_model", None)
    return [model] if backbone is None or backbone is model else [model, backbone]


def _enter(module: nn.Module, args: tuple, kwargs: dict):
    bank = module.t2_bank
    routing = bank.routing
    routing.push(routing.active)  # first of all, so that `_leave`, which is always called, finds what it takes away
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
            "wanted one id for all (0-dim), one a sequence [B], or one a token [B, S]"
        )
    routing.pop()
    routing.push(Route(ids, tokens))
    return args, kwargs


def _leave(module: nn.Module, args: tuple, output) -> None:
    module.t2_bank.routing.pop()


def _input_ids(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The prompts that `generate` was given, under whichever of its names."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None):
        if isinstance(x, torch.Tensor):
            return x
    return None


def _tokens(args: tuple, kwargs: dict) -> tuple[int, int] | None:
    """(B, S) of a forward's text input, where it can be seen."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(x, torch.Tensor) and x.dim() >= 2:
            return x.shape[0], x.shape[1]
    return None
