"""What requests of OpenAI's API hold, and the objects of its answers."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from t2kernels.serve.engine.sampling import Sampling

from .errors import bad

MOST_LOGPROBS = 20


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # nothing is hidden from whoever watches the length of packets


class Request(BaseModel):
    """What both endpoints take. Fields that would change the answer and are not supported are refused, never dropped; others are ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    # Fields that change nothing here.
    user: Any = None
    metadata: Any = None
    store: Literal[False] | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Known fields that are not supported, and the values that ask for nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict | None = None

    @model_validator(mode="after")
    def _check(self) -> Request:
        if self.logit_bias:
            raise ValueError("logit_bias is not supported")
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError(f"stop={self.stop!r}: wanted at most 16 texts, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each; None: nothing is."""
        raise NotImplementedError

    def sampling(self, i: int) -> Sampling:
        """Of the i-th completion: each has a seed of its own, from the request's."""
        seed = None if self.seed is None else f"{self.seed}/{i}"
        return Sampling(self.temperature, self.top_p, self.top_k, seed, self.wanted_logprobs())


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # Known and not supported.
    tools: list | None = Field(None, max_length=0)
    functions: list | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only text is supported")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def chat(self) -> list[dict[str, Any]]:
        """The messages with plain text as content. Raises APIError for images and other parts."""
        out = []
        for i, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, list):
                if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                    raise bad(
                        f"messages[{i}] holds something other than text, which this model cannot read", "messages"
                    )
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise bad(f"messages[{i}]: wanted a role and a content of text", "messages")
            out.append({**message, "content": content})
        return out


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # Known and not supported.
    suffix: Literal[""] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported: it can only be n")
        if not 1 <= len(self.prompts()) * self.n <= 128:
            raise ValueError(f"{len(self.prompts())} prompts with n={self.n}: wanted between 1 and 128 completions")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)


def envelope(chat: bool, model: str, fingerprint: str) -> dict:
    """What the chunks of a stream and a whole answer begin with."""
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole_choice(chat: bool, index: int, text: str, finish: str, logprobs: dict | None) -> dict:
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def part_choice(
    chat: bool, index: int, text: str | None, finish: str | None, logprobs: dict | None, first: bool = False
) -> dict:
    """text: what is new, or None; first: whether the role has yet to be said"""
    if chat:
        said = {"delta": ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})}
    else:
        said = {"text": text or ""}
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def logprobs_of(
    chat: bool, tokenizer, tokens: list[int], reported: list[tuple[float, list[tuple[int, float]]]], offset: int
) -> dict:
    """tokens, and for each log p and the likeliest others; offset: characters of text before them"""

    def word(token: int) -> str:
        return tokenizer.decode([token])

    def entry(token: int, value: float) -> dict:
        return {"token": word(token), "logprob": value, "bytes": list(word(token).encode())}

    if chat:
        return {
            "content": [
                {**entry(token, own), "top_logprobs": [entry(t, v) for t, v in top]}
                for token, (own, top) in zip(tokens, reported, strict=True)
            ],
            "refusal": None,
        }
    words = [word(token) for token in tokens]
    return {
        "tokens": words,
        "token_logprobs": [own for own, _ in reported],
        "top_logprobs": [{word(t): v for t, v in top} for _, top in reported],
        "text_offset": [offset + sum(map(len, words[:i])) for i in range(len(words))],
    }
