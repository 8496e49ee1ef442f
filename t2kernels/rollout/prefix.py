"""What many prompts begin with, computed once for each expert instead of once for each prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .generation import forward_inputs, kept_as

WORTH = 16
"""Common tokens below which a cache of their own saves nothing: copying it costs about as much as so few tokens."""


def hoist(ids: Tensor, mask: Tensor, worth: int = WORTH) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts, with the tokens that all of them begin with put before the padding.

    ids, mask: [B, S]. Returns the common prefix [P] (empty where it is shorter than `worth`), and ids and mask [B, S] as
    (prefix, padding, rest). Positions are counted by the mask, so the padding in between is not seen. At least one token stays in each rest.
    """
    starts = (mask.shape[1] - mask.sum(1)).tolist()
    rows = [row[s:].tolist() for row, s in zip(ids, starts, strict=True)]
    count = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    count = min(count, min(map(len, rows)) - 1)
    if count < worth or len(rows) < 2:
        return ids[0, :0], ids, mask
    order = [
        torch.cat([torch.arange(s, s + count), torch.arange(s), torch.arange(s + count, ids.shape[1])]).to(ids.device)
        for s in starts
    ]
    index = torch.stack(order)
    return ids[0, starts[0] : starts[0] + count].clone(), ids.gather(1, index), mask.gather(1, index)


@torch.no_grad()
def prefill(model: nn.Module, prefix: Tensor, expert_ids: Tensor, copies: int):
    """A KV cache of `prefix` [P] under each of `expert_ids` [E], each `copies` times in a row; None for an empty prefix."""
    if not len(prefix):
        return None
    ids = prefix.expand(len(expert_ids), -1)
    _, cache = forward(model, ids, torch.ones_like(ids), keep=1, expert_ids=expert_ids)
    cache.batch_repeat_interleave(copies)
    return cache


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor, mask: Tensor, cache=None, keep: int = 0, **routing):
    """(logits of the last `keep` tokens, 0: of all that the cache lacks; the cache, which now holds all of them). In eval mode.

    ids, mask: [B, S], the tokens that the cache holds included
    """
    inputs = forward_inputs(model, ids, mask, keep, cache)
    training = model.training
    model.eval()
    try:
        out = model(**inputs, use_cache=True, **routing)
    finally:
        model.train(training)
    return out.logits, out[kept_as()]
