"""The strategies of `t2kernels.adapt` on the command line: --adapt, and the options that strategies registered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import InputError, MissingFileError
from t2kernels.adapt.strategy_registry import (
    Option,
    check_options,
    make_strategy,
    own_options,
    strategy_names,
    strategy_options,
)

from . import models

if TYPE_CHECKING:
    from t2kernels.adapt import Strategy

NAMES: str = ", ".join(strategy_names())
DEFAULT_EXPERTS: tuple[str, ...] = ("math", "code", "reason")
"""What the built-in model chooses from if no expert is given."""

AdaptOption: Any = typer.Option(
    None,
    help=f"Choose the expert of each prompt by a strategy: {NAMES} (docs/reference/adaptation.md).",
    show_default=False,
)

EACH: Any = None
"""Default of the parameter that `with_strategy_options` replaces."""


def with_strategy_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `strategy_options` of a verb by one option for each option that a strategy registered.

    The verb gets their values as one dict.
    """
    signature = inspect.signature(verb)
    added = [
        inspect.Parameter(o.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=_typer_option(o), annotation=o.type)
        for o in strategy_options()
    ]

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        verb(strategy_options={p.name: values.pop(p.name) for p in added}, **values)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += added if parameter.name == "strategy_options" else [parameter]
    # Typer reads both.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _typer_option(option: Option) -> Any:
    users = [name for name in strategy_names() if option.name in {o.name for o in strategy_options(name)}]
    by = " By path or name." if option.expert else ""
    text = f"{option.help}{by} For --adapt {', '.join(users)}."
    flags = [f"--{option.name}/--no-{option.name}"] if option.type is bool else []
    shown = option.default is not None and option.type is not bool
    return typer.Option(option.default, *flags, help=text, show_default=shown, **({"metavar": ""} if flags else {}))


def check(name: str, options: Mapping[str, Any]) -> None:
    """Check a strategy and its options before a model is loaded. Raises ValueError or FileNotFoundError."""
    try:
        given = own_options(name, options)
        for option in strategy_options(name):
            if option.required and given.get(option.name) is None:
                raise InputError(f"it needs --{option.name}: {option.help}")
        check_options(name, given)
    except (InputError, MissingFileError) as e:
        raise type(e)(f"--adapt {name}: {e}") from None


def strategy(
    name: str,
    loaded: models.Loaded,
    experts: Sequence[str],
    options: Mapping[str, Any],
    chat: bool | None = None,
    system: str | None = None,
) -> Strategy:
    """Make a strategy for a patched model, with the experts that it needs in the bank.

    experts: to choose from, by path or name; none: those that come with the built-in model
    options: of all strategies; each takes its own
    chat, system: as of `models.prompt_form`, for strategies that answer examples
    Raises ValueError before any forward.
    """
    if not experts and not loaded.is_tiny:
        raise InputError(f"--adapt {name} needs experts to choose from: give each with --expert")
    bank = loaded.model.t2_bank
    found = [models.add_expert(bank, expert, loaded.name) for expert in experts or DEFAULT_EXPERTS]
    given = own_options(name, options)
    for option in strategy_options(name):
        if option.expert:
            given[option.name] = models.add_expert(bank, given[option.name], loaded.name)
    names = [expert for expert in found if expert is not None]
    form = None if loaded.is_tiny else models.prompt_form(loaded, chat, system, names, quiet=True)
    return make_strategy(name, loaded.model, loaded.tokenizer, names, tiny=loaded.is_tiny, form=form, **given)
