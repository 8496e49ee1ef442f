"""down(silu(gate(x)) * up(x)) with the activation inside the skinny kernel of gate and up.

Neither of the two outputs is then written to memory. An MLP takes part if it has gate_proj, up_proj, down_proj and a
SiLU, if its forward is this formula (tried out on two tokens), and if nothing else hooks into gate or up. It gets a
subclass of its own class. Its own forward runs whenever the kernel cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2kernels.ops.dispatch import may_fuse_swiglu

from . import subclass
from .delta_forward import dense
from .factored_linear import FactoredLinear
from .forward_hooks import has_other_hooks
from .linear import DeltaLinear, delta_hook
from .subclass import Mixin

SILU = ("SiLU", "SiLUActivation")


class FusedMLP(Mixin):
    """Mixed into the class of an MLP."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """down(silu(gate(x)) * up(x)) through the kernel, or by the forward of the MLP's own class."""
        inner = _inner(self, x) if not args and not kwargs else None
        return super().forward(x, *args, **kwargs) if inner is None else self.down_proj(inner)


def install(model: nn.Module) -> list[nn.Module]:
    """Let the MLPs of a patched model that compute the formula use the kernel. Returns the MLPs that were changed."""
    found = [m for m in model.modules() if _has_the_parts(m) and not isinstance(m, FusedMLP)]
    right = {cls: _computes_the_formula(m) for cls, m in {type(m): m for m in found}.items()}
    found = [m for m in found if right[type(m)]]
    for m in found:
        subclass.install(FusedMLP, m)
    return found


def remove(model: nn.Module) -> None:
    """Undo `install` for every MLP of the model."""
    for m in model.modules():
        subclass.remove(FusedMLP, m)


def _has_the_parts(m: Any) -> bool:
    gate, up = (_layer(getattr(m, n, None)) for n in ("gate_proj", "up_proj"))
    if (
        gate is None
        or up is None
        or not hasattr(m, "down_proj")
        or type(getattr(m, "act_fn", None)).__name__ not in SILU
    ):
        return False
    return gate.group is not None and gate.group.layers == (gate, up) and gate.U.shape[0] == up.U.shape[0]


def _layer(module: object) -> DeltaLinear | FactoredLinear | None:
    if isinstance(module, FactoredLinear):
        return module
    layer = getattr(module, "svf", None)
    return layer if isinstance(layer, DeltaLinear) else None


@torch.no_grad()
def _computes_the_formula(m: Any) -> bool:
    """On two tokens, base model: its own forward against the formula, bit for bit."""
    like: Any = _layer(m.gate_proj)
    dtype = next((p.dtype for p in m.parameters() if p.is_floating_point()), like.U.dtype)
    N = like.Vt.shape[-1]
    # no random numbers, so that patching leaves the generator as it is
    x = torch.linspace(-2, 2, 2 * N, device=like.U.device).reshape(2, N).to(dtype)
    try:
        return torch.equal(m(x), m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))
    except Exception:  # another signature or another shape of input: it is not the formula
        return False


def _inner(m: Any, x: Tensor) -> Tensor | None:
    """silu(gate(x)) * up(x) from the kernel; None if the MLP's own forward must run."""
    if torch.compiler.is_compiling() or not may_fuse_swiglu(x.device):  # a group shares nothing in a compiled model
        return None
    projections = m.gate_proj, m.up_proj
    gate, up = (_layer(p) for p in projections)
    if gate is None or up is None or gate.group is None or torch.is_autocast_enabled(x.device.type):
        return None
    if any(has_other_hooks(p, delta_hook if isinstance(gate, DeltaLinear) else None) for p in projections):
        return None
    route = gate.routing.active
    if isinstance(gate, FactoredLinear):
        ids = gate.base_ids if route is None else route.fit(x.shape[:-1]).to(x.device)
        return gate.group.swiglu(x, ids, None)
    if route is None:
        return None
    ids = route.fit(x.shape[:-1]).to(x.device)
    return gate.group.swiglu(x, ids, lambda: [dense(p, x) for p in projections])
