"""`count_parameters`: the numbers that an SVF expert trains, and that LoRA would train, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from t2kernels import InputError
from t2kernels.factors.checkpoint import meta_model
from t2kernels.factors.factor import resolve_rank
from t2kernels.factors.matrices import Targets, find_matrices


@dataclass(frozen=True)
class ParameterCount:
    """Sizes of the adapters for one model.

    matrices: how many are adapted
    dense: numbers in them, Σ M N
    svf: numbers of one SVF expert, Σ k with k <= R = min(M, N)
    lora: numbers of one LoRA adapter of rank `lora_rank` on the same matrices, Σ lora_rank (M + N)
    """

    matrices: int
    dense: int
    svf: int
    lora: int
    lora_rank: int


def count_parameters(
    model: nn.Module | PretrainedConfig, targets: Targets = "all", rank: int | float | None = None, lora_rank: int = 16
) -> ParameterCount:
    """Count an SVF expert's Σ k numbers (Transformer², arXiv 2501.06252, section 3.1) and a LoRA adapter's Σ r (M + N).

    model: a model on any device, meta included; or a config, from which the model is made on the meta device
    targets, rank: as in `patch_model`
    lora_rank: r
    Raises ValueError if nothing is selected, if transformers has no model for the config, or for an invalid rank.
    """
    if isinstance(model, PretrainedConfig):
        model = meta_model(model)
    if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 1:
        raise InputError(f"lora_rank={lora_rank!r}; wanted an int of at least 1")
    shapes = [m.shape for m in find_matrices(model, targets).values()]
    return ParameterCount(
        matrices=len(shapes),
        dense=sum(M * N for M, N in shapes),
        svf=sum(resolve_rank(rank, min(shape)) for shape in shapes),
        lora=sum(lora_rank * (M + N) for M, N in shapes),
        lora_rank=lora_rank,
    )
