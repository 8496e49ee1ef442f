"""The next token of each request of a batch, each with its own sampling.

    kept = the top_k likeliest tokens, of these the fewest whose softmax(logits / temperature) sum up to top_p,
           of these the ones with min_p of the likeliest token's share
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

from .adjusting import Adjustment, adjust

Logprobs = tuple[float, list[tuple[int, float]]]
"""log p of a generated token, and (token, log p) of the likeliest tokens."""


COLDEST: float = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


@dataclass
class Sampling:
    """How the tokens of one request are chosen.

    temperature: 0 is greedy
    top_p, top_k: cut-offs; 1 and 0 keep every token
    seed: of the request's random numbers; None: a fresh one
    logprobs: how many of the likeliest tokens are reported with each token; None: no log-probability is reported
    reported: one entry per token, under the model's own distribution: before temperature and adjustment. None stands
        for the first token of a prompt.
    min_p: cut-off, as a share of the likeliest token; 0 keeps every token
    adjustment: of the logits, before temperature; None: there is none
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | str | None = None
    logprobs: int | None = None
    reported: list[Logprobs | None] = field(default_factory=list)
    min_p: float = 0.0
    adjustment: Adjustment | None = None
    source: random.Random = field(init=False, repr=False)
    """Source of one 32-bit key per token."""

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)
        if self.temperature < COLDEST:
            self.temperature = 0.0
        if self.adjustment is not None and self.adjustment.neutral:
            self.adjustment = None


LIKELIEST = 1024
"""Tokens that top_p looks at first. Where they do not reach it, the whole vocabulary is sorted."""
GREEDY: Sampling = Sampling()


def draw(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Choose a token for each request. Appends to `reported` of the samplings that ask for log-probabilities.

    logits: [B, V] fp32; samplings: one per row
    Returns tokens [B] int64.
    """
    raw = logits
    adjusted = [i for i, sampling in enumerate(samplings) if sampling.adjustment is not None]
    if adjusted:
        rows = torch.tensor(adjusted, device=logits.device)
        logits = logits.float().index_copy(0, rows, adjust(logits[rows], [samplings[i].adjustment for i in adjusted]))
    tokens = logits.argmax(-1)
    warm = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if warm:
        rows = torch.tensor(warm, device=logits.device)
        tokens[rows] = _sample(logits[rows], [samplings[i] for i in warm])
    if adjusted:
        for i, token in zip(adjusted, tokens[torch.tensor(adjusted, device=tokens.device)].tolist(), strict=True):
            samplings[i].adjustment.take(token)
    reporting = [i for i, sampling in enumerate(samplings) if sampling.logprobs is not None]
    if reporting:
        rows = torch.tensor(reporting, device=logits.device)
        found = report(raw[rows], tokens[rows], [samplings[i].logprobs or 0 for i in reporting])
        for i, reported in zip(reporting, found, strict=True):
            samplings[i].reported.append(reported)
    return tokens


def _sample(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits.float() / column([s.temperature for s in samplings])
    chosen = scaled - exponential([s.source.getrandbits(32) for s in samplings], scaled).log_()
    if any(s.min_p for s in samplings):  # p >= min_p of the likeliest: log(0) lets every token through
        floor = scaled.amax(-1, keepdim=True) + column([s.min_p for s in samplings]).log_()
        chosen = chosen.masked_fill_(scaled < floor, float("-inf"))
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
    most = torch.tensor([min(s.top_k or V, V) for s in samplings], device=device)[:, None]
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


def report(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[Logprobs]:
    """log p of one token for each row, and of the likeliest ones.

    logits: [B, V]; tokens: [B] int64; counts: how many of the likeliest, one per row
    """
    log_p = torch.log_softmax(logits.float(), -1)
    own = log_p.gather(-1, tokens[:, None])[:, 0].tolist()
    values, ids = (t.tolist() for t in log_p.topk(min(max(counts), log_p.shape[1]), -1))
    return [(own[j], list(zip(ids[j][:n], values[j][:n], strict=True))) for j, n in enumerate(counts)]
