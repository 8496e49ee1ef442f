"""Strategies that choose the expert, or the mixture of experts, of each prompt (arXiv 2501.06252, section 3.2).

Each name is imported when it is first used: the command line lists the strategies without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .between_models import alignment, shuffled, transfer
    from .cem import CEMConfig, Found, search
    from .examples import Examples
    from .few_shot import FewShot
    from .prompt import Classifier, Prompt
    from .question import Question, labelled
    from .refinement import refine
    from .strategy import Strategy
    from .strategy_registry import Option, make_strategy, register_strategy, strategy_names
    from .zero_shot import Nearest, Router, ZeroShot

_HOME = {
    "CEMConfig": "cem",
    "Classifier": "prompt",
    "Examples": "examples",
    "FewShot": "few_shot",
    "Found": "cem",
    "Nearest": "zero_shot",
    "Option": "strategy_registry",
    "Prompt": "prompt",
    "Question": "question",
    "Router": "zero_shot",
    "Strategy": "strategy",
    "ZeroShot": "zero_shot",
    "alignment": "between_models",
    "labelled": "question",
    "make_strategy": "strategy_registry",
    "refine": "refinement",
    "register_strategy": "strategy_registry",
    "search": "cem",
    "shuffled": "between_models",
    "strategy_names": "strategy_registry",
    "transfer": "between_models",
}

__all__ = [
    "CEMConfig",
    "Classifier",
    "Examples",
    "FewShot",
    "Found",
    "Nearest",
    "Option",
    "Prompt",
    "Question",
    "Router",
    "Strategy",
    "ZeroShot",
    "alignment",
    "labelled",
    "make_strategy",
    "refine",
    "register_strategy",
    "search",
    "shuffled",
    "strategy_names",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
