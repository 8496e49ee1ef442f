"""The compiled extension `t2kernels._C`, loaded once for all its callers. How to build it: docs/howto/build.md."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from t2kernels import PackageError

INTERFACE = 4
"""The number of what Python calls in the extension, in csrc/bindings.cpp as well. A change of it changes both."""


@functools.cache
def load() -> Any:
    """`t2kernels._C`, with the threads of torch. Raises ImportError that says what to do if it is not there."""
    try:
        extension = importlib.import_module("t2kernels._C")
    except ModuleNotFoundError:
        raise PackageError(
            "t2kernels._C is not built: install t2kernels again where there is a C++ compiler (docs/howto/build.md)"
        ) from None
    except ImportError as e:
        raise PackageError(f"t2kernels._C cannot be loaded: {e}") from e
    if getattr(extension, "interface", None) != INTERFACE:
        raise PackageError(
            "t2kernels._C was built from other sources than this package: install t2kernels again (docs/howto/build.md)"
        )
    extension.cpu_find_threads(torch._C.__file__)
    return extension


def unsupported(cuda: bool = False) -> str | None:
    """Why the extension, or its CUDA part, cannot be used in this process; or None."""
    try:
        extension = load()
    except ImportError as e:
        return str(e)
    if cuda and not extension.has_cuda:
        return "t2kernels._C was built without CUDA: install t2kernels again where there is nvcc (docs/howto/build.md)"
    return None
