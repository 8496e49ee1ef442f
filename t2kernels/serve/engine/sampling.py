"""The next token of each request of a batch, each with its own sampling.

    p = softmax(logits / temperature)
    kept = the top_k likeliest tokens, of these the fewest whose p reach top_p
    token = F^-1(u) over kept, with u uniform from the request's own seed

u is drawn on the host, one number per token. So a seed gives the same text on every device and in every batch, up to
the rounding of the logits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Logprobs = tuple[float, list[tuple[int, float]]]
"""log p of a generated token, and (token, log p) of the likeliest tokens."""


@dataclass
class Sampling:
    """How the tokens of one request are chosen.

    temperature: 0 is greedy
    top_p, top_k: cut-offs; 1 and 0 keep every token
    seed: of the request's random numbers; None: a fresh one
    logprobs: how many of the likeliest tokens are reported with each token; None: no log-probability is reported
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | str | None = None
    logprobs: int | None = None
    reported: list[Logprobs] = field(default_factory=list)
    """One entry per generated token, under the model's own distribution (before temperature)."""
    source: random.Random = field(init=False, repr=False)
    """Source of u."""

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)


GREEDY: Sampling = Sampling()


def draw(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Choose a token for each request. Appends to `reported` of the samplings that ask for log-probabilities.

    logits: [B, V] fp32; samplings: one per row
    Returns tokens [B] int64.
    """
    tokens = logits.argmax(-1)
    warm = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if warm:
        rows = torch.tensor(warm, device=logits.device)
        tokens[rows] = _sample(logits[rows], [samplings[i] for i in warm])
    report = [i for i, sampling in enumerate(samplings) if sampling.logprobs is not None]
    if report:
        _report(logits, tokens, report, samplings)
    return tokens


def _sample(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([s.temperature for s in samplings])
    p, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p  # sum over all likelier tokens
    rank = torch.arange(p.shape[1], device=p.device)
    kept = (before < column([s.top_p for s in samplings])) & (rank < column([s.top_k or p.shape[1] for s in samplings]))
    kept[:, 0] = True
    p = p * kept
    total = p.cumsum(-1)
    u = column([s.source.random() for s in samplings]) * total[:, -1:]
    picked = torch.searchsorted(total, u, right=True).clamp_(max=p.shape[1] - 1)
    picked = torch.minimum(picked, kept.sum(-1, keepdim=True) - 1)  # kept tokens come first in `order`
    return order.gather(-1, picked)[:, 0]


def _report(logits: Tensor, tokens: Tensor, report: Sequence[int], samplings: Sequence[Sampling]) -> None:
    rows = torch.tensor(report, device=logits.device)
    log_p = torch.log_softmax(logits[rows].float(), -1)
    own = log_p.gather(-1, tokens[rows, None])[:, 0].tolist()
    counts = [samplings[i].logprobs or 0 for i in report]
    most = min(max(counts), log_p.shape[1])
    values, ids = (t.tolist() for t in log_p.topk(most, -1))
    for j, (i, n) in enumerate(zip(report, counts, strict=True)):
        samplings[i].reported.append((own[j], list(zip(ids[j][:n], values[j][:n], strict=True))))
