"""A patched transformers model takes `expert_ids` (and `experts`) and passes them to its layers.

Hooks carry the ids into a forward. A subclass of the model's own class, with the same name, lets `generate` pass them
on. The model's `forward` is never replaced: a copied model would go on running the forward of the original, and
trainers that replace it themselves would lose the ids.
"""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.layers import subclass
from t2kernels.layers.dense import head
from t2kernels.layers.dense.link import Link
from t2kernels.layers.forward_hooks import check_hooks, remove_hook
from t2kernels.layers.private import require
from t2kernels.layers.routing.recompute import check_torch
from t2kernels.layers.routing.route import Route
from t2kernels.layers.subclass import Mixin

from .forgotten import watch

logger: Any = logging.get_logger(__name__)

# The private methods of transformers that `PatchedModel` overrides: why, and the parameters that they must have.
# `install` refuses a version without them: under another name or with other parameters they would run unchanged, and
# experts would be lost without an error.
OVERRIDDEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "_validate_model_kwargs": (
        "generate refuses arguments that it does not know; expert_ids is known",
        ("model_kwargs",),
    ),
    "_get_candidate_generator": (
        "a draft model must not get the rows of this model",
        ("assistant_model", "model_kwargs"),
    ),
}


GUIDANCE = (
    ". generate runs this forward by itself; for guidance_scale, give as many negative prompts as prompts, or one "
    "expert for all"
)


class _Unset:
    """The type of `UNSET`, which stands for an argument that was left out where None means the base model."""

    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


class _Generate:
    """`model.generate`, bound to the scope in which the attribute was read.

    A streamer needs `Thread(target=model.generate, ...)`. The attribute is read inside `with bank.use("math")`, but the
    call runs in a thread without a scope. So the bound method remembers the scope's route for calls from other threads.
    """

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return _generate
        bound = types.MethodType(_generate, model)
        scope = model.t2_bank.routing.scopes.visible()
        if scope is None:
            return bound
        thread, route = threading.get_ident(), scope.route

        @functools.wraps(_generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                return bound(*args, **kwargs)
            with model.t2_bank.routing.hold(route):
                return bound(*args, **kwargs)

        return generate


def _generate(
    model: Any, *args: Any, experts: Any = UNSET, expert_ids: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """`generate` of transformers, with one expert for each row of the batch.

    experts: one name, a mixture {name: weight} or None (base model) for all prompts; a list with one for each; or a
        strategy of `t2kernels.adapt`, which first chooses one for each prompt. Left out: the experts of the scope
        (`bank.use`), or `bank.default`
    expert_ids: the same as a tensor, 0-dim or [B] (`bank.ids`)
    Raises ValueError if both are given, or for one expert per token; KeyError for an unknown name.
    """
    bank, plain = model.t2_bank, super(PatchedModel, model).generate
    try:
        route = _route_of(model, args, kwargs, experts, expert_ids)
    except BaseException:
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()  # its reader waits in another thread and would wait for ever
        raise
    if route is not None and route.ids.dim() == 1 and (experts is not UNSET or expert_ids is not None):
        kwargs["expert_ids"] = route.ids
    # The scope around the whole call is for what runs outside a hooked forward: the encoder of an encoder-decoder.
    # There the rows are not yet expanded to beams.
    with bank.routing.hold(route):
        return plain(*args, **kwargs)


def _route_of(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], experts: Any, expert_ids: torch.Tensor | None
) -> Route | None:
    bank = model.t2_bank
    if expert_ids is None and experts is UNSET:
        return bank.routing.asked_for()
    if expert_ids is not None and experts is not UNSET:
        raise InputError("give experts or expert_ids, not both")
    if hasattr(experts, "choose_for"):
        experts = experts.choose_for(model, _input_ids(args, kwargs), kwargs.get("attention_mask"))
    if expert_ids is None and experts is None:
        return None
    ids = bank.ids(experts) if expert_ids is None else bank.check_ids(expert_ids)
    if ids.dim() == 2:
        raise InputError(
            "generate takes one expert for all prompts, or a list with one for each; one expert a token is for forward"
        )
    return Route(ids, repeats=True)


class PatchedModel(Mixin):
    """Mixed into the class of a patched transformers model."""

    t2_bank: ExpertBank  # imported at run time: transformers evaluates the annotations of its models
    generate: _Generate = _Generate()

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


def check(root: nn.Module) -> None:
    """Raise UnsupportedVersionError if torch or transformers lack a private name that a patched model needs."""
    check_torch()
    check_hooks(root)
    if isinstance(root, transformers.GenerationMixin):
        for name, (reason, parameters) in OVERRIDDEN.items():
            require(type(root), name, reason, parameters, transformers)


def install(model: nn.Module, root: nn.Module, bank: ExpertBank) -> None:
    """Give a model its hooks and, if it is a transformers model that generates, the subclass of its class.

    model: as the user holds it; root: the same, or the model inside PEFT's wrapper
    """
    found = _entrances(root) if model is root else [*_entrances(root), model]
    bank.entrances = tuple(Link(module) for module in found)
    for module in found:
        module.t2_bank = bank
        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)
    head.install(root)
    if isinstance(root, transformers.GenerationMixin):
        subclass.install(PatchedModel, root)


def remove(root: nn.Module, bank: ExpertBank) -> None:
    """Undo `install`. Does nothing to a model without hooks."""
    for module in filter(None, (link() for link in bank.entrances)):
        if "t2_bank" in vars(module):
            del module.t2_bank
        remove_hook(module, _enter)
        remove_hook(module, _leave)
    head.remove(root)
    subclass.remove(PatchedModel, root)


def _entrances(model: nn.Module) -> list[Any]:
    """The model and its backbone.

    Some trainers call the backbone directly. It accepts **kwargs and would silently ignore expert_ids, so it is hooked
    as well.
    """
    backbone = getattr(model, "base_model", None)
    return [model] if backbone is None or backbone is model else [model, backbone]


def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    bank = module.t2_bank
    entrance = bank.routing.enter(module)  # first of all: `_leave` is always called and ends it
    ids, names, repeats = kwargs.pop("expert_ids", None), kwargs.pop("experts", UNSET), False
    if ids is not None and names is not UNSET:
        raise InputError("give experts or expert_ids, not both")
    if ids is not None:
        ids = bank.check_ids(ids)
    elif names is UNSET:
        route = bank.routing.inherited()
        if route is not None:
            ids, repeats, B = route.ids, route.repeats, _sequences(args, kwargs)
            if repeats and B and ids.dim() == 1 and B % len(ids) == 0:
                ids = ids.repeat_interleave(B // len(ids))
    elif names is not None:
        ids = _ids_of(bank, names)
    if ids is None:
        return args, kwargs
    tokens = _tokens(args, kwargs)
    if tokens is not None and ids.shape != torch.Size(tokens)[: ids.dim()]:
        raise InputError(
            f"expert_ids has shape {list(ids.shape)}, the batch has {tokens[0]} sequences of {tokens[1]} tokens; "
            f"pass one id (0-dim), one per sequence [B], or one per token [B, S]{GUIDANCE if repeats else ''}"
        )
    entrance.route = Route(ids, tokens)
    return args, kwargs


@torch.compiler.disable  # a finalizer gives the rows back, and dynamo fails over the registry of these
def _ids_of(bank: ExpertBank, names: Any) -> torch.Tensor:
    return bank.ids(names)


def _leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
    routing = module.t2_bank.routing
    if routing.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        watch(module, routing.active is None, output)
    routing.leave(module, output)


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The prompts that were passed to `generate`, under any of its names for them."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None):
        if isinstance(x, torch.Tensor):
            return x
    return None


def _sequences(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """B of a forward's text input; None if it has none."""
    tokens = _tokens(args, kwargs)
    return None if tokens is None else tokens[0]


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(B, S) of a forward's text input; None if it has none."""
    for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(x, torch.Tensor) and x.dim() >= 2:
            return x.shape[0], x.shape[1]
    return None
