"""t2kernels: SVF experts of Transformer² as rows of a table. The public names, nothing else; importing does nothing."""

from .bank import ExpertBank
from .decompose import decompose
from .expert import Expert, ExpertError, ExpertMismatch
from .factors import Factor, Factors
from .ops import svf_linear, svf_linear_group, svf_linear_ref
from .patch import patch_model, unpatch_model

__all__ = [
    "Expert",
    "ExpertBank",
    "ExpertError",
    "ExpertMismatch",
    "Factor",
    "Factors",
    "decompose",
    "patch_model",
    "svf_linear",
    "svf_linear_group",
    "svf_linear_ref",
    "unpatch_model",
]
