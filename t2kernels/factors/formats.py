"""In which numbers factors are kept, by name, and how the factors of one matrix get there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .int8 import Int8Factor
from .quantise import quantise

if TYPE_CHECKING:
    from .store import Factor

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def check_format(format: str, max_error: float | None = None) -> None:
    """Raises ValueError for a format or an error that is none."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; wanted one of {', '.join(map(repr, FORMATS))}")
    if max_error is not None and not (isinstance(max_error, (int, float)) and max_error > 0):
        raise ValueError(f"max_error={max_error!r}: wanted a positive relative error, such as 0.01, or None")


def convert(
    name: str, factor: Factor, format: str, max_error: float | None = None, compensate: bool | None = None
) -> tuple[Factor | Int8Factor, dict]:
    """The factors of one matrix in a format, and what its record in a manifest says of that.

    max_error: relative error of the matrix. int8: residual columns are spent until it holds (`quantise`, which also says what None means)
    compensate: int8: as in `quantise`
    Raises ValueError that names the matrix where max_error cannot be had, and for factors that are int8 already.
    """
    if isinstance(factor, Int8Factor):
        if format == "int8" and max_error is None:
            return factor, {}
        raise ValueError(
            f"{name}: its factors are int8 already; make {format} ones from the factors that those were made from"
        )
    facts = {"dtype": str(FORMATS[format]).removeprefix("torch.")}
    if format == "int8":
        try:
            found = quantise(factor.U, factor.sigma, factor.V, max_error, compensate)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        return found.factor, facts | found.record()
    kept = factor.to(FORMATS[format])
    exact = factor.dense()
    error = ((kept.dense() - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()
    if max_error is not None and error > max_error:
        raise ValueError(
            f"{name}: {format} factors are off by {error:.2g}, more than max_error={max_error:.2g}; take a wider format"
        )
    return kept, facts | {"format_error": error, "measured": "||W - W'|| / ||W||, Frobenius, of the kept components"}
