"""The common prefix of many prompts, computed once for each expert instead of once for each prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from t2kernels.layers.dense.head import contiguous_head

from .generation import cache_argument, forward_inputs
from .modes import eval_mode

MIN_PREFIX = 16
"""Common tokens below which a prefix cache saves nothing: copying it costs about as much as so few tokens."""


def common_start(rows: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens all rows start with, at most `most`."""
    count = 0
    while count < most and len({row[count] for row in rows}) == 1:
        count += 1
    return count


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, S] int64, of rows of tokens."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def window_of(model: Any) -> float:
    """The fewest tokens that a layer of a model looks back at, its sliding window or chunk; inf if each sees all.

    Windows count padding. Before a prompt it does no harm; in the middle of a row that is longer than a window it takes
    the place of tokens.
    """
    layers = DynamicCache(config=model.config).layers
    return min((getattr(layer, "sliding_window", None) or math.inf for layer in layers), default=math.inf)


def hoist(ids: Tensor, mask: Tensor, longest: float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """Move the common prefix of left-padded prompts before the padding.

    ids, mask: [B, S] int64; longest: rows with more tokens stay as they are (see `window_of`)
    Returns (prefix [P], empty if it is shorter than MIN_PREFIX; ids [B, S]; mask [B, S]), the last two in the order
    (prefix, padding, rest). Positions are counted by the mask, so the padding in between is not seen. At least one
    token stays in each rest.
    """
    starts = (mask.shape[1] - mask.sum(1)).tolist()
    rows = [row[s:].tolist() for row, s in zip(ids, starts, strict=True)]
    count = common_start(rows, min(map(len, rows)) - 1)
    if count < MIN_PREFIX or len(rows) < 2 or ids.shape[1] > longest:
        return ids[0, :0], ids, mask
    order = [
        torch.cat([torch.arange(s, s + count), torch.arange(s), torch.arange(s + count, ids.shape[1])]).to(ids.device)
        for s in starts
    ]
    index = torch.stack(order)
    return ids[0, starts[0] : starts[0] + count].clone(), ids.gather(1, index), mask.gather(1, index)


@torch.no_grad()
def prefill(model: nn.Module, prefix: Tensor, expert_ids: Tensor | None, copies: int) -> Any:
    """The KV cache of a prefix under several experts.

    prefix: [P] int64; expert_ids: [E] int32, or None for the model as it is, one reader
    Returns a cache of E * copies rows, the copies of an expert side by side, or None for an empty prefix.
    """
    if not len(prefix):
        return None
    ids = prefix.expand(1 if expert_ids is None else len(expert_ids), -1)
    routing = {} if expert_ids is None else {"expert_ids": expert_ids}
    _, cache = forward(model, ids, torch.ones_like(ids), keep=1, **routing)
    cache.batch_repeat_interleave(copies)
    return cache


@torch.no_grad()
def forward(
    model: nn.Module, ids: Tensor, mask: Tensor, cache: Any = None, keep: int = 0, **routing: Tensor
) -> tuple[Tensor, Any]:
    """One forward in eval mode that fills a KV cache.

    ids, mask: [B, S] int64, with the tokens that `cache` holds already
    keep: how many last logits to compute, 0 for all
    routing: `expert_ids` of the forward
    Returns (logits [B, keep, vocabulary] of tokens that were not in the cache; the cache, now of all S tokens).
    """
    inputs = forward_inputs(model, ids, mask, keep, cache)
    with eval_mode(model), contiguous_head(model):
        out = model(**inputs, use_cache=True, **routing)
    return out.logits, out[cache_argument()]
