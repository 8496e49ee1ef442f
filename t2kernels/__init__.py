"""t2kernels: SVF experts of Transformer² as rows of a table. The public names, nothing else; importing does nothing.

Each name is imported when it is first used, so that `import t2kernels`, and with it `t2 --help`, does not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Expert": "experts.expert",
    "ExpertBank": "experts.bank",
    "ExpertError": "experts.expert",
    "ExpertMismatch": "experts.expert",
    "Factor": "factors.factor",
    "Factors": "factors.store",
    "LoraAdapter": "experts.exchange.lora",
    "ParameterCount": "patching.counting",
    "count_parameters": "patching.counting",
    "decompose": "factors.decomposition",
    "Explanation": "patching.explain",
    "explain": "patching.explain",
    "patch_model": "patching.patch",
    "svf_linear": "ops",
    "svf_linear_group": "ops",
    "svf_linear_ref": "ops",
    "unpatch_model": "patching.patch",
}


class T2Error(Exception):
    """Base of the errors that are meant to be read: they say what was given, what was expected and what to do.

    Each of them is also an error of Python, so that `except ValueError` catches an `InputError`. An error that is no
    `T2Error` is a bug, or comes from another package or from the operating system.
    """


class InputError(T2Error, ValueError):
    """An argument, an option or the content of a file cannot be used."""


class InputTypeError(T2Error, TypeError):
    """An argument is of a type that cannot be used."""


class UnknownNameError(T2Error, KeyError):
    """Nothing has this name."""

    def __str__(self) -> str:
        """The message as it is: KeyError would put it in quotes."""
        return Exception.__str__(self)


class OutOfRangeError(T2Error, IndexError):
    """There is no row of this number."""


class MissingFileError(T2Error, FileNotFoundError):
    """A file or a folder that is needed is not there."""


class HubError(T2Error, OSError):
    """The hub of models and datasets did not provide something."""


class StateError(T2Error, RuntimeError):
    """This cannot be done now, or not on this machine."""


class PackageError(T2Error, ModuleNotFoundError):
    """An optional package, or the compiled extension, is missing or cannot be loaded."""


_SUBPACKAGES = ("adapt", "evaluation", "tasks", "tiny", "train")


def printable(value: object) -> str:
    """str(value) with halves of surrogate pairs replaced by "?", so that it can be printed and encoded."""
    return str(value).encode("utf-8", "replace").decode()


def one_line(e: BaseException) -> str:
    """The message of an exception without line breaks, or its class if it has no message."""
    text = e.args[0] if isinstance(e, KeyError) and e.args else e  # str of a KeyError is its message in quotes
    return " ".join(printable(text).split()) or type(e).__name__


__all__ = [
    "Expert",
    "ExpertBank",
    "ExpertError",
    "ExpertMismatch",
    "Explanation",
    "Factor",
    "Factors",
    "LoraAdapter",
    "ParameterCount",
    "T2Error",
    "adapt",
    "count_parameters",
    "decompose",
    "evaluation",
    "explain",
    "patch_model",
    "svf_linear",
    "svf_linear_group",
    "svf_linear_ref",
    "tasks",
    "tiny",
    "train",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
