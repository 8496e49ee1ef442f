"""The private parts of transformers' Trainer that this room overrides or calls, checked when a trainer is made.

An override whose name or parameters have changed would not be called any more, and nothing would say so.
"""

from __future__ import annotations

import inspect
from types import FunctionType

import transformers
from transformers import Trainer

from t2kernels import T2Error

OVERRIDDEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "_clip_grad_norm": ("each expert's gradient is cut by itself", ("model",)),
    "_save": ("a checkpoint holds experts, not the model", ("output_dir", "state_dict")),
    "_save_checkpoint": ("a checkpoint is written whole or not at all", ("model", "trial")),
    "_load_from_checkpoint": ("a checkpoint holds experts, not the model", ("resume_from_checkpoint", "model")),
    "_load_best_model": ("each expert has its own best checkpoint", ()),
}
"""{method that is overridden: (why, its parameters)}. Trainer must call it."""

CALLED: dict[str, tuple[str, tuple[str, ...]]] = {
    "_get_output_dir": ("the folder of checkpoints", ("trial",)),
    "_save_optimizer_and_scheduler": ("a checkpoint holds their state", ("output_dir",)),
    "_save_scaler": ("a checkpoint holds its state", ("output_dir",)),
    "_save_rng_state": ("a checkpoint holds the random state", ("output_dir",)),
}
"""{method that is called: (why, its parameters)}."""


class UnsupportedTrainerError(T2Error, RuntimeError):
    """The installed transformers lacks a private part of Trainer that SVFTrainer needs; the message names it."""


def check_trainer(cls: type = Trainer) -> None:
    """Raise UnsupportedTrainerError unless transformers' Trainer has these methods, and calls those overridden."""
    called = {name for f in vars(cls).values() if isinstance(f, FunctionType) for name in f.__code__.co_names}
    for name, (why, parameters) in {**OVERRIDDEN, **CALLED}.items():
        method = getattr(cls, name, None)
        if method is None:
            wrong = "there is none"
        elif not set(parameters) <= set(found := tuple(inspect.signature(method).parameters)[1:]):
            wrong = f"its parameters are {', '.join(found) or 'none'}"
        elif name in OVERRIDDEN and name not in called:
            wrong = "Trainer does not call it"
        else:
            continue
        raise unsupported_part(f"{cls.__name__}.{name}({', '.join(parameters)})", why, wrong)


def unsupported_part(part: str, why: str, wrong: str) -> UnsupportedTrainerError:
    """The error for one private part. why: what it is needed for; wrong: what was found instead."""
    return UnsupportedTrainerError(
        f"transformers {transformers.__version__}: {part} is expected ({why}), but {wrong}; "
        "use a version that t2kernels supports (pyproject.toml)"
    )
