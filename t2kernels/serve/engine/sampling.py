"""The next token of each request of a batch, each with its own sampling.

    kept = the top_k likeliest tokens, of these the fewest whose softmax(logits / temperature) sum up to top_p
    token = argmax over kept of logits / temperature - log E(token), with E exponential, from the request's own seed

This is the Gumbel-max form of a draw from the softmax. The noise of a token depends on the seed, on the place in the
text and on the token's id. So a seed gives the same token in every batch and on every device, unless the logits of two
tokens come closer than their rounding: bf16 models round their logits differently in batches of different sizes. A draw
that walks the tokens in order of probability changes its token in a third of such cases, this one in a few of a
hundred. Nothing is sorted unless top_p asks for it.
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
    """Source of one 32-bit key per token."""

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)


LIKELIEST = 1024
"""Tokens that top_p looks at first. Where they do not reach it, the whole vocabulary is sorted."""
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
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits.float() / column([s.temperature for s in samplings])
    chosen = scaled - exponential([s.source.getrandbits(32) for s in samplings], scaled).log_()
    cut = [i for i, s in enumerate(samplings) if s.top_p < 1 or s.top_k]
    if cut:
        rows = torch.tensor(cut, device=logits.device)
        chosen[rows] = chosen[rows].masked_fill_(~_kept(scaled[rows], [samplings[i] for i in cut]), float("-inf"))
    return chosen.argmax(-1)


def exponential(keys: Sequence[int], like: Tensor) -> Tensor:
    """One exponentially distributed number for each key and token id, [B, V] fp32. It depends on nothing else.

    keys: [B] 32-bit numbers; like: [B, V], gives V and the device
    The numbers come from a 32-bit integer hash (lowbias32, https://nullprogram.com/blog/2018/07/31/), which is the same
    on every device. They have 24 bits, so an event of a probability below 1e-7 has its exact probability only roughly.
    """
    x = torch.arange(like.shape[1], dtype=torch.int32, device=like.device) * _signed(0x9E3779B1)
    x = x + torch.tensor([_signed(key) for key in keys], dtype=torch.int32, device=like.device)[:, None]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # a logical shift of a signed number
        x *= _signed(factor)
    return (((x >> 8) & 0xFFFFFF).float() + 0.5).mul_(-(2.0**-24)).log1p_().neg_()


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _kept(scaled: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """[B, V] bool: the tokens that top_k and top_p leave. Every sampling has one of the two."""
    V, device = scaled.shape[1], scaled.device
    top_p = [s.top_p if s.top_p < 1 else float("inf") for s in samplings]
    share = torch.tensor(top_p, dtype=torch.float64, device=device)[:, None]
    most = torch.tensor([s.top_k or V for s in samplings], device=device)[:, None]
    total = scaled.double().logsumexp(-1, keepdim=True)
    count = min(V, max(s.top_k or LIKELIEST for s in samplings))
    while True:
        values, ids = scaled.topk(count, -1)
        p = (values.double() - total).exp()
        kept = (p.cumsum(-1) - p < share) & (torch.arange(count, device=device) < most)
        kept[:, 0] = True
        if count == V or not bool((kept[:, -1:] & (most == V)).any()):
            return torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, ids, kept)
        count = V  # a flat distribution: more tokens than were looked at make up top_p


def _report(logits: Tensor, tokens: Tensor, report: Sequence[int], samplings: Sequence[Sampling]) -> None:
    rows = torch.tensor(report, device=logits.device)
    log_p = torch.log_softmax(logits[rows].float(), -1)
    own = log_p.gather(-1, tokens[rows, None])[:, 0].tolist()
    counts = [samplings[i].logprobs or 0 for i in report]
    most = min(max(counts), log_p.shape[1])
    values, ids = (t.tolist() for t in log_p.topk(most, -1))
    for j, (i, n) in enumerate(zip(report, counts, strict=True)):
        samplings[i].reported.append((own[j], list(zip(ids[j][:n], values[j][:n], strict=True))))
