"""The registry of strategies: a name, how the strategy is made, and its options.

A new strategy is one file with a maker, and one `register_strategy` for it. Its options then are options of the command
line, and it can be the `--route` of the server. This file imports no torch, so that help texts do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2kernels import InputError, MissingFileError
from t2kernels.experts.names import CLASSIFIER

if TYPE_CHECKING:
    from torch import nn

    from t2kernels.rollout.chat import PromptForm

    from .strategy import Strategy


@dataclass(frozen=True)
class Option:
    """An option of a strategy.

    name: the keyword of the maker, and the option of the command line
    type: str, float, int, bool or Path; a Path must be a file
    default: its value if it is not given; help: one sentence for the command line
    required: True if there is no default
    expert: True if the value names an expert of the bank
    """

    name: str
    type: type
    default: Any
    help: str
    required: bool = False
    expert: bool = False


@dataclass(frozen=True)
class _Registered:
    make: Callable[..., Strategy] | str
    options: tuple[Option, ...]


_STRATEGIES: dict[str, _Registered] = {}


def register_strategy(name: str, make: Callable[..., Strategy] | str, *options: Option) -> None:
    """Make a strategy known under a name. A name that is known already gets the new strategy.

    make: make(model, tokenizer, experts, *, tiny, **options) -> Strategy, or "module:function", imported at first use.
        It gets what `make_strategy` got, with every option, and must raise before any forward. With a parameter `form`
        it gets that too.
    options: two strategies may share an option, of the same name
    """
    _STRATEGIES[name] = _Registered(make, options)


def strategy_names() -> list[str]:
    """The names of all registered strategies."""
    return list(_STRATEGIES)


def strategy_options(name: str | None = None) -> list[Option]:
    """The options of a strategy; None: of all strategies, each name once. Raises ValueError for an unknown name."""
    chosen = _STRATEGIES.values() if name is None else [_registered(name)]
    return list({option.name: option for one in chosen for option in one.options}.values())


def own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that a strategy has. Raises ValueError for an unknown strategy."""
    return {option.name: options[option.name] for option in strategy_options(name) if option.name in options}


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option of a strategy, defaults included. It imports no strategy.

    Raises ValueError for an unknown strategy or option and for a missing option, FileNotFoundError for a missing file.
    """
    known = {option.name: option for option in strategy_options(name)}
    for given in options:
        if given not in known:
            raise InputError(f"strategy {name!r} has no option {given!r}; it has {', '.join(known) or 'none'}")
    values = {option.name: options.get(option.name, option.default) for option in known.values()}
    for key, value in values.items():
        if value is None and known[key].required:
            raise InputError(f"strategy {name!r} needs {key}: {known[key].help}")
        if value is not None and known[key].type is Path and not Path(value).is_file():
            raise MissingFileError(f"{key}={value}: no such file")
    return values


def make_strategy(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    tiny: bool = False,
    form: PromptForm | None = None,
    **options: Any,
) -> Strategy:
    """Make a registered strategy, such as `make_strategy("prompt", model, tokenizer, ["math", "code"], margin=1.0)`.

    model: patched; tokenizer: the model's
    experts: to choose from: names in the bank, or {name that a question uses: name in the bank}
    tiny: True for the built-in model, which is asked in its own words
    form: of the prompts, for makers with a parameter of that name, which ask in it; None: as `rollout.chat.prompt_form`
        decides from the tokenizer
    options: of this strategy

    Raises ValueError or FileNotFoundError before any forward, for whatever the strategy cannot be made of.
    """
    values = check_options(name, options)
    make = _registered(name).make
    if isinstance(make, str):
        module, _, function = make.partition(":")
        make = getattr(import_module(module), function)
    if "form" in signature(make).parameters:
        values["form"] = form
    return make(model, tokenizer, experts, tiny=tiny, **values)


def _registered(name: str) -> _Registered:
    if name not in _STRATEGIES:
        raise InputError(f"there is no strategy {name!r}: wanted one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[name]


_MARGIN = Option(
    "margin", float, 0.0, "By how many nats (for nearest: cosines) an expert must lead, else the base model answers."
)
_CLASSIFIER = Option("classifier", str, CLASSIFIER, "The expert that answers the question.", expert=True)
_EXAMPLES = Option(
    "examples",
    Path,
    None,
    "Examples: a .jsonl file with prompt and answer, or for nearest with prompt and expert.",
    required=True,
)
_OTHER = Option("other", bool, True, "Let the model answer 'other', which keeps the base model.")
_CALIBRATE = Option(
    "calibrate", Path, None, "A file of prompts like those to come: what a label has on all of them is taken off."
)

register_strategy("prompt", "t2kernels.adapt.prompt:make_prompt", _MARGIN, _OTHER, _CALIBRATE)
register_strategy("classify", "t2kernels.adapt.prompt:make_classifier", _CLASSIFIER, _MARGIN)
register_strategy("router", "t2kernels.adapt.zero_shot:make_router", _CLASSIFIER)
register_strategy("confidence", "t2kernels.adapt.zero_shot:make_confidence")
register_strategy("likelihood", "t2kernels.adapt.zero_shot:make_likelihood")
register_strategy("few-shot", "t2kernels.adapt.few_shot:make_few_shot", _EXAMPLES)
register_strategy("nearest", "t2kernels.adapt.zero_shot:make_nearest", _EXAMPLES, _MARGIN)
