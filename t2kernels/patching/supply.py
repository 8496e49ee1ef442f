"""Where the factors of the layers come from: given ones, checked against the weights, or computed now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.experts.origin import Origin
from t2kernels.factors.factor import Factor, svd
from t2kernels.factors.formats import FORMATS, check_format, convert
from t2kernels.factors.identity import check_weight, leading_pair
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.linalg import matmul
from t2kernels.factors.matrices import Matrix, is_quantised
from t2kernels.factors.store import Factors

Given = Factors | Mapping[str, Factor | Int8Factor] | str | os.PathLike[str] | None


class FactorSupply:
    """The factors of a model's matrices, one at a time.

    given, max_error: as `factors` and `max_error` of `patch_model`
    origin: gets fingerprint, sketch and sigma of each matrix that is taken
    dtype: of the model, in which a quantised layer computes
    """

    def __init__(self, given: Given, max_error: float | None, origin: Origin, dtype: torch.dtype) -> None:
        self.format: str | None = None
        if isinstance(given, str) and given in FORMATS:
            self.format, given = given, None
            check_format(self.format, max_error)
        elif max_error is not None:
            raise InputError(
                f"max_error={max_error}: it limits what a format loses; pass it with factors='int8', 'fp16' or 'bf16'"
            )
        self.factors: Factors | Mapping[str, Factor | Int8Factor] | None = (
            Factors.load(Path(given)) if isinstance(given, (str, os.PathLike)) else given
        )
        self.max_error: float | None = max_error
        self.origin: Origin = origin
        self.dtype: torch.dtype = dtype

    @property
    def keeps_format(self) -> bool:
        """True if the factors keep their format when the model is cast to another dtype."""
        return self.format is not None

    def dtypes(self, matrix: Matrix) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of the factors, dtype of the dense weight or of its computation) of a matrix."""
        quantised = is_quantised(matrix.module) and matrix.index is None
        dense = self.dtype if quantised else matrix.stored.dtype
        if self.format:
            return FORMATS[self.format], dense
        return (torch.int8 if self._is_int8(matrix.name) else dense), dense

    @property
    def held(self) -> dict[str, int]:
        """{matrix: components of its given factors}; empty if they are computed now."""
        factors = self.factors
        if isinstance(factors, Factors):
            return dict(factors.ranks)
        return {name: factor.rank for name, factor in (factors or {}).items()}

    def unsupported(self, matrix: Matrix) -> str | None:
        """Why there are no factors for a matrix, and what to do; None if there are."""
        if self.factors is not None:
            if matrix.name not in self.factors:
                return f"has no factors{self._whose}; decompose with the same targets, or pass fewer targets"
            shape = self._shape(matrix.name)
            if shape != matrix.shape:
                return (
                    f"is {list(matrix.shape)}, its factors are of {list(shape)}: they are of another model{self._whose}"
                )
        if matrix.index is None and not is_quantised(matrix.module) and not torch.isfinite(matrix.stored).all():
            return "holds NaN or infinity; its checkpoint is damaged"
        return None

    def take(self, matrix: Matrix, form: str, support: int) -> Factor | Int8Factor:
        """The factors of one matrix for its layer, on the device of its weight: all components in factored form, the
        support in delta form. Records them in `origin`.

        Raises ValueError that names the matrix: factors of another model or other weights, too few components, or a
        max_error that cannot be reached.
        """
        wanted = matrix.rank if form == "factored" else support
        factors = self.factors
        factor = self._computed(matrix, form, wanted) if factors is None else self._given(factors, matrix, form, wanted)
        return factor.cut(wanted).to(matrix.stored.device)

    def _computed(self, m: Matrix, form: str, wanted: int) -> Factor | Int8Factor:
        factor = svd(m.read(), wanted)
        self.origin.record(m.name, factor)  # before rounding: experts do not depend on the format
        if self.format is None:
            return factor
        # In delta form a component that the expert leaves alone has a row of 0, so it could not compensate anything.
        return convert(m.name, factor, self.format, self.max_error, compensate=form == "factored")[0]

    def _given(
        self, factors: Factors | Mapping[str, Factor | Int8Factor], m: Matrix, form: str, wanted: int
    ) -> Factor | Int8Factor:
        factor = factors[m.name]
        if factor.rank < wanted:
            raise InputError(
                f"{m.name}: the factors hold {factor.rank} components, {form} form needs {wanted}; decompose with more"
            )
        try:
            W = m.read()
        except ValueError:
            W = None  # a format that cannot be read, so it cannot be compared either
        if isinstance(W, Tensor):
            u, v = (t.to(W.device) for t in leading_pair(factor))
            try:
                check_weight(m.name, factor, matmul(W.float(), v), u, is_quantised(m.module))
            except InputError as e:
                raise InputError(f"{e}{self._whose}") from None
        if isinstance(factors, Factors):
            self.origin.record(m.name, factor, factors.fingerprints[m.name], factors.sketches[m.name])
        else:
            self.origin.record(m.name, factor)
        return factor

    @property
    def _whose(self) -> str:
        """Of which model the factors are by their manifest, if that is not the name of this model."""
        theirs = self.factors.manifest.get("base_model") if isinstance(self.factors, Factors) else None
        mine = self.origin.base_model
        return f" (they are of {theirs!r}, the model is {mine!r})" if theirs and theirs != mine else ""

    def _shape(self, name: str) -> tuple[int, int]:
        """(M, N) of the weight that factors are of."""
        if isinstance(self.factors, Factors):
            return self.factors.shape(name)  # without reading the factors
        factor = (self.factors or {})[name]
        return factor.U.shape[0], factor.V.shape[0]

    def _is_int8(self, name: str) -> bool:
        if isinstance(self.factors, Factors):
            record = self.factors.manifest.get("matrices", {})
            if name in record:
                return record[name].get("dtype") == "int8"  # without reading the factors
        return isinstance((self.factors or {}).get(name), Int8Factor)
