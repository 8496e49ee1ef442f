"""`patch_model` and `unpatch_model`: one walk over the matrices of a model, in place, and back."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert
from t2kernels.experts.origin import Origin
from t2kernels.factors.checkpoint import name_of
from t2kernels.factors.formats import FORMATS, check_format, convert
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.matrices import Matrix, Targets, find_matrices, is_quantised
from t2kernels.factors.store import Factor, Factors, resolve_rank, svd
from t2kernels.layers import moe
from t2kernels.layers.active import Routing
from t2kernels.layers.linear import DeltaLinear, FactoredLinear, SVFLinear, delta_hook
from t2kernels.layers.swiglu import fuse, unfuse
from t2kernels.ops.planner import cheaper_form

from .model_hooks import dress, remove_hook, undress

logger = logging.getLogger(__name__)

FORMS = ("auto", "factored", "delta")


def patch_model(
    model: nn.Module,
    targets: Targets = "all",
    rank: int | float | None = None,
    form: str = "auto",
    factors: Factors | Mapping[str, Factor] | str | os.PathLike | None = None,
    rows: int = 64,
    max_error: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExpertBank:
    """Let a model run SVF experts, a different one for each row of a batch; in place. Returns the bank that holds them.

    The layer y = x Wᵀ becomes y = ((x V) * scale[expert_ids]) Uᵀ with frozen factors W = U diag(sigma) Vᵀ and one row of `scale` an expert
    (Transformer², arXiv 2501.06252, section 3.1), or keeps W and adds the same for the change that an expert makes.

    targets: "all" (every linear layer of the blocks) | "mlp" | "attention" | a regular expression | a list of names | callable(name, module)
    rank: how many leading components an expert may rescale: None (every one), a number, or a fraction of min(M, N)
    form: "factored" (W is dropped; reads (M + N) R numbers), "delta" (the layer stays untouched in any format; reads k (M + N) more),
        or "auto": whichever reads less, matrix by matrix; `bank.describe()` says what was picked and why
    factors: from `t2kernels.decompose`, or where they were saved, used in the format that they have: int8 as it is, floats in the layer's dtype.
        None computes them now, in the layer's dtype; "fp32", "bf16", "fp16" or "int8" computes them now and keeps them in that format (a
        directory of such a name is "./int8"). int8 reads half of what bf16 does
    max_error: with such a name: largest relative error of a matrix. int8 spends residual columns until it holds; None: about the error of an
        int8 weight with one step a row
    rows: size of the tables, row 0 (the base model) included; more experts than rows take turns
    progress: called as progress(name, done, total)

    Heads, embeddings, routers, vision and audio towers are left alone unless asked for by name. Memory: never more than one extra matrix.
    Raises ValueError: already patched; nothing selected; a matrix that cannot be patched (named); factors of other weights; a max_error that
    cannot be had. A model that could not be patched is left as it was (matrices that were already factored come back within rounding).
    """
    if hasattr(model, "t2_bank"):
        raise ValueError("the model is patched already: unpatch_model(model) first, or use the bank in model.t2_bank")
    if form not in FORMS:
        raise ValueError(f"form={form!r}; wanted 'auto', 'factored' or 'delta'")
    resolve_rank(rank, 1)
    format = None
    if isinstance(factors, str) and factors in FORMATS:
        format, factors = factors, None
        check_format(format, max_error)
    elif max_error is not None:
        raise ValueError(
            f"max_error={max_error}: it bounds what a format loses; give factors='int8', 'fp16' or 'bf16' with it"
        )
    if isinstance(factors, (str, os.PathLike)):
        factors = Factors.load(factors)
    matrices = find_matrices(model, targets)
    kinds = _kinds(model, matrices, format, factors)
    plan = {name: choose_form(m, resolve_rank(rank, m.rank), form, *kinds[name]) for name, m in matrices.items()}
    for name, m in matrices.items():
        _refuse(m, plan[name][0], factors)

    routing, origin = Routing(), Origin(*name_of(model))
    layers: list[tuple[SVFLinear, tuple[str, ...]]] = []
    done, undo = 0, []
    keep = format is not None
    try:
        for (path, tensor), members in _by_module(matrices).items():
            first = members[0]
            support = resolve_rank(rank, first.rank)
            found = []
            for m in members:
                found.append(_factor(m, plan[m.name][0], support, factors, origin, format, max_error))
                done += 1
                if progress:
                    progress(m.name, done, len(matrices))
            layer_form = plan[first.name][0]
            layer_dtype = kinds[first.name][1]
            if first.index is not None:
                layer = moe.DeltaStack(moe.stack_factors(found), support, rows, layer_dtype, routing, keep)
                moe.attach(first.module, tensor, layer)
                undo.append(lambda module=first.module, tensor=tensor: moe.detach(module, tensor))
            elif layer_form == "delta":
                layer = DeltaLinear(found[0], support, rows, layer_dtype, routing, keep)
                first.module.add_module("svf", layer)
                first.module.register_forward_hook(delta_hook)
                undo.append(lambda module=first.module: _detach_delta(module))
            else:
                layer = FactoredLinear(
                    found[0], support, rows, layer_dtype, routing, first.module, first.transposed, keep
                )
                layer.train(first.module.training)
                _replace(model, path, layer)
                first.module.weight = None  # dropped now, so that never more than one matrix is held twice
                undo.append(lambda path=path, layer=layer: _replace(model, path, layer.restore()))
            layers.append((layer, tuple(m.name for m in members)))
        bank = ExpertBank(layers, rows, origin, routing, plan)
        dress(model, bank)
        fuse(model)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    logger.info("patched %s: %s", type(model).__name__, bank.describe())
    return bank


def unpatch_model(model: nn.Module, expert: str | Expert | None = None) -> nn.Module:
    """Give the model its dense layers back, with an expert merged in, or as the base model; in place, and returned.

    expert: a name in the bank, an `Expert`, or None: the base model, bit for bit where the form was delta, within rounding where factored
    Raises ValueError if the model is not patched, or if an expert shall be merged into a quantised layer or a mixture-of-experts stack
    that cannot hold it; the model is then still patched.
    """
    bank = getattr(model, "t2_bank", None)
    if bank is None:
        raise ValueError("the model is not patched")
    with torch.no_grad():
        row = 0
        if expert is not None:
            for layer, names in bank.layers:
                if (
                    layer.form == "delta"
                    and is_quantised(_owner(model, names[0]))
                    and not isinstance(layer, moe.DeltaStack)
                ):
                    raise ValueError(
                        f"{names[0]} is quantised, so an expert cannot be merged into it; dequantise the model first"
                    )
            if isinstance(expert, Expert):
                name = "(merged)"
                bank.add(name, expert, replace=True)
                expert = name
            ids = bank.ids(expert)  # held while its row is read
            row = int(ids)
            for layer, _ in bank.layers:
                layer.table()  # an expert in training writes its row
        for layer, names in bank.layers:
            path = names[0]
            if isinstance(layer, FactoredLinear):
                _replace(model, path, layer.restore(row))
            elif isinstance(layer, moe.DeltaStack):
                path, tensor, _ = names[0].rsplit(".", 2)
                module = model.get_submodule(path)
                if row:
                    moe.merge(module, tensor, layer, row)
                moe.detach(module, tensor)
            else:
                module = model.get_submodule(path)
                if row:
                    _merge_delta(module, layer, row)
                _detach_delta(module)
        undress(model)
        unfuse(model.modules())
    return model


def choose_form(
    matrix: Matrix,
    support: int,
    form: str = "auto",
    factors: torch.dtype = torch.float32,
    dense: torch.dtype = torch.float32,
) -> tuple[str, str]:
    """(form, why) for a matrix of which an expert may rescale `support` components.

    Bytes read for a token, over those of the dense layer's MN numbers: factored s (M + N) R / MN, delta 1 + s k (M + N) / MN, where a number
    of the factors takes s times the bytes of a dense one (int8 beside bf16: 0.5, residual columns left out).
    """
    if matrix.index is not None:
        if form == "factored":
            raise ValueError(
                f"{matrix.name}: mixture-of-experts stacks are patched in delta form; use form='delta' or 'auto', or leave them out"
            )
        return "delta", "mixture-of-experts stack"
    if form != "auto":
        return form, "asked for"
    if is_quantised(matrix.module):
        return "delta", "quantised layer"
    return cheaper_form(*matrix.shape, support, dense.itemsize, factors.itemsize)


def _refuse(m: Matrix, form: str, factors: Mapping[str, Factor] | None) -> None:
    hook = getattr(m.module, "_hf_hook", None)
    weight = getattr(m.module, m.tensor.rpartition(".")[2], None)
    if getattr(hook, "offload", False) or (hook is not None and isinstance(weight, torch.Tensor) and weight.is_meta):
        raise ValueError(f"{m.name} is offloaded; load the model without offloading, or patch before dispatching it")
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        raise ValueError(f"{m.name} is on the meta device: it has no weights yet; load the model first")
    if form == "factored" and is_quantised(m.module):
        raise ValueError(
            f"{m.name} is quantised ({type(m.module).__name__}): the factored form would drop its weight; use form='delta'"
        )
    if form == "factored" and hook is not None:
        raise ValueError(f"{m.name} carries a dispatch hook that the factored form would lose; use form='delta'")
    if factors is not None:
        if m.name not in factors:
            raise ValueError(
                f"the factors hold nothing for {m.name}; decompose with the same targets, or pass fewer targets"
            )
    elif m.index is None and not is_quantised(m.module) and not torch.isfinite(weight).all():
        raise ValueError(f"{m.name} holds NaN or infinity; its checkpoint is damaged")


def _kinds(
    model, matrices: Mapping[str, Matrix], format: str | None, factors: Mapping | None
) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """By matrix: in which dtype its factors will be, and its dense weight is, or is computed in."""
    dtype, kinds = _dtype(model), {}
    stored = getattr(factors, "manifest", {}).get("matrices", {})
    for name, m in matrices.items():
        dense = (
            dtype
            if is_quantised(m.module) and m.index is None
            else getattr(m.module, m.tensor.rpartition(".")[2]).dtype
        )
        int8 = stored[name].get("dtype") == "int8" if name in stored else type((factors or {}).get(name)) is Int8Factor
        kinds[name] = FORMATS[format] if format else torch.int8 if int8 else dense, dense
    return kinds


def _factor(
    m: Matrix,
    form: str,
    support: int,
    factors: Mapping[str, Factor] | None,
    origin: Origin,
    format: str | None,
    max_error: float | None,
) -> Factor | Int8Factor:
    """The factors of one matrix as its layer will hold them: every component in factored form, the support in delta form."""
    wanted = m.rank if form == "factored" else support
    if factors is None:
        factor = svd(m.read(), wanted)
        origin.record(m.name, factor)  # as they were before rounding: an expert knows nothing of formats
        if format:
            # In delta form the rows sigma (z - 1) are 0 where an expert changes nothing, and would not make anything good.
            factor, _ = convert(m.name, factor, format, max_error, compensate=form == "factored")
    else:
        factor = factors[m.name]
        got = (factor.U.shape[0], factor.V.shape[0])
        if got != m.shape:
            raise ValueError(f"{m.name} is {list(m.shape)}, its factors are of {list(got)}: they are of another model")
        if factor.sigma.shape[0] < wanted:
            raise ValueError(
                f"{m.name}: the factors hold {factor.sigma.shape[0]} components, {form} form needs {wanted} here; decompose with more"
            )
        _same_weights(m, factor)
        known = isinstance(factors, Factors)
        origin.record(
            m.name, factor, factors.fingerprints[m.name] if known else None, factors.sketches[m.name] if known else None
        )
    device = getattr(m.module, m.tensor.rpartition(".")[2]).device
    return factor.cut(wanted).to(device)


def _same_weights(m: Matrix, factor: Factor | Int8Factor) -> None:
    """W v_1 = sigma_1 u_1 for the leading component, as far as the formats allow: one product, and foreign factors are found out."""
    try:
        W = m.read()
    except ValueError:
        return  # a format that cannot be read: the caller's factors are all there is
    u, s, v = (t.to(W.device, torch.float32) for t in (factor.U[:, 0], factor.sigma[0], factor.V[:, 0]))
    int8 = isinstance(factor, Int8Factor)
    if int8:
        u, v = u / u.norm(), v / v.norm()
    off = (W.float() @ v - s * u).norm() / s
    # Rounding a random matrix to bf16 moves sigma_1 u_1 by 2e-3, to 4 bits by 0.15 (measured on Gaussian 512x512); foreign factors by about 1.
    # An int8 column without its residual one is off by 0.01 of itself, a spiky one by 0.08 (measured on MiniLM).
    if off > (0.3 if is_quantised(m.module) or int8 else 0.02):
        raise ValueError(
            f"{m.name}: these factors are of other weights (||W v_1 - sigma_1 u_1|| = {off:.2g} sigma_1); decompose this model"
        )


def _by_module(matrices: Mapping[str, Matrix]) -> OrderedDict[tuple[str, str], list[Matrix]]:
    """Matrices that share a layer: one, or the slices of a stack (all of them, in order)."""
    groups: OrderedDict[tuple[str, str], list[Matrix]] = OrderedDict()
    for m in matrices.values():
        groups.setdefault((m.path, m.tensor.rpartition(".")[2]), []).append(m)
    for (path, tensor), members in groups.items():
        if members[0].index is not None and len(members) != getattr(members[0].module, tensor).shape[0]:
            raise ValueError(
                f"{path}.{tensor}: select all weights of a mixture-of-experts stack, or none; {len(members)} were selected"
            )
    return groups


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.get_default_dtype()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rsplit(".", 2)[0])


def _detach_delta(module: nn.Module) -> None:
    del module.svf
    remove_hook(module, delta_hook)


def _merge_delta(module: nn.Module, layer: DeltaLinear, row: int) -> None:
    change = (layer.U.float() * layer.scale[row]) @ layer.Vt.float()  # [M, N]
    module.weight.add_((change.t() if isinstance(module, Conv1D) else change).to(module.weight.device))
