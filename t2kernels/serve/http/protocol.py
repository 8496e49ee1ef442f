"""Requests of OpenAI's API, and the JSON objects of its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from t2kernels import InputError
from t2kernels.serve.engine.sampling import Logprobs, Sampling

from .errors import bad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGPROBS: int = 20
MAX_STOPS: int = 16
MAX_STOP: int = 1024
"""Most characters of a stop text. It is searched for after every token."""
MAX_COMPLETIONS: int = 128
"""Completions of one request: prompts times n."""

JSON = dict[str, Any]
"""A JSON object."""


class StreamOptions(BaseModel):
    """Options of a stream. include_usage: whether a last chunk holds the number of tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted and ignored


class Request(BaseModel):
    """The fields that both endpoints take.

    A field that would change the answer and is not supported is refused with an error.
    A field that changes nothing is ignored.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

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

    # Ignored.
    user: Any = None
    metadata: Any = None
    store: Literal[False] | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Not supported: only values that ask for nothing are accepted.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: JSON | None = None

    @model_validator(mode="after")
    def _check(self) -> Request:
        if self.logit_bias:
            raise InputError("logit_bias is not supported")
        if len(self.stops) > MAX_STOPS or not all(0 < len(s) <= MAX_STOP for s in self.stops):
            raise InputError(f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options needs stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each token. None: no log-probability is reported."""
        raise NotImplementedError

    def sampling(self, i: int) -> Sampling:
        """The sampling of completion i. Each completion has its own seed, made from the request's seed."""
        seed = None if self.seed is None else f"{self.seed}/{i}"
        return Sampling(self.temperature, self.top_p, self.top_k, seed, self.wanted_logprobs())


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[JSON] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Not supported: only values that ask for nothing are accepted.
    tools: list[Any] | None = Field(None, max_length=0)
    functions: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: JSON | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.response_format not in (None, {"type": "text"}):
            raise InputError("response_format: only text is supported")
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        """The requested number of new tokens, or None."""
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """See `Request.wanted_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def chat(self) -> list[JSON]:
        """The messages with plain text as content. Raises APIError 400 for images and other parts."""
        out = []
        for i, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, list):
                if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                    raise bad(f"messages[{i}] has a part that is not text; this model reads text only", "messages")
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise bad(f"messages[{i}]: expected a role and a content, both text", "messages")
            out.append({**message, "content": content})
        return out


class CompletionRequest(Request):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Not supported: only values that ask for nothing are accepted.
    suffix: Literal[""] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise InputError("best_of is not supported: it can only be n")
        prompts = len(self.prompts())
        if not 1 <= prompts * self.n <= MAX_COMPLETIONS:
            raise InputError(f"{prompts} prompts with n={self.n}: expected 1 to {MAX_COMPLETIONS} completions")
        return self

    @property
    def limit(self) -> int | None:
        """The requested number of new tokens; 16 by default, as in OpenAI's API."""
        return self.max_tokens or 16

    def wanted_logprobs(self) -> int | None:
        """See `Request.wanted_logprobs`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a text or token ids."""
        single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)


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


def whole_choice(chat: bool, index: int, text: str, finish: str, logprobs: JSON | None) -> JSON:
    """One choice of a whole answer."""
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def part_choice(
    chat: bool, index: int, text: str | None, finish: str | None, logprobs: JSON | None, first: bool = False
) -> JSON:
    """One choice of a chunk. text: the new text, or None; first: whether it is the first, which names the role."""
    if chat:
        content = {"delta": ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})}
    else:
        content = {"text": text or ""}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def logprobs_of(
    chat: bool, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], reported: Sequence[Logprobs], offset: int
) -> JSON:
    """The `logprobs` object of a choice.

    tokens: generated tokens; reported: their log-probabilities, one entry per token
    offset: characters of text before these tokens
    """

    def word(token: int) -> str:
        return tokenizer.decode([token])

    def entry(token: int, value: float) -> JSON:
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
