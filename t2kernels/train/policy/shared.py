"""Rows of a rollout that start alike: what they have in common is read once, with gradients.

The prompts of a task share an instruction, the completions of a group their prompt. The first tokens of such rows run
in a forward of their own, a row for each group, and the rest of every row attends to them through the KV cache:

    tokens of a step:  B S   ->   G P + B (S - P)

for B rows of S tokens in G groups that share P. Keys and values of the prefix are functions of the weights, so
gradients flow through the cache, and are the sums over the rows of a group. Numbers and gradients are those of whole
rows, to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from t2kernels.factors.matrices import unwrapped
from t2kernels.layers.dense.head import contiguous_head
from t2kernels.rollout.generation import (
    Rollout,
    cache_argument,
    completion_logits,
    forward_arguments,
    forward_inputs,
)
from t2kernels.rollout.modes import recomputes_activations
from t2kernels.rollout.prefix import MIN_PREFIX, common_start, left_padded, window_of

WORTH = 0.8
"""The share of the tokens of whole rows above which rows are not divided."""


@dataclass(frozen=True)
class Divided:
    """Rows of a rollout as a prefix for each group, and the rest of each row.

    prefixes, mask: [G, P] int64, left-padded; group: [B] int64, the prefix of each row; first: [G] int64, a row of each
    whole: the rollout with rows of (prefix, padding, rest of the prompt, completion)
    """

    prefixes: Tensor
    mask: Tensor
    group: Tensor
    first: Tensor
    whole: Rollout


def divide(rollout: Rollout, readers: Sequence[Hashable]) -> Divided | None:
    """The rows in groups of one reader, or of one reader and one prompt, whichever leaves fewer tokens to read.

    readers: [B], what tells apart the experts of the rows
    Returns None where that is more than WORTH of the tokens, or a group shares less than MIN_PREFIX.
    """
    B, C = rollout.completion.shape
    width = rollout.ids.shape[1] - C
    starts = (width - rollout.mask[:, :width].sum(1)).tolist()
    prompts = [tuple(row[start:]) for row, start in zip(rollout.ids[:, :width].tolist(), starts, strict=True)]
    least, found = WORTH * B * (width + C - 1), None
    for keys in (readers, list(zip(readers, prompts, strict=True))):
        rows = defaultdict(list)
        for i, key in enumerate(keys):
            rows[key].append(i)
        groups = list(rows.values())
        # The last token of a prompt stays in the rest: the first of its completion is predicted there.
        counts = [
            common_start([prompts[i] for i in group], min(len(prompts[i]) for i in group) - 1) for group in groups
        ]
        rest = max(len(prompts[i]) - count for group, count in zip(groups, counts, strict=True) for i in group)
        tokens = len(groups) * max(counts) + B * (rest + C - 1)
        if min(counts) >= MIN_PREFIX and tokens <= least:
            least, found = tokens, (groups, counts)
    return None if found is None else _arranged(rollout, prompts, *found)


def _arranged(
    rollout: Rollout, prompts: Sequence[Sequence[int]], groups: list[list[int]], counts: list[int]
) -> Divided:
    device, C = rollout.ids.device, rollout.completion.shape[1]
    group = torch.empty(len(prompts), dtype=torch.int64)
    for g, rows in enumerate(groups):
        group[rows] = g
    prefixes, seen = left_padded([prompts[rows[0]][:count] for rows, count in zip(groups, counts, strict=True)], device)
    rests, there = left_padded([prompt[counts[g] :] for prompt, g in zip(prompts, group.tolist(), strict=True)], device)
    group = group.to(device)
    ids = torch.cat([prefixes[group], rests, rollout.ids[:, -C:]], 1)
    mask = torch.cat([seen[group], there, rollout.mask[:, -C:]], 1)
    first = torch.tensor([rows[0] for rows in groups], device=device)
    return Divided(prefixes, seen, group, first, Rollout(ids, mask, rollout.completion))


def shared_logits(model: nn.Module, rollout: Rollout, **routing: Tensor) -> Tensor:
    """As `completion_logits`, but the common prefix of rows is read once, where the model's cache can be shared."""
    cache = empty_cache(model) if len(rollout) > 1 and set(routing) <= {"expert_ids"} else None
    ids = routing.get("expert_ids")
    each = ids is not None and ids.dim() > 0  # else one expert reads all rows
    divided = None if cache is None else divide(rollout, ids.tolist() if each else [0] * len(rollout))
    # Divided rows have padding in their middle.
    if divided is None or divided.whole.ids.shape[1] > window_of(unwrapped(model)):
        return completion_logits(model, rollout, **routing)
    inputs = forward_inputs(model, divided.prefixes, divided.mask, 1, cache)
    with contiguous_head(model):
        model(**inputs, use_cache=True, **({"expert_ids": ids[divided.first]} if each else routing))
    if len(divided.first) == 1:
        cache.batch_repeat_interleave(len(rollout))
    else:
        cache.batch_select_indices(divided.group)
    return completion_logits(model, divided.whole, cache, **routing)


def empty_cache(model: nn.Module) -> DynamicCache | None:
    """A cache of keys and values that grows by concatenation in every layer, as gradients need it.

    None: the model is not transformers' own, or wrapped by more than LoRA; it recomputes its activations, which
    excludes a cache; it takes none, or keeps other states in it.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or recomputes_activations(inner):
        return None
    if cache_argument() not in forward_arguments(inner):
        return None
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return None  # its virtual tokens stand before the first token of every forward
    cache = DynamicCache(config=inner.config)
    return cache if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) else None
