"""Log-probabilities of tokens, entropy and KL of rows of logits x, without a copy of the logits in fp32.

    log p = x / t - lse,    lse = log Σ_v e^(x_v / t),    log q the same of the base model's logits
    entropy = -Σ p log p
    KL      = Σ p (log p - log q)    "reverse",    or    Σ q (log q - log p)    "forward"

With the gradients g_k of log p of token k, and g of the KL:

    t dx = p (g (log p - log q - KL) - Σ_k g_k) + Σ_k g_k [v = token_k]    "reverse"
    t dx = p (g - Σ_k g_k) - g q               + Σ_k g_k [v = token_k]    "forward"

The forward reads a row of logits twice: the first time for lse, the second for the sums. 128,256 logits in bfloat16 are
250 KB, which the second time are in L2. Torch's own functions write five tensors of fp32 of the logits' size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2kernels.ops.tuning.tiles import cdiv

from .common import INTERPRETED, Launch, put

BLOCK = 2048
"""Logits that a program reads at once: eight of 16 bits for each of its 256 threads."""


@triton.jit
def log_sum_exp(ptrs, V, t, BR: tl.constexpr):
    """log Σ_v e^(x_v / t) of one row. Each lane keeps a maximum and a sum of its own until the end."""
    r = tl.arange(0, BR)
    best = tl.full((BR,), -3.0e38, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, V, BR):
        x = tl.load(ptrs + start + r, mask=start + r < V, other=-float("inf")).to(tl.float32) / t
        new = tl.maximum(best, x)
        total = total * tl.exp(best - new) + tl.exp(x - new)
        best = new
    top = tl.max(best, 0)
    return top + tl.log(tl.sum(total * tl.exp(best - top), 0))


@triton.jit
def token_scores_kernel(
    x_ptr, base_ptr, lse_ptr, base_lse_ptr, entropy_ptr, kl_ptr, V, x_row, base_row, t,
    REVERSE: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """lse, entropy and, if base_ptr is given, base_lse and KL of one row."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    xs = x_ptr + row * x_row
    lse = log_sum_exp(xs, V, t, BR)
    tl.store(lse_ptr + row, lse)
    base_lse = lse
    bases = xs
    if base_ptr is not None:
        bases = base_ptr + row * base_row
        base_lse = log_sum_exp(bases, V, t, BR)
        tl.store(base_lse_ptr + row, base_lse)
    entropy = tl.zeros((BR,), tl.float32)
    kl = tl.zeros((BR,), tl.float32)
    for start in range(0, V, BR):
        there = start + r < V
        log_p = tl.load(xs + start + r, mask=there, other=-float("inf")).to(tl.float32) / t - lse
        p = tl.exp(log_p)
        entropy -= tl.where(p > 0, p * log_p, p)  # 0 log 0 = 0; NaN stays NaN
        if base_ptr is not None:
            log_q = tl.load(bases + start + r, mask=there, other=-float("inf")).to(tl.float32) / t - base_lse
            if REVERSE:
                kl += tl.where(p > 0, p * (log_p - log_q), p)
            else:
                q = tl.exp(log_q)
                kl += tl.where(q > 0, q * (log_q - log_p), q)
    tl.store(entropy_ptr + row, tl.sum(entropy, 0))
    if base_ptr is not None:
        tl.store(kl_ptr + row, tl.sum(kl, 0))


@triton.jit(do_not_specialize=["K"])
def token_scores_backward_kernel(
    x_ptr, base_ptr, lse_ptr, base_lse_ptr, kl_ptr, tokens_ptr, taken_ptr, total_ptr, g_ptr, out_ptr,
    V, K, x_row, base_row, out_row, t, REVERSE: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """dx of BR logits of one row. taken: [T, K], g_k; total: [T], Σ_k g_k; g: [T]."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    there = r < V
    log_p = tl.load(x_ptr + row * x_row + r, mask=there, other=-float("inf")).to(tl.float32) / t - tl.load(
        lse_ptr + row
    )
    p = tl.exp(log_p)
    total = tl.load(total_ptr + row)
    if base_ptr is not None:
        g = tl.load(g_ptr + row)
        log_q = tl.load(base_ptr + row * base_row + r, mask=there, other=-float("inf")).to(tl.float32) / t
        log_q -= tl.load(base_lse_ptr + row)
        if REVERSE:
            grad = tl.where(p > 0, p * (g * (log_p - log_q - tl.load(kl_ptr + row)) - total), p)
        else:
            grad = p * (g - total) - g * tl.exp(log_q)
    else:
        grad = -p * total
    for k in range(K):
        grad += tl.where(r == tl.load(tokens_ptr + row * K + k), tl.load(taken_ptr + row * K + k), 0.0)
    put(out_ptr + row * out_row + r, grad / t, there, INTERPRETED)


class Read(NamedTuple):
    """What the backward needs of the forward, [T] fp32 each: log-normalisers of both logits, the entropy, the KL."""

    lse: Tensor
    base_lse: Tensor | None
    entropy: Tensor
    kl: Tensor | None


def forward_launch(x: Tensor, base: Tensor | None, out: Read, t: float, reverse: bool) -> Launch:
    """x, base: [T, V], their last size contiguous -> the tensors of `out`."""
    T, V = x.shape
    return Launch(
        token_scores_kernel,
        (T,),
        dict(
            x_ptr=x, base_ptr=base, lse_ptr=out.lse, base_lse_ptr=out.base_lse, entropy_ptr=out.entropy, kl_ptr=out.kl,
            V=V, x_row=x.stride(0), base_row=0 if base is None else base.stride(0), t=t,
        ),
        dict(REVERSE=reverse, BR=BLOCK),
        dict(num_warps=8),
    )  # fmt: skip


def backward_launch(
    x: Tensor, base: Tensor | None, read: Read, tokens: Tensor, taken: Tensor, total: Tensor, g: Tensor | None,
    out: Tensor, t: float, reverse: bool
) -> Launch:  # fmt: skip
    """tokens, taken: [T, K]; total, g: [T] fp32 -> out [T, V]."""
    T, V = x.shape
    return Launch(
        token_scores_backward_kernel,
        (T, cdiv(V, BLOCK)),
        dict(
            x_ptr=x, base_ptr=base, lse_ptr=read.lse, base_lse_ptr=read.base_lse, kl_ptr=read.kl, tokens_ptr=tokens,
            taken_ptr=taken, total_ptr=total, g_ptr=g, out_ptr=out, V=V, K=tokens.shape[1], x_row=x.stride(0),
            base_row=0 if base is None else base.stride(0), out_row=out.stride(0), t=t,
        ),
        dict(REVERSE=reverse, BR=BLOCK, INTERPRETED=INTERPRETED),
        dict(num_warps=8),
    )  # fmt: skip


def forward(x: Tensor, base: Tensor | None, temperature: float, direction: str) -> Read:
    """x, base: [T, V] fp32, bf16 or fp16, the last size contiguous; direction: "reverse" or "forward"."""

    def empty(wanted: bool) -> Tensor | None:
        return x.new_empty(len(x), dtype=torch.float32) if wanted else None

    out = Read(*(empty(True), empty(base is not None), empty(True), empty(base is not None)))  # type: ignore[arg-type]
    forward_launch(x, base, out, temperature, direction == "reverse").run()
    return out


def backward(
    x: Tensor, base: Tensor | None, read: Read, tokens: Tensor, taken: Tensor, g: Tensor | None, temperature: float,
    direction: str,
) -> Tensor:  # fmt: skip
    """dx [T, V] in x's dtype. tokens: [T, K] int64; taken: [T, K] fp32, g_k; g: [T] fp32, of the KL, or None."""
    taken, out = taken.float().contiguous(), torch.empty_like(x)
    total = taken.sum(1)
    g = None if g is None or base is None else g.float().contiguous()
    backward_launch(x, base, read, tokens.contiguous(), taken, total, g, out, temperature, direction == "reverse").run()
    return out
