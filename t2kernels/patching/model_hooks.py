"""What a patched transformers model does differently: it takes `expert_ids` (and `experts`), and hands them to its layers.

Hooks carry the ids into a forward; a subclass of the model's own class, with the same name, lets `generate` pass them on. The model's
`forward` is never replaced: a copied model would go on running the original's, and trainers that replace it themselves would lose the ids.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import logging

from t2kernels.layers.active import Route
from t2kernels.layers.subclass import Mixin, put_before, take_off

logger = logging.get_logger(__name__)


class _Unset:
    """The type of `UNSET`, which stands where None means the base model."""

    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


class _Generate:
    """`model.generate`, bound to the scope that it was looked up in.

    A streamer needs `Thread(target=model.generate, ...)`: the attribute is read inside `with bank.use("math")`, and the call runs in a thread that has no
    scope. The lookup therefore remembers the scope's route for calls from other threads.
    """

    def __get__(self, model, owner=None):
        if model is None:
            return _generate
        bound = types.MethodType(_generate, model)
        scope = model.t2_bank.routing.scopes.visible()
        if scope is None:
            return bound
        thread, route = threading.get_ident(), scope.route

        @functools.wraps(_generate)
        def generate(*args, **kwargs):
            if threading.get_ident() == thread:
                return bound(*args, **kwargs)
            with model.t2_bank.routing.hold(route):
                return bound(*args, **kwargs)

        return generate


def _generate(model, *args, experts=UNSET, expert_ids=None, **kwargs):
    """`generate` of transformers, with a row of the batch per expert.

    experts: one name, mixture {name: weight} or None (base model) for all prompts, a list with one for each, or a strategy of
        `t2kernels.adapt`, which chooses one for each prompt first. Left out: the experts of the scope (`bank.use`), or `bank.default`
    expert_ids: the same as a tensor, 0-dim or [B] (`bank.ids`)
    """
    bank, plain = model.t2_bank, super(PatchedModel, model).generate
    try:
        if experts is not UNSET and expert_ids is not None:
            raise ValueError("give experts or expert_ids, not both")
        if expert_ids is not None:
            ids = bank.check_ids(expert_ids)
        else:
            if hasattr(experts, "choose_for"):
                experts = experts.choose_for(model, _input_ids(args, kwargs), kwargs.get("attention_mask"))
            ids = None if experts is UNSET or experts is None else bank.ids(experts)
        route = bank.routing.asked_for() if experts is UNSET else None
        if ids is not None:
            if ids.dim() == 2:
                raise ValueError(
                    "one expert a token is for forward; generate takes one for all prompts or a list with one for each"
                )
            route = Route(ids, row=bank.row_of(ids))
            if ids.dim() == 1:
                kwargs["expert_ids"] = ids
    except BaseException:
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()  # its reader waits in another thread, and would wait for ever
        raise
    # The scope around the whole call serves layers outside the decoder's forward (an encoder), where rows are not yet expanded to beams.
    with bank.routing.hold(route):
        return plain(*args, **kwargs)


class PatchedModel(Mixin):
    """Mixed into the class of a patched transformers model."""

    generate = _Generate()

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


def dress(model: nn.Module, bank) -> None:
    """Give a model its hooks and, where it is a transformers model, its class."""
    for module in _entrances(model):
        module.t2_bank = bank
        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)
    if hasattr(model, "_validate_model_kwargs"):
        put_before(PatchedModel, model)


def undress(model: nn.Module) -> None:
    """Undo `dress`."""
    for module in _entrances(model):
        del module.t2_bank
        remove_hook(module, _enter)
        remove_hook(module, _leave)
    take_off(PatchedModel, model)


def remove_hook(module: nn.Module, hook: Callable) -> None:
    """Take a forward (pre-)hook off a module by the function itself, which survives copying, unlike its handle."""
    for hooks, *extras in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [k for k, h in hooks.items() if h is hook]:
            for d in (hooks, *extras):
                d.pop(key, None)


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The model, and its backbone, which some trainers call directly; its **kwargs would swallow expert_ids without a word."""
    backbone = getattr(model, "base_model", None)
    return [model] if backbone is None or backbone is model else [model, backbone]


def _enter(module: nn.Module, args: tuple, kwargs: dict):
    bank = module.t2_bank
    entrance = bank.routing.enter(
        module
    )  # first of all, so that `_leave`, which is always called, finds what it takes away
    ids, names = kwargs.pop("expert_ids", None), kwargs.pop("experts", UNSET)
    if ids is not None and names is not UNSET:
        raise ValueError("give experts or expert_ids, not both")
    if ids is not None:
        ids = bank.check_ids(ids)
    elif names is UNSET:
        route = bank.routing.inherited()
        ids = None if route is None else route.ids
    elif names is not None:
        ids = bank.ids(names)
    if ids is None:
        return args, kwargs
    tokens = _tokens(args, kwargs)
    if tokens is not None and ids.shape != torch.Size(tokens)[: ids.dim()]:
        raise ValueError(
            f"expert_ids has shape {list(ids.shape)}, the batch has {tokens[0]} sequences of {tokens[1]} tokens; "
            "wanted one id for all (0-dim), one a sequence [B], or one a token [B, S]"
        )
    entrance.route = Route(ids, tokens, bank.row_of(ids))
    return args, kwargs


def _leave(module: nn.Module, args: tuple, output) -> None:
    module.t2_bank.routing.leave(module, output)


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
