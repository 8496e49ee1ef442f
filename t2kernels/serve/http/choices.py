"""The JSON objects of OpenAI's answers: envelopes, choices, usage and log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from t2kernels.serve.engine.sampling import Logprobs

from .vocabulary import Vocabulary

JSON = dict[str, Any]
"""A JSON object."""
LOWEST: float = -9999.0
"""Least log-probability that is reported: JSON has no infinity."""


def envelope(chat: bool, model: str, fingerprint: str) -> JSON:
    """The fields that every answer and every chunk of a stream begins with."""
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage(prompt: int, completion: int) -> JSON:
    """The `usage` object: numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole_choice(
    chat: bool, index: int, text: str, finish: str, logprobs: JSON | None, calls: Sequence[JSON] = ()
) -> JSON:
    """One choice of a whole answer. calls: of tools; beside them an empty text is none"""
    said = None if calls and not text else text
    message = {"role": "assistant", "content": said, "refusal": None, **({"tool_calls": list(calls)} if calls else {})}
    content = {"message": message} if chat else {"text": text}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def part_choice(
    chat: bool,
    index: int,
    text: str,
    finish: str | None,
    logprobs: JSON | None,
    first: bool = False,
    calls: Sequence[JSON] = (),
) -> JSON:
    """One choice of a chunk. first: whether it is the first, which names the role; calls: of tools, with their index"""
    if chat:
        delta = {"content": text} | ({"tool_calls": list(calls)} if calls else {})
        content = {"delta": ({"role": "assistant"} if first else {}) | delta}
    else:
        content = {"text": text}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def logprobs_of(
    chat: bool, vocabulary: Vocabulary, tokens: Sequence[int], reported: Sequence[Logprobs | None], offset: int
) -> JSON:
    """The `logprobs` object of a choice.

    tokens: of the text; reported: their log-probabilities, one entry per token, None for the first of a prompt
    offset: characters of text before these tokens
    """

    def entry(token: int, name: str, value: float) -> JSON:
        return {"token": name, "logprob": max(value, LOWEST), "bytes": list(vocabulary.raw(token))}

    if chat:
        content = []
        for token, (own, top) in zip(tokens, filter(None, reported), strict=True):
            names = vocabulary.names(t for t, _ in top)
            likeliest = [entry(t, name, v) for name, (t, v) in zip(names, top, strict=True)]
            content.append({**entry(token, vocabulary.name(token), own), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}
    return {
        "tokens": [vocabulary.name(token) for token in tokens],
        "token_logprobs": [None if r is None else max(r[0], LOWEST) for r in reported],
        "top_logprobs": [None if r is None else _likeliest(vocabulary, r[1]) for r in reported],
        "text_offset": vocabulary.offsets(tokens, offset),
    }


def _likeliest(vocabulary: Vocabulary, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    names = vocabulary.names(token for token, _ in top)
    return {name: max(value, LOWEST) for name, (_, value) in zip(names, top, strict=True)}
