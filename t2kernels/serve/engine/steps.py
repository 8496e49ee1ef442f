"""One step of generation: the tokens that it draws, and what it leaves for the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels.serve.http.errors import APIError

from .handle import Generation
from .sampling import GREEDY, draw


class Output(NamedTuple):
    """What one step generated for one request.

    id: of the request; tokens: all so far; error: why it failed, or None; last: whether it has finished
    """

    id: str
    tokens: list[int]
    error: str | None
    last: bool


def outputs_of(outputs: Sequence[Any]) -> list[Output]:
    """The outputs of a step, as transformers' manager gives them, in the form that stays the same."""
    return [Output(o.request_id, o.generated_tokens, o.error, o.is_finished()) for o in outputs]


def not_finite() -> APIError:
    """The error of a request whose expert makes the model overflow."""
    message = "the model's output is not finite with this expert: train it again, or remove it"
    return APIError(500, message, "not_finite")


def choose(logits: Tensor, generations: Sequence[Generation | None], failed: Callable[[Generation], object]) -> Tensor:
    """The next token of each request, [B] int64.

    logits: [B, V] fp32; generations: None for one that was cancelled, whose token nobody reads
    failed: called for each request whose logits are NaN or infinite: it has no next token
    """
    wrong = (~(logits.amax(-1) < float("inf"))).tolist()
    if any(wrong):
        for generation in [g for g, bad in zip(generations, wrong, strict=True) if bad and g is not None]:
            failed(generation)
        generations = [None if bad else g for g, bad in zip(generations, wrong, strict=True)]
        logits = logits.masked_fill(torch.tensor(wrong, device=logits.device)[:, None], 0)
    return draw(logits, [GREEDY if g is None else g.sampling for g in generations])
