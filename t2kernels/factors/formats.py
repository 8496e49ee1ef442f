"""The formats of factors by name, and converting the factors of one matrix to a format."""

from __future__ import annotations

from typing import Any

import torch

from t2kernels import InputError

from .factor import Factor
from .int8 import Int8Factor
from .quantise import quantise

FORMATS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def check_format(format: str, max_error: float | None = None) -> None:
    """Raise ValueError for an unknown format, or a max_error that is not a positive number."""
    if format not in FORMATS:
        raise InputError(f"format={format!r}; wanted one of {', '.join(map(repr, FORMATS))}")
    if max_error is not None and not (isinstance(max_error, (int, float)) and max_error > 0):
        raise InputError(f"max_error={max_error!r}: wanted a positive relative error, such as 0.01, or None")


def convert(
    name: str,
    factor: Factor | Int8Factor,
    format: str,
    max_error: float | None = None,
    compensate: bool | None = None,
) -> tuple[Factor | Int8Factor, dict[str, Any]]:
    """Convert the factors of one matrix to a format; returns them and facts for the matrix's record in a manifest.

    name: of the matrix, for messages
    max_error: largest relative error of the matrix. int8 adds residual columns until it holds; None: the default of
        `quantise`
    compensate: for int8, as in `quantise`
    Raises ValueError that names the matrix if max_error cannot be reached, or if the factors are int8 already.
    """
    if isinstance(factor, Int8Factor):
        if format == "int8" and max_error is None:
            return factor, {}
        raise InputError(
            f"{name}: its factors are int8 already and cannot become {format}; "
            "convert the factors that they were made from"
        )
    facts = {"dtype": str(FORMATS[format]).removeprefix("torch.")}
    if format == "int8":
        try:
            found = quantise(factor.U, factor.sigma, factor.V, max_error, compensate)
        except ValueError as e:
            raise InputError(f"{name}: {e}") from None
        return found.factor, facts | found.record()
    kept = factor.to(FORMATS[format])
    exact = factor.dense()
    error = ((kept.dense() - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()
    if max_error is not None and error > max_error:
        raise InputError(
            f"{name}: {format} factors have a relative error of {error:.2g}, more than max_error={max_error:.2g}; "
            "use a wider format"
        )
    return kept, facts | {"format_error": error, "measured": "||W - W'|| / ||W||, Frobenius, of the kept components"}
