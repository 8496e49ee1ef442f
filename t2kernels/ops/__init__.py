"""The operator: one equation, one reference, several implementations behind one seam."""

from .reference import svf_linear_ref
from .svf_linear import ImplUnavailableError, choose_impl, svf_linear, svf_linear_group

__all__ = ["ImplUnavailableError", "choose_impl", "svf_linear", "svf_linear_group", "svf_linear_ref"]
