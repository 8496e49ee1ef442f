"""The operator: one equation, one reference, several implementations behind one seam."""

from .planner import Choice
from .reference import svf_linear_ref
from .svf_linear import ImplUnavailableError, plan, svf_linear, svf_linear_group

__all__ = ["Choice", "ImplUnavailableError", "plan", "svf_linear", "svf_linear_group", "svf_linear_ref"]
