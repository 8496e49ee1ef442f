"""What a request adds to the logits before a token is drawn: penalties, biases, and the structure of its text.

seen:    l > 0 ? l / repetition : l * repetition      of tokens in the prompt or the text (arXiv 1909.05858, 4.1)
drawn:   l - frequency * count - presence             of tokens in the text, count times   (OpenAI's API)
always:  l + bias
masked:  -inf                                         for ends before min_tokens, and outside the structure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .grammar import Grammar


@dataclass
class Adjustment:
    """The adjustment of one request, with what it has drawn.

    frequency, presence, repetition: penalties; 0, 0 and 1 change nothing
    bias: {token: number that is added to its logit}
    min_tokens: tokens before which no end is drawn; ends: the tokens that end the text
    """

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ends: Sequence[int] = ()
    grammar: Grammar | None = None
    """The structure that the text must have."""
    prompt: Sequence[int] = ()
    """Token ids of the prompt, for the repetition penalty."""
    drawn: int = 0
    """Number of tokens drawn so far."""
    counts: Tensor | None = None
    """[V] fp32: how often each token was drawn; None until it is needed."""
    seen: Tensor | None = None
    """[V] bool: whether each token is in the prompt or the text; None until it is needed."""

    @property
    def counted(self) -> bool:
        """Whether the number of times that a token was drawn matters."""
        return bool(self.frequency or self.presence)

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing, now and later."""
        return not (self.counted or self.repetition != 1 or self.bias or self.min_tokens or self.grammar)

    def begin(self, like: Tensor) -> None:
        """Make the counts. like: [V], gives size and device. Later calls do nothing."""
        if self.counted and self.counts is None:
            self.counts = torch.zeros(like.shape, device=like.device)
        if self.repetition != 1 and self.seen is None:
            self.seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
            self.seen[torch.tensor(list(self.prompt), dtype=torch.long, device=like.device)] = True

    def take(self, token: int) -> None:
        """Note a token that was drawn."""
        self.drawn += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.grammar is not None:
            self.grammar.take(token)


def adjust(logits: Tensor, adjustments: Sequence[Adjustment]) -> Tensor:
    """The adjusted logits, [B, V] fp32. logits: [B, V]; adjustments: one per row"""
    out = logits.float().clone()
    for row, adjustment in zip(out, adjustments, strict=True):
        adjustment.begin(row)

    def rows(wanted: Sequence[bool]) -> Tensor:
        return torch.tensor(wanted, device=out.device).nonzero()[:, 0]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=out.device)[:, None]

    if repeated := [a for a in adjustments if a.repetition != 1]:
        at, factor = rows([a.repetition != 1 for a in adjustments]), column([a.repetition for a in repeated])
        part, seen = out[at], torch.stack([a.seen for a in repeated])
        out[at] = torch.where(seen, torch.where(part > 0, part / factor, part * factor), part)
    if counted := [a for a in adjustments if a.counted]:
        counts = torch.stack([a.counts for a in counted])
        penalty = column([a.frequency for a in counted]) * counts + column([a.presence for a in counted]) * (counts > 0)
        out[rows([a.counted for a in adjustments])] -= penalty
    where, added = [], []
    for i, a in enumerate(adjustments):
        where += [i * out.shape[1] + token for token in a.bias]
        added += a.bias.values()
        if a.drawn < a.min_tokens:
            where += [i * out.shape[1] + token for token in a.ends]
            added += [float("-inf")] * len(a.ends)
    if where:
        at = torch.tensor(where, device=out.device)
        out.view(-1).index_add_(0, at, torch.tensor(added, dtype=torch.float32, device=out.device))
    if shaped := [a.grammar for a in adjustments if a.grammar is not None]:
        at = rows([a.grammar is not None for a in adjustments])
        out[at] = out[at].masked_fill_(~_allowed(shaped, out), float("-inf"))
    return out


def _allowed(grammars: Sequence[Grammar], like: Tensor) -> Tensor:
    """[B, V] bool: the tokens that may come next. They travel to the device as bits."""
    V = like.shape[1]
    bits = np.zeros((len(grammars), -(-V // 8)), np.uint8)
    for row, grammar in zip(bits, grammars, strict=True):
        mask = grammar.mask()[: len(row)]
        row[: len(mask)] = mask
    packed = torch.from_numpy(bits).to(like.device)
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=like.device)
    return (packed[:, :, None] & powers).ne(0).flatten(1)[:, :V]
