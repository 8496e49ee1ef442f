"""Whether a base layer lets a gradient through to its input.

Training z needs d(x Wᵀ)/dx of every base layer in delta form. Some quantised layers have no backward, or a wrong one,
and say nothing: torchao with dynamically quantised activations returns 0, bitsandbytes nf4 on a CPU returns noise once
it has packed its weight. The probe asks the layer itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from t2kernels.factors.matrices import is_plain
from t2kernels.layers.delta_forward import dense_class

DIRECTIONS = 24
CORRELATION = 0.9
"""Smallest correlation of predicted and seen changes. A right gradient of an int8 layer gives .99, of nf4 .99; a wrong
one gives 0 within .2."""
SLOPE = 1.35
"""Largest factor between predicted and seen changes. 24 directions tell it to 10 % where they correlate least."""


def is_ordinary(module: nn.Module) -> bool:
    """True for a layer of torch or transformers with a floating-point weight and its own forward: nothing to probe."""
    return dense_class(module) in (nn.Linear, Conv1D) and "forward" not in vars(module) and is_plain(module.weight)


def format_of(module: nn.Module) -> tuple[Any, ...]:
    """The type of a module and the format of its weight: layers of one format answer `unsupported_gradient` alike."""
    weight: Any = module.weight
    names = ("dtype", "quant_type", "act_quant_kwargs", "tensor_impl")
    details = [str(getattr(weight, name, "")).partition("(")[0] for name in names]
    forward = getattr(vars(module).get("forward"), "__qualname__", None)  # of this module alone, as accelerate sets it
    return dense_class(module), forward, type(weight), type(getattr(weight, "original_weight_tensor", None)), *details


def unsupported_gradient(module: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a linear module's gradient to its input cannot be trusted, or None.

    f(x + d) - f(x) along random directions d must follow from the gradient of <r, f(x)>: d · grad = <r, f(x + d) -
    f(x)>. The module runs without gradients first, as it does in every rollout: some layers pack their weight then.

    module: linear in its input [T, in_features]; dtype, device: of that input. The global random generator is left
        alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    x, moved = draw(4, in_features), draw(DIRECTIONS, 4, in_features)
    mode = module.training
    module.eval()  # as in a rollout
    try:
        return _compare(module, x, moved, generator)
    finally:
        module.train(mode)


def _compare(module: nn.Module, x: Tensor, moved: Tensor, generator: torch.Generator) -> str | None:
    with torch.no_grad():
        before = module(x).double()
        r = torch.randn(before.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
        seen = torch.stack([(r * (module(x + d).double() - before)).sum() for d in moved])
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        if not y.requires_grad:
            return "its output has no gradient"
        try:
            (gradient,) = torch.autograd.grad((r.to(y.dtype) * y).sum(), leaf, allow_unused=True)
        except (RuntimeError, NotImplementedError) as e:
            return f"its backward fails: {str(e).splitlines()[0]}"
    if gradient is None or not gradient.any():
        return "the gradient of its input is zero"
    if not gradient.isfinite().all():
        return "the gradient of its input is not finite"
    predicted = torch.stack([(gradient.double() * d.double()).sum() for d in moved])
    slope = ((predicted @ seen) / (predicted @ predicted)).item()
    correlation = torch.corrcoef(torch.stack([predicted, seen]))[0, 1].item()
    if not correlation >= CORRELATION:
        return (
            "the gradient of its input is wrong (it predicts the output's changes with a correlation of "
            f"{correlation:.2f}; expected 1)"
        )
    if not 1 / SLOPE <= slope <= SLOPE:
        size = "small" if slope > 1 else "large"
        return f"the gradient of its input is too {size}, by a factor of {max(slope, 1 / slope):.2g}"
    return None
