"""t2kernels: SVF experts of Transformer² as rows of a table. The public names, nothing else; importing does nothing.

Each name is imported when it is first used, so that `import t2kernels`, and with it `t2 --help`, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import adapt, tasks, tiny, train
    from .bank import ExpertBank
    from .counting import ParameterCount, count_parameters
    from .decomposition import decompose
    from .expert import Expert, ExpertError, ExpertMismatch
    from .explain import Explanation, explain
    from .factors import Factor, Factors
    from .ops import svf_linear, svf_linear_group, svf_linear_ref
    from .patch import patch_model, unpatch_model

_HOME = {
    "Expert": "expert",
    "ExpertBank": "bank",
    "ExpertError": "expert",
    "ExpertMismatch": "expert",
    "Factor": "factors",
    "Factors": "factors",
    "ParameterCount": "counting",
    "count_parameters": "counting",
    "decompose": "decomposition",
    "Explanation": "explain",
    "explain": "explain",
    "patch_model": "patch",
    "svf_linear": "ops",
    "svf_linear_group": "ops",
    "svf_linear_ref": "ops",
    "unpatch_model": "patch",
}
_SUBPACKAGES = ("adapt", "tasks", "tiny", "train")

__all__ = [
    "Expert",
    "ExpertBank",
    "ExpertError",
    "ExpertMismatch",
    "Explanation",
    "Factor",
    "Factors",
    "ParameterCount",
    "adapt",
    "count_parameters",
    "decompose",
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


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
