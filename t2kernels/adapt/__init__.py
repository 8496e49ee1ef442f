"""Strategies: which expert, or mixture of experts, answers a prompt that nobody labelled (Transformer², arXiv 2501.06252, section 3.2)."""

from .cem import CEMConfig, Found, search
from .classifier import Classifier
from .examples import Examples
from .few_shot import FewShot
from .prompt import Prompt
from .question import Question, labelled
from .refine import refine
from .strategy import Strategy
from .transfer import alignment, shuffled, transfer
from .zero_shot import Router, ZeroShot

__all__ = [
    "CEMConfig",
    "Classifier",
    "Examples",
    "FewShot",
    "Found",
    "Prompt",
    "Question",
    "Router",
    "Strategy",
    "ZeroShot",
    "alignment",
    "labelled",
    "refine",
    "search",
    "shuffled",
    "transfer",
]
