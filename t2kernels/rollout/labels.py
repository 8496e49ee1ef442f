"""The likelihood of a few fixed answers ("labels") after a prompt, without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .prefix import forward, hoist, prefill


def encode_labels(tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """The token ids of each label, without special tokens."""
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]


def split_labels(labels: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """(the tokens that all labels start with, the rest of each label). At least one token stays in each rest.

    The common tokens do not tell the labels apart, so they can be read as part of the prompt.
    """
    common = 0
    while all(len(label) > common + 1 for label in labels) and len({label[common] for label in labels}) == 1:
        common += 1
    return list(labels[0][:common]), [list(label[common:]) for label in labels]


@torch.no_grad()
def label_log_likelihoods(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Sequence[Sequence[int]], row: Tensor
) -> Tensor:
    """log p(label | prompt), without the log-likelihood of the tokens that all labels start with.

    ids: [B, S] int64, prompts, left-padded; mask: [B, S] int64, 1 for a token
    labels: L lists of token ids; row: 0-dim int32, the table row of the expert that reads
    Returns [B, L] fp32.

    Costs one forward over the prompts, plus one over their common prefix if they have one, plus one short forward over
    the same cache if a label has more than one token of its own.
    """
    shared, rest = split_labels(labels)
    common = torch.tensor(shared, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    prefix, ids, mask = hoist(torch.cat([ids, common], 1), torch.cat([mask, mask.new_ones(common.shape)], 1))
    with model.t2_bank.routing.hold(None):
        cache = prefill(model, prefix, row[None], len(ids))
        logits, cache = forward(model, ids, mask, cache, keep=1, expert_ids=row)
        first = torch.log_softmax(logits[:, -1].float(), -1)
        out = first[:, [label[0] for label in rest]]
        longest = max(map(len, rest))
        if longest == 1:
            return out
        tokens = torch.zeros(len(rest), longest, dtype=ids.dtype)
        for i, label in enumerate(rest):
            tokens[i, : len(label)] = torch.tensor(label)
        there = torch.arange(longest) < torch.tensor([[len(label)] for label in rest])
        tokens, there = tokens.to(ids.device).repeat(len(ids), 1), there.to(ids.device).repeat(len(ids), 1)
        cache.batch_repeat_interleave(len(rest))
        mask = torch.cat([mask.repeat_interleave(len(rest), 0), there[:, :-1].to(mask)], 1)
        longer = torch.cat([ids.repeat_interleave(len(rest), 0), tokens[:, :-1]], 1)
        logits, _ = forward(model, longer, mask, cache, expert_ids=row)
        more = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
        return out + torch.where(there[:, 1:], more, 0).sum(1).reshape(len(ids), -1)
