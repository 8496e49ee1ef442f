"""Which form each matrix is patched in, and which matrices cannot be patched."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from t2kernels import InputError
from t2kernels.factors.factor import resolve_rank
from t2kernels.factors.matrices import Matrix, is_quantised, usual_rank
from t2kernels.ops.planner import cheaper_form

FORMS: tuple[str, ...] = ("auto", "factored", "delta")


def choose_supports(
    matrices: Mapping[str, Matrix], rank: int | float | str | None, form: str, held: Mapping[str, int]
) -> dict[str, int]:
    """{matrix: k}, how many leading components an expert may rescale.

    rank: as in `resolve_rank`, or "auto": as many as the given factors hold, if that is not all; else every component
        in factored form; else `usual_rank`, a 16th of them in a model that is not small
    form: as in `choose_form`
    held: {matrix: components of the given factors}, without matrices that have none
    Raises ValueError for another rank.
    """
    if rank != "auto":
        if isinstance(rank, str):
            raise InputError(f"rank={rank!r}: wanted 'auto', a number of components, a fraction of them, or None (all)")
        resolve_rank(rank, 1)  # also refused where no matrix is selected
        return {name: resolve_rank(rank, m.rank) for name, m in matrices.items()}
    share = usual_rank(m.shape for m in matrices.values()) if form != "factored" else None
    usual = {name: resolve_rank(share, m.rank) for name, m in matrices.items()}
    if form == "factored":
        return usual
    return {name: held[name] if held.get(name, m.rank) < m.rank else usual[name] for name, m in matrices.items()}


def choose_form(
    matrix: Matrix,
    support: int,
    form: str = "auto",
    factors: torch.dtype = torch.float32,
    dense: torch.dtype = torch.float32,
    held: int | None = None,
) -> tuple[str, str]:
    """(form, reason) for a matrix of which an expert may rescale `support` components.

    Bytes read per token, over those of the dense layer's MN numbers, with s the bytes of a number of the factors over
    those of a dense one (int8 beside bf16: 0.5; residual columns are not counted):

        factored  s (M + N) R / MN          delta  1 + s k (M + N) / MN

    support: k
    form: "factored", "delta", or "auto": the one that reads less
    factors, dense: dtypes of the factors and of the dense weight
    held: components of the given factors; None: all
    Raises ValueError for a mixture-of-experts stack in factored form.
    """
    if matrix.index is not None:
        if form == "factored":
            raise InputError(
                f"{matrix.name}: mixture-of-experts stacks are patched in delta form; "
                "use form='delta' or 'auto', or leave them out"
            )
        return "delta", "mixture-of-experts stack"
    if form != "auto":
        return form, "asked for"
    if is_quantised(matrix.module):
        return "delta", "quantised layer"
    if matrix.adapted:
        return "delta", "another adapter is on it"
    if held is not None and held < matrix.rank:
        return "delta", f"the factors hold {held} of {matrix.rank} components"
    return cheaper_form(*matrix.shape, support, dense.itemsize, factors.itemsize)


def unsupported(matrix: Matrix, form: str) -> str | None:
    """Why a matrix cannot be patched in a form, and what to do; None if it can."""
    hook = getattr(matrix.module, "_hf_hook", None)
    weight = matrix.stored
    meta = isinstance(weight, torch.Tensor) and weight.is_meta
    if getattr(hook, "offload", False) or (hook is not None and meta):
        return "is offloaded; load the model without offloading, or patch before dispatching it"
    if meta:
        return "is on the meta device: it has no weights yet; load the model first"
    if form == "factored" and is_quantised(matrix.module):
        return (
            f"is quantised ({type(matrix.module).__name__}): the factored form would drop its weight; use form='delta'"
        )
    if form == "factored" and matrix.adapted:
        return (
            "carries another adapter, which merges itself into a weight that the factored form drops; use form='delta' "
            "or merge the adapter first"
        )
    if form == "factored" and hook is not None:
        return "carries a dispatch hook that the factored form would lose; use form='delta'"
    return None
