"""The specification: slow, obvious, plain torch. Every implementation is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def svf_linear_ref(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    scale: Tensor,
    expert_ids: Tensor,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = base + ((x V) * scale[expert_ids]) Uᵀ + bias, token by token in at least fp32, rounded once at the end.

    Arguments and result as in `svf_linear`. Every argument gets a gradient, U and V too. Source: arXiv 2501.06252,
    section 3.1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    ids = expert_ids.long()
    ids = ids.reshape(ids.shape + (1,) * (x.dim() - 1 - ids.dim())).expand(x.shape[:-1])
    h = x.to(wide) @ V.to(wide)  # [..., R]
    y = (h * scale.to(wide)[ids]) @ U.to(wide).t()  # [..., M]
    if base is not None:
        y = y + base.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
