"""One step of generation: the tokens that it draws, and what it leaves for the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels.serve.http.errors import APIError

from .handle import Generation
from .sampling import GREEDY, draw

logger: logging.Logger = logging.getLogger(__name__)


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


def choose(
    logits: Tensor, generations: Sequence[Generation | None], failed: Callable[[Generation, APIError], object]
) -> Tensor:
    """The next token of each request, [B] int64.

    logits: [B, V] fp32; generations: None for one that was cancelled, whose token nobody reads
    failed: called for each request that has no next token: its logits are NaN or infinite, or drawing raises an error
    """
    wrong = (~(logits.amax(-1) < float("inf"))).tolist()
    if any(wrong):
        for generation in [g for g, bad in zip(generations, wrong, strict=True) if bad and g is not None]:
            if not generation.failed:
                logger.error(
                    "request %s: expert %r gives outputs that are not finite", generation.id, generation.expert
                )
                failed(generation, not_finite())
            generation.failed = True
        generations = [None if bad else g for g, bad in zip(generations, wrong, strict=True)]
        logits = logits.masked_fill(torch.tensor(wrong, device=logits.device)[:, None], 0)
    samplings = [GREEDY if g is None else g.sampling for g in generations]
    try:
        return draw(logits, samplings)
    except Exception:  # of one request, whose fault must not end the generation thread
        return torch.cat([_alone(row[None], g, failed) for row, g in zip(logits, generations, strict=True)])


def _alone(row: Tensor, generation: Generation | None, failed: Callable[[Generation, APIError], object]) -> Tensor:
    try:
        return draw(row, [GREEDY if generation is None else generation.sampling])
    except Exception as error:
        if generation is not None:
            logger.exception("request %s: no token could be drawn", generation.id)
            failed(generation, APIError(500, f"{type(error).__name__}: {error}", "internal_error"))
        return row.argmax(-1)
