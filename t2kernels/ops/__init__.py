"""The operator: one equation, one reference, several implementations behind one seam."""

from .op import ImplUnavailableError, plan, svf_linear, svf_linear_group
from .planner import Choice
from .reference import svf_linear_ref

__all__ = ["Choice", "ImplUnavailableError", "plan", "svf_linear", "svf_linear_group", "svf_linear_ref"]
