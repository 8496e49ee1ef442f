"""The next token of each request of a batch, each in its own way.

    p = softmax(logits / temperature);  the fewest most likely tokens whose p reach top_p;  token = F^-1(u), u from the request's own seed

One uniform number a token decides, drawn on the host: a seed gives the same text on every device and in every batch, as far as the logits agree.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """temperature: 0 is greedy; logprobs: how many of the likeliest tokens are reported with each token, None: nothing is"""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    reported: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """For each token: log p of it under the model (before temperature), and the likeliest tokens with theirs."""

    def __post_init__(self):
        self.random = random.Random(self.seed)


GREEDY = Sampling()


def draw(logits: Tensor, ways: Sequence[Sampling]) -> Tensor:
    """Tokens [B] for logits [B, V] fp32; what is to be reported is appended to each `reported`."""
    tokens = logits.argmax(-1)
    warm = [i for i, way in enumerate(ways) if way.temperature > 0]
    if warm:
        rows = torch.tensor(warm, device=logits.device)
        tokens[rows] = _sample(logits[rows], [ways[i] for i in warm])
    asked = [i for i, way in enumerate(ways) if way.logprobs is not None]
    if asked:
        _report(logits, tokens, asked, ways)
    return tokens


def _sample(logits: Tensor, ways: Sequence[Sampling]) -> Tensor:
    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([way.temperature for way in ways])
    p, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p  # of all likelier tokens
    rank = torch.arange(p.shape[1], device=p.device)
    kept = (before < column([way.top_p for way in ways])) & (rank < column([way.top_k or p.shape[1] for way in ways]))
    kept[:, 0] = True
    p = p * kept
    total = p.cumsum(-1)
    u = column([way.random.random() for way in ways]) * total[:, -1:]
    picked = torch.searchsorted(total, u, right=True).clamp_(max=p.shape[1] - 1)
    picked = torch.minimum(picked, kept.sum(-1, keepdim=True) - 1)  # kept tokens stand in front
    return order.gather(-1, picked)[:, 0]


def _report(logits: Tensor, tokens: Tensor, asked: Sequence[int], ways: Sequence[Sampling]) -> None:
    rows = torch.tensor(asked, device=logits.device)
    log_p = torch.log_softmax(logits[rows].float(), -1)
    own = log_p.gather(-1, tokens[rows, None])[:, 0].tolist()
    most = min(max(ways[i].logprobs for i in asked), log_p.shape[1])
    values, ids = (t.tolist() for t in log_p.topk(most, -1)) if most else ([[]] * len(asked), [[]] * len(asked))
    for j, i in enumerate(asked):
        n = ways[i].logprobs
        ways[i].reported.append((own[j], list(zip(ids[j][:n], values[j][:n], strict=True))))
