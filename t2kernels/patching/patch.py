"""`patch_model` and `unpatch_model`: one walk over the matrices of a model, in place, and back."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert
from t2kernels.experts.origin import Origin
from t2kernels.factors.checkpoint import name_of
from t2kernels.factors.matrices import Matrix, Targets, find_matrices, unwrapped
from t2kernels.layers import swiglu
from t2kernels.layers.factored_linear import FactoredLinear
from t2kernels.layers.linear import DeltaLinear, SVFLinear
from t2kernels.layers.moe import DeltaStack, stack_factors
from t2kernels.layers.routing.active import Routing

from . import gguf, model_hooks
from .forms import FORMS, choose_form, choose_supports, unsupported
from .supply import FactorSupply, Given

logger: logging.Logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # factors made in inference mode could not be trained on
@torch.no_grad()
def patch_model(
    model: nn.Module,
    targets: Targets = "all",
    rank: int | float | str | None = "auto",
    form: str = "auto",
    factors: Given = None,
    rows: int = 64,
    max_error: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExpertBank:
    """Let a model run SVF experts, a different one for each row of a batch. In place; returns the bank of experts.

    A layer y = x Wᵀ becomes, with frozen factors W = U diag(sigma) Vᵀ and one row of `scale` per expert
    (Transformer², arXiv 2501.06252, section 3.1),

        factored  y = ((x V) * scale[expert_ids]) Uᵀ             scale = sigma * z
        delta     y = x Wᵀ + ((x V) * scale[expert_ids]) Uᵀ      scale = sigma * (z - 1)

    targets: "all" (every linear layer of the blocks), "mlp", "attention", a regular expression, a list of names, or
        callable(name, module)
    rank: how many leading components an expert may rescale: None (all), a number, or a fraction of min(M, N). "auto":
        as many as the given factors hold; without factors a 16th, but all of them in factored form (the method exactly)
        and in a model whose largest min(M, N) is below 512
    form: "factored": W is dropped, reads (M + N) R numbers. "delta": the layer stays as it is, in any format; reads
        k (M + N) numbers more. "auto": for each matrix the one that reads less; `bank.describe()` gives the reasons
    factors: None: computed now, in the layer's dtype. "fp32", "bf16", "fp16" or "int8": computed now, in that format
        (int8 reads half of what bf16 reads). Or factors of `t2kernels.decompose`, or the directory where they are:
        int8 is used as it is, floats in the layer's dtype. (A directory named like a format is "./int8".)
    max_error: with a format: largest relative error of a matrix. int8 adds residual columns until it holds; None: about
        the error of an int8 weight with one step per row
    rows: size of the tables, row 0 (the base model) included. More experts than rows take turns
    progress: called as progress(name, done, total)

    Heads, embeddings, routers, vision and audio towers are patched only if they are named. Memory: one extra matrix at
    most. Raises ValueError: already patched; nothing selected; a matrix that cannot be patched (named); factors of
    other weights; a max_error that cannot be reached. If it raises, the model is as before (matrices that were already
    factored are restored within rounding).
    """
    if hasattr(model, "t2_bank"):
        raise InputError("the model is patched already: unpatch_model(model) first, or use the bank in model.t2_bank")
    if form not in FORMS:
        raise InputError(f"form={form!r}; wanted 'auto', 'factored' or 'delta'")
    choose_supports({}, rank, form, {})  # refused before anything is read
    root = unwrapped(model)  # paths are of the model inside PEFT's wrapper: it may be taken off
    model_hooks.check(root)
    gguf.unmark(root)
    routing, origin = Routing(), Origin(*name_of(root))
    supply = FactorSupply(factors, max_error, origin, _dtype(root))
    matrices = find_matrices(root, targets)
    held = supply.held
    supports = choose_supports(matrices, rank, form, held)
    plan = {
        name: choose_form(m, supports[name], form, *supply.dtypes(m), held.get(name)) for name, m in matrices.items()
    }
    for name, m in matrices.items():
        if reason := unsupported(m, plan[name][0]) or supply.unsupported(m):
            raise InputError(f"{name} {reason}")

    layers: list[tuple[SVFLinear, tuple[str, ...]]] = []
    done = 0
    with contextlib.ExitStack() as undo:
        for members in _by_layer(matrices):
            first, found = members[0], []
            for m in members:
                found.append(supply.take(m, plan[m.name][0], supports[m.name]))
                done += 1
                if progress:
                    progress(m.name, done, len(matrices))
            kind = _layer_class(first, plan[first.name][0])
            factor = found[0] if first.index is None else stack_factors(found)
            dtype = supply.dtypes(first)[1]
            layer = kind(factor, supports[first.name], rows, dtype, routing, supply.keeps_format)
            layer.install(root, first)
            undo.callback(layer.remove, root)
            layers.append((layer, tuple(m.name for m in members)))
        bank = ExpertBank(layers, rows, origin, routing, plan)
        undo.callback(model_hooks.remove, root, bank)
        model_hooks.install(model, root, bank)
        undo.callback(swiglu.remove, root)
        swiglu.install(root)
        undo.pop_all()
    logger.info("patched %s: %s", type(model).__name__, bank.describe())
    return bank


@torch.no_grad()
def unpatch_model(model: nn.Module, expert: str | Expert | None = None) -> nn.Module:
    """Give the model its dense layers back, in place; returns the model.

    expert: a name in the bank, or an `Expert`, which is merged into the weights. None: the base model, bit for bit in
        delta form, within rounding in factored form
    Raises ValueError if the model is not patched, or if the expert cannot be merged into a quantised layer; the model
    is then still patched. Raises KeyError for an unknown name.
    """
    bank: ExpertBank | None = getattr(model, "t2_bank", None)
    if bank is None:
        raise InputError("the model is not patched")
    root = unwrapped(model)
    row = 0
    if expert is not None:
        for layer, _ in bank.layers:
            if reason := layer.unsupported_merge(root):
                raise InputError(reason)
        if isinstance(expert, Expert):
            name = "merged@0"  # a version: what the user names has none
            bank.add(name, expert, replace=True)
            expert = name
        ids = bank.ids(expert)  # a name: it holds its row until the layers have read it
        row = int(ids)
    swiglu.remove(root)
    for layer, _ in bank.layers:
        layer.remove(root, row)
    bank.table.adapters.take_off(root, row)
    model_hooks.remove(root, bank)
    return model


def _layer_class(matrix: Matrix, form: str) -> type[SVFLinear]:
    if matrix.index is not None:
        return DeltaStack
    return DeltaLinear if form == "delta" else FactoredLinear


def _by_layer(matrices: Mapping[str, Matrix]) -> list[list[Matrix]]:
    """The matrices of each layer: one, or all slices of a mixture-of-experts stack, in order."""
    groups: OrderedDict[str, list[Matrix]] = OrderedDict()
    for m in matrices.values():
        groups.setdefault(m.tensor, []).append(m)
    for tensor, members in groups.items():
        if members[0].index is not None and len(members) != members[0].stored.shape[0]:
            raise InputError(
                f"{tensor}: select all weights of a mixture-of-experts stack, or none; {len(members)} were selected"
            )
    return list(groups.values())


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.get_default_dtype()
