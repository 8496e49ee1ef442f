"""The op `svf_linear`: one equation, one reference, several implementations in one table (dispatch.py)."""

from .dispatch import ImplUnavailableError, plan
from .op import svf_linear, svf_linear_group
from .planner import Choice
from .reference import svf_linear_ref

__all__ = ["Choice", "ImplUnavailableError", "plan", "svf_linear", "svf_linear_group", "svf_linear_ref"]
