"""From an expert's z to a row of a layer's scale table: scale = sigma * z (factored) or sigma * (z - 1) (delta).

Transformer² (arXiv 2501.06252, section 3.1): W' = U diag(sigma * z) Vᵀ. Kernels see scale, never z or sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels import InputError


def make_scale(z: Tensor, sigma: Tensor, form: str) -> Tensor:
    """The row of a table that an expert has: sigma * z ("factored") or sigma * (z - 1) ("delta").

    z: [..., <= R], padded with 1
    sigma: [..., R] singular values
    Returns [..., R] fp32, differentiable in z. Raises ValueError for another form, or if z is longer than sigma.
    """
    if z.shape[:-1] != sigma.shape[:-1] or z.shape[-1] > sigma.shape[-1]:
        raise InputError(
            f"make_scale: z {list(z.shape)} does not fit sigma {list(sigma.shape)}; cut z first "
            "(truncation_error says what that loses)"
        )
    z, sigma = torch.nn.functional.pad(z.float(), (0, sigma.shape[-1] - z.shape[-1]), value=1.0), sigma.float()
    if form == "factored":
        return sigma * z
    if form == "delta":
        return sigma * (z - 1)
    raise InputError(f"make_scale: form={form!r}; wanted 'factored' or 'delta'")


def truncation_error(z: Tensor, sigma: Tensor, k: int) -> float:
    """||dW - dW_k|| / ||dW|| in the spectral norm, if only the first k components are kept:

        max_{i >= k} sigma_i |z_i - 1| / max_i sigma_i |z_i - 1|

    z: [<= R]; sigma: [>= len(z)]
    Returns 0 if nothing is lost. Raises ValueError if sigma is shorter than z.
    """
    if z.numel() > sigma.numel():
        raise InputError(
            f"truncation_error: z has {z.numel()} components, sigma {sigma.numel()}; wanted the full spectrum"
        )
    change = sigma[: z.numel()].double() * (z.to(sigma.device).double() - 1).abs()
    lost = change[k:].max().item() if z.numel() > k else 0.0
    return lost / change.max().item() if lost else 0.0


def z_from_logits(p: Tensor, sigma: Tensor) -> Tensor:
    """The authors' parametrisation: m = sigmoid(p), z = m Σ sigma / Σ(sigma m), which keeps Σ sigma_i z_i.

    p, sigma: [..., R]
    A uniform p is the base model. A factor common to all of m, as the release's `max_mult`, cancels.
    A matrix of zeros keeps z = 1, whatever p is. Computed in at least fp32.
    Returns z [..., R], differentiable in p. Raises ValueError if the shapes differ. Source: Transformer²'s release.
    """
    if p.shape != sigma.shape:
        raise InputError(f"z_from_logits: wanted p and sigma of one shape, got {list(p.shape)} and {list(sigma.shape)}")
    m = torch.sigmoid(p.to(torch.promote_types(p.dtype, torch.float32)))
    largest = sigma.amax(-1, keepdim=True) if sigma.shape[-1] else sigma.sum(-1, keepdim=True)
    share = (sigma / torch.where(largest > 0, largest, 1)).to(m)  # so that no sum of tiny sigma is rounded to 0
    kept = (share * m).sum(-1, keepdim=True)
    z = m * (share.sum(-1, keepdim=True) / torch.where(kept > 0, kept, 1))
    return torch.where(largest > 0, z, 1)
