"""What the loss reads from logits: log-probabilities of tokens, the entropy, and the exact KL to the base model.

On a GPU a Triton kernel reads the logits in their own dtype, if it gives there what torch's functions give; elsewhere
these do, in fp32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2kernels.ops.dispatch import device_of
from t2kernels.rollout.generation import log_probs
from t2kernels.train.loss import kl_divergence

logger: logging.Logger = logging.getLogger(__name__)
KERNEL_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def read(
    logits: Tensor,
    base: Callable[[], Tensor] | None,
    tokens: Tensor,
    temperature: float,
    direction: str,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log p [T, K] of the tokens, entropy [T], KL [T] or None), all fp32 or wider, with p = softmax(logits / t).

    logits: [T, vocabulary], of the policy; base: makes those of the base model, without a gradient; None: no KL
    tokens: [T, K] int64; temperature: t, 0 counts as 1; direction: "reverse", KL(p | q), or "forward"
    fused: by the Triton kernel; None: as `is_fused` says. Entropy has no gradient.
    """
    settings = tokens, temperature or 1.0, direction
    if is_fused(logits) if fused is None else fused:
        taken, entropy, kl = _Fused.apply(logits, None if base is None else base(), *settings)
    else:
        # base's logits end here: they do not live beside their log-probabilities
        taken, entropy, kl = _Torch.apply(logits, None if base is None else log_probs(base(), settings[1]), *settings)
    return taken, entropy, None if base is None else kl


def is_fused(logits: Tensor) -> bool:
    """Whether the Triton kernel reads these logits."""
    return logits.is_cuda and logits.dtype in KERNEL_DTYPES and agrees(logits.device)


@functools.cache
def agrees(device: torch.device) -> bool:
    """Whether the kernel gives on a device what torch's functions give, forward and backward. Tried once."""
    if device_of(device).unsupported("triton") is not None:
        return False
    generator = torch.Generator(device).manual_seed(0)
    x = 3 * torch.randn(5, 4099, device=device, generator=generator)
    base = x + torch.randn(x.shape, device=device, generator=generator)
    tokens = torch.randint(0, 4099, (5, 2), device=device, generator=generator)
    try:
        for direction in ("reverse", "forward"):
            found = []
            for fused in (True, False):
                leaf = x.clone().requires_grad_(True)
                with torch.enable_grad():
                    taken, entropy, kl = read(leaf, lambda: base, tokens, 0.7, direction, fused)
                    assert kl is not None
                    (gradient,) = torch.autograd.grad(taken.sum() + kl.sum(), leaf)
                found.append((taken.detach(), entropy, kl.detach(), gradient))
            for mine, wanted in zip(*found, strict=True):
                torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    except Exception as e:  # of the compiler, of a launch, of the comparison: torch's functions always work
        logger.warning("the loss is computed by torch on %s; its kernel failed there: %r", device, e)
        return False
    return True


def bytes_of_a_logit(states: Tensor) -> int:
    """Bytes that live at once for each logit made of hidden states.

    For torch's functions: logits, two log-probabilities and three temporaries in fp32 or wider. For the kernel: the
    logits of policy and base model and the gradient, in their own dtype.
    """
    if is_fused(states):
        return 3 * states.dtype.itemsize
    return 6 * torch.promote_types(states.dtype, torch.float32).itemsize


class _Torch(torch.autograd.Function):
    """Gradient to the logits: p (g_kl (log p - log q - KL) - Σ_k g_k) + Σ_k g_k at token k, over t."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, log_base: Tensor | None, tokens: Tensor, temperature: float, direction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_pi = log_probs(logits, temperature)
        taken = log_pi.gather(1, tokens)
        entropy = torch.special.entr(log_pi.exp()).sum(1)
        kl = torch.zeros_like(entropy)
        if log_base is not None:
            kl = kl_divergence(log_pi, log_base, direction)
        ctx.save_for_backward(log_pi, log_base, tokens, kl)
        ctx.settings = (temperature, direction, logits.dtype)
        ctx.mark_non_differentiable(entropy)
        return taken, entropy, kl

    @staticmethod
    def backward(ctx: Any, taken: Tensor, entropy: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        log_pi, log_base, tokens, value = ctx.saved_tensors
        temperature, direction, dtype = ctx.settings
        p = log_pi.exp()
        if log_base is None:
            grad = p * -taken.sum(1, keepdim=True)
        elif direction == "reverse":
            grad = (log_pi - log_base).sub_(value[:, None]).mul_(kl[:, None]).sub_(taken.sum(1, keepdim=True)).mul_(p)
            grad.masked_fill_(log_pi == -torch.inf, 0)  # 0 log 0 = 0
        else:
            grad = p.mul_((kl - taken.sum(1))[:, None]).addcmul_(log_base.exp(), kl[:, None], value=-1)
        grad.scatter_add_(1, tokens, taken)
        return grad.div_(temperature).to(dtype), None, None, None, None


class _Fused(torch.autograd.Function):
    """The same by `ops.impls.triton.token_scores`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, base: Tensor | None, tokens: Tensor, temperature: float, direction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        from t2kernels.ops.impls.triton import token_scores

        logits, base = logits.contiguous(), None if base is None else base.contiguous()
        found = token_scores.forward(logits, base, temperature, direction)
        kl = torch.zeros_like(found.entropy) if found.kl is None else found.kl
        ctx.save_for_backward(logits, base, tokens, found.lse, found.base_lse, found.entropy, found.kl)
        ctx.settings = (temperature, direction)
        ctx.mark_non_differentiable(found.entropy)
        return logits.gather(1, tokens).float() / temperature - found.lse[:, None], found.entropy, kl

    @staticmethod
    def backward(ctx: Any, taken: Tensor, entropy: Tensor, kl: Tensor) -> tuple[Tensor | None, ...]:
        from t2kernels.ops.impls.triton import token_scores

        logits, base, tokens, *kept = ctx.saved_tensors
        temperature, direction = ctx.settings
        read = token_scores.Read(*kept)
        return token_scores.backward(logits, base, read, tokens, taken, kl, temperature, direction), *[None] * 4
