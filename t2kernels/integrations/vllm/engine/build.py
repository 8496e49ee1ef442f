"""`build_delta`: give the linear layers of a model that vLLM has loaded their factors and tables, in delta form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.requests import STACK
from t2kernels.integrations.vllm.settings import Settings
from t2kernels.layers.linear import SVFLinear
from t2kernels.layers.routing.active import Routing

from .adapter_path import follow
from .check import origin_of
from .lora_layers import ExpertPath, Member, adapt, check_weights, delta_member, members_of

logger: logging.Logger = logging.getLogger(__name__)


def build_delta(
    model: nn.Module, factors: Factors, settings: Settings, rows: int, token_rows: Tensor, dtype: torch.dtype
) -> ExpertBank:
    """Wrap every linear layer of `model` that the factors hold a matrix of, in delta form.

    model: loaded by vLLM; factors: those at `settings.factors`; rows: of the tables
    token_rows: [most tokens of a step] int32, on the device: the row of each token, written by the manager
    dtype: of the activations
    Returns the bank. Raises ValueError for factors of matrices that the model does not have, of other shapes, or of
    other weights.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    if settings.fingerprint not in (None, factors.fingerprint):
        raise InputError(
            f"{settings.factors}: these factors are not those that the engine was configured with; "
            "call engine_args again"
        )
    device, cut = token_rows.device, factors.cut(settings.rank)
    names = checkpoint_names(model, factors)
    packed, routing = getattr(model, "packed_modules_mapping", {}), Routing()
    found: list[tuple[Any, list[Member], list[SVFLinear]]] = []
    pairs: list[tuple[SVFLinear, tuple[str, ...]]] = []
    with torch.no_grad():
        for path, layer in model.named_modules():
            if not isinstance(layer, LinearBase) or not any(n in names for n in _all_names(path, packed)):
                continue
            members = [m for m in members_of(path, layer, packed) if m.name in names]
            made = []
            for m in members:
                name = names.pop(m.name)
                if factors.shape(name) != m.shape:
                    raise InputError(
                        f"{name}: the factors are of a matrix {list(factors.shape(name))}, the model has "
                        f"{list(m.shape)}; decompose the checkpoint that is served"
                    )
                factor = cut[name]
                check_weights(
                    layer, m, factor, dtype, device, not isinstance(layer.quant_method, UnquantizedLinearMethod)
                )
                made.append(delta_member(factor, m, rows, dtype, routing, device))
                pairs.append((made[-1], (name,)))
            found.append((layer, members, made))
    left = [n for n in names.values() if STACK not in n]
    if left or not pairs:
        some = ", ".join(left[:4]) or "none at all"
        raise InputError(
            f"{len(left)} matrices of the factors at {settings.factors} are not linear layers of "
            f"{type(model).__name__}: {some}; decompose the checkpoint that is served, with targets that it has"
        )
    bank = ExpertBank(pairs, rows, origin_of(factors), routing, {n: ("delta", "vLLM") for _, (n,) in pairs})
    paths = [ExpertPath(members, made, layer.output_partition_sizes, token_rows) for layer, members, made in found]
    for (layer, _, _), path in zip(found, paths, strict=True):
        adapt(layer, path)
    follow(bank, paths)
    logger.info("SVF experts at %d layers: %s", len(found), bank.describe())
    return bank


def checkpoint_names(model: nn.Module, factors: Factors) -> dict[str, str]:
    """{name of a matrix in vLLM's model: its name in the checkpoint}. vLLM renames some when it loads them."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    return {
        (name if mapper is None else mapper.map_name(f"{name}.weight").removesuffix(".weight")): name
        for name in factors
    }


def _all_names(path: str, packed: Mapping[str, list[str]]) -> list[str]:
    """The matrices that vLLM merged into the layer at `path`."""
    parent, _, leaf = path.rpartition(".")
    return [f"{parent}.{n}" for n in packed.get(leaf, [leaf])]
