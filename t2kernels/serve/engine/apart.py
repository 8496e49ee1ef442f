"""Attention of a step in which each request has one token, computed for each request apart.

    y[b] = softmax(q[b] K[b]ᵀ) V[b],     K[b], V[b]: the keys and values of request b

transformers lays the tokens of all requests in one row, and the keys of all requests in another; without flash
attention a mask then hides from each token the keys of the other requests. For B requests of L tokens that computes
B x B L products, of which B L count. A step of one token a request needs no such row: here the keys of each request lie
in a row of their own, padded to the longest. 32 requests of SmolLM2-135M in bf16 with prompts of 33 tokens make 1.27
times the tokens a CPU second (one thread of an AMD EPYC, benchmarks/serve_decode.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME: str = "t2_apart"
"""Name of the attention among those of transformers."""
PADDING: int = 4
"""Padded keys may be as many times the keys that there are. Beyond it copying them costs more than it saves."""


def fits(requests: Sequence[Any]) -> bool:
    """Whether a step can be computed apart. requests: of the batch, as transformers' scheduler gives them

    Each has one token, and keys in the cache; and their lengths are not too different.
    """
    lengths = [r.state.position_offset for r in requests]
    one_each = all(r.query_length == 1 for r in requests)
    return one_each and min(lengths) > 0 and max(lengths) * len(lengths) <= PADDING * sum(lengths)


def spread(read: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The places of the keys of each request in a row of its own.

    read: [K] int64, places in the cache, request after request
    ends: [B+1] int32, 0 and where each request ends in `read`; longest: L, keys of the longest
    Returns (places [B L], which of them hold keys [B, L] bool). The others repeat the request's first place, which is
    in the cache: in a sliding window the last is that of the new token, and may be named once only.
    """
    place = torch.arange(longest, device=read.device)
    starts = ends[:-1, None]
    seen = place < ends[1:, None] - starts
    return read[(starts + place * seen).flatten()], seen


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, L]: 0 where there is a key, else -inf. seen: [B, L] bool"""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, float("-inf"))[:, None, None]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one token for each of B requests, in transformers' form: [1, B, H, D].

    query: [1, H, B, D]; key, value: [1, H', B L, D] at the places of `spread`; attention_mask: of `as_bias`
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, L = attention_mask.shape[0], attention_mask.shape[-1]
    key, value = (t.transpose(1, 2).unflatten(1, (B, L))[0].transpose(1, 2) for t in (key, value))  # [B, H', L, D]
    out, _ = sdpa_attention_forward(module, query.transpose(0, 2), key, value, attention_mask, *args, **kwargs)
    return out.transpose(0, 1), None  # [B, 1, H, D] -> [1, B, H, D]


@contextlib.contextmanager
def attending_apart(config: Any) -> Iterator[None]:
    """Within it the models of a config attend by `attend`. Nobody else may run them meanwhile."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
