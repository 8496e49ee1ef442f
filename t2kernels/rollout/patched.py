"""The expert bank of a patched model."""

from __future__ import annotations

from torch import nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank


def bank_of(model: nn.Module) -> ExpertBank:
    """The bank of a model that `patch_model` has patched. Raises ValueError for any other model."""
    bank = getattr(model, "t2_bank", None)
    if bank is None:
        raise InputError("the model is not patched: bank = t2kernels.patch_model(model) first")
    return bank
