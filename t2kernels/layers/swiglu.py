"""down(silu(gate(x)) * up(x)) with the activation inside the skinny kernel of gate and up: neither of the two is written to memory.

An MLP takes part if it has gate_proj, up_proj, down_proj and a SiLU, if its forward is this formula (tried, not guessed), and if nothing else
hooks into gate or up. It gets a subclass of its own class; wherever the kernel is not what would run, its own forward does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from t2kernels.ops.dispatch import may_fuse_swiglu

from .linear import DeltaLinear, FactoredLinear, delta_hook
from .subclass import Mixin, put_before, take_off

SILU = ("SiLU", "SiLUActivation")


class FusedMLP(Mixin):
    """Mixed into the class of an MLP."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        inner = _inner(self, x) if not args and not kwargs else None
        return super().forward(x, *args, **kwargs) if inner is None else self.down_proj(inner)


def fuse(model: nn.Module) -> list[nn.Module]:
    """Let the MLPs of a patched model that compute the formula do so through the kernel, where the planner picks it; returns them."""
    found = [m for m in model.modules() if _has_the_parts(m) and not isinstance(m, FusedMLP)]
    right = {cls: _computes_the_formula(m) for cls, m in {type(m): m for m in found}.items()}
    found = [m for m in found if right[type(m)]]
    for m in found:
        put_before(FusedMLP, m)
    return found


def unfuse(modules: Iterable[nn.Module]) -> None:
    """Undo `fuse`, for every module that it changed among these."""
    for m in modules:
        take_off(FusedMLP, m)


def _has_the_parts(m: nn.Module) -> bool:
    gate, up, act = (getattr(m, n, None) for n in ("gate_proj", "up_proj", "act_fn"))
    layers = [_layer(p) for p in (gate, up)]
    if None in layers or not hasattr(m, "down_proj") or type(act).__name__ not in SILU:
        return False
    return (
        layers[0].group is not None
        and layers[0].group.layers == tuple(layers)
        and layers[0].U.shape[0] == layers[1].U.shape[0]
    )


def _layer(module: object) -> DeltaLinear | FactoredLinear | None:
    if isinstance(module, FactoredLinear):
        return module
    layer = getattr(module, "svf", None)
    return layer if isinstance(layer, DeltaLinear) else None


@torch.no_grad()
def _computes_the_formula(m: nn.Module) -> bool:
    """On two tokens, base model: its own forward against the formula, bit for bit."""
    like = _layer(m.gate_proj)
    dtype = next((p.dtype for p in m.parameters() if p.is_floating_point()), like.U.dtype)
    N = like.Vt.shape[-1]
    x = (
        torch.linspace(-2, 2, 2 * N, device=like.U.device).reshape(2, N).to(dtype)
    )  # no random numbers: patching leaves the generator alone
    try:
        return torch.equal(m(x), m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))
    except Exception:  # another signature, another shape of input: whatever it is, it is not the formula
        return False


def _inner(m: nn.Module, x: Tensor) -> Tensor | None:
    """silu(gate(x)) * up(x) from the kernel, or None where it is not to be used."""
    if not may_fuse_swiglu(x.device):
        return None
    gate, up = m.gate_proj, m.up_proj
    layers = _layer(gate), _layer(up)
    if None in layers or layers[0].group is None or torch.is_autocast_enabled(x.device.type):
        return None
    delta = isinstance(layers[0], DeltaLinear)
    if any(
        list(p._forward_pre_hooks) or [h for h in p._forward_hooks.values() if h is not delta_hook] for p in (gate, up)
    ):
        return None
    bases = (lambda: [type(p).forward(p, x) for p in (gate, up)]) if delta else None
    return layers[0].group.swiglu(x, layers[0].routing.active, bases)
