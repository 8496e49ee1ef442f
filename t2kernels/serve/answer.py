"""`Answer`: the completions of one request, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.engine.handle import Generation
from t2kernels.serve.engine.sampling import Sampling
from t2kernels.serve.http import protocol
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.metrics import Metrics
from t2kernels.serve.http.text import Decoder

from .registry import Chosen, ExpertRegistry
from .service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)


@dataclass
class Part:
    """What is new in one of the completions. finish: None until its last part"""

    index: int
    text: str
    tokens: list[int]
    finish: str | None = None


class Answer:
    """All completions of one request, n per prompt. Iterate over it to get their parts; `close` stops what still runs.

    prompts: token ids; limits: most new tokens, one per prompt; request: of the API
    chosen: the held expert, which is released here; model: the name that the answer gives
    Raises APIError if the engine does not accept all completions; then none of them runs.
    """

    engine: Engine
    metrics: Metrics
    tokenizer: PreTrainedTokenizerBase
    experts: ExpertRegistry
    request: protocol.Request
    chosen: Chosen
    model: str
    prompt_tokens: int
    status: str
    """HTTP status for metrics; 499 (the client has hung up) until the request ends otherwise."""
    samplings: list[Sampling]
    generations: list[Generation]

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        request: protocol.Request,
        chosen: Chosen,
        model: str,
    ) -> None:
        self.engine, self.metrics = service.engine, service.metrics
        self.tokenizer, self.experts = service.tokenizer, service.experts
        self.request, self.chosen, self.model = request, chosen, model
        self.prompt_tokens = sum(map(len, prompts))
        self.status = "499"
        self.samplings = [request.sampling(i) for i in range(len(prompts) * request.n)]
        self.generations = []
        self._parts: asyncio.Queue[Part | APIError] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        try:
            for i, sampling in enumerate(self.samplings):
                self._submit(prompts[i // request.n], limits[i // request.n], sampling)
        except BaseException as error:
            self.status = str(getattr(error, "status_code", 500))
            self.close()
            raise
        finally:
            self.experts.release(chosen)
        self.metrics.tokens_in.labels(self.label).inc(self.prompt_tokens)
        self._tasks = [asyncio.create_task(self._follow(i, g)) for i, g in enumerate(self.generations)]

    def _submit(self, prompt: Sequence[int], limit: int, sampling: Sampling) -> None:
        held = self.experts.share(self.chosen)

        def release() -> None:
            self.experts.release(held)

        try:
            self.generations.append(self.engine.submit(prompt, limit, held.expert, sampling, release))
        except APIError:
            release()
            raise

    @property
    def label(self) -> str:
        """Label of the expert in metrics."""
        return self.experts.label(self.chosen.label)

    @property
    def generated(self) -> int:
        """Number of tokens generated so far, over all completions."""
        return sum(g.tokens for g in self.generations)

    def close(self) -> None:
        """Cancel what still runs, and count the request in the metrics. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for generation in self.generations:
            generation.cancel()
        self.metrics.requests.labels(self.label, self.status).inc()
        self.metrics.tokens_out.labels(self.label).inc(self.generated)

    async def _follow(self, index: int, generation: Generation) -> None:
        """Turn the tokens of one completion into parts."""
        decoder = Decoder(self.tokenizer, self.request.stops)
        try:
            async for tokens in generation:
                text = decoder.feed(tokens)
                if decoder.stopped:
                    generation.cancel()
                    generation.finish = "stop"
                    self._parts.put_nowait(Part(index, text, tokens, "stop"))
                    return
                self._parts.put_nowait(Part(index, text, tokens))
            self._parts.put_nowait(Part(index, decoder.finish(), [], "stop" if decoder.stopped else generation.finish))
        except APIError as error:
            self._parts.put_nowait(error)
        except Exception as error:
            logger.exception("request %s: completion %d failed", generation.id, index)
            generation.cancel()
            self._parts.put_nowait(APIError(500, f"{type(error).__name__}: {error}", "internal_error"))
        finally:
            self._time(generation)

    def _time(self, generation: Generation) -> None:
        if generation.started is not None:
            self.metrics.first.labels(self.label).observe(generation.started - generation.arrived)
            if generation.tokens > 1:
                seconds = time.perf_counter() - generation.started
                self.metrics.each.labels(self.label).observe(seconds / (generation.tokens - 1))

    async def __aiter__(self) -> AsyncIterator[list[Part]]:
        """All new parts. Raises APIError if one of the completions fails; then all fail."""
        remaining = len(self.generations)
        while remaining:
            parts = [await self._parts.get(), *(self._parts.get_nowait() for _ in range(self._parts.qsize()))]
            for part in parts:
                if isinstance(part, APIError):
                    self.status = str(part.status_code)
                    raise part
                remaining -= part.finish is not None
            if not remaining:
                self.status = "200"
            yield parts

    # --- the two forms of an answer

    async def whole(self, chat: bool) -> protocol.JSON:
        """The answer as one JSON object. Raises APIError."""
        texts, finishes = [""] * len(self.generations), [""] * len(self.generations)
        tokens: list[list[int]] = [[] for _ in self.generations]
        async for parts in self:
            for part in parts:
                texts[part.index] += part.text
                tokens[part.index] += part.tokens
                finishes[part.index] = part.finish or ""
        choices = [
            protocol.whole_choice(chat, i, text, finishes[i], self._logprobs(chat, i, tokens[i], 0, 0))
            for i, text in enumerate(texts)
        ]
        return {
            **protocol.envelope(chat, self.model, self.chosen.fingerprint),
            "choices": choices,
            "object": "chat.completion" if chat else "text_completion",
            "usage": protocol.usage(self.prompt_tokens, self.generated),
        }

    async def events(self, chat: bool, first: list[Part], rest: AsyncIterator[list[Part]]) -> AsyncIterator[bytes]:
        """The answer as server-sent events: a chunk for each part, then [DONE]. An error becomes a chunk of its own.

        first: parts that have been read already; rest: the iterator that they came from
        """
        head = {
            **protocol.envelope(chat, self.model, self.chosen.fingerprint),
            "object": "chat.completion.chunk" if chat else "text_completion",
        }
        begun: set[int] = set()
        characters, reported = [0] * len(self.samplings), [0] * len(self.samplings)
        with_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        try:
            parts = first
            while True:
                for part in parts:
                    i = part.index
                    if part.text or part.finish or i not in begun or self.samplings[i].logprobs is not None:
                        logprobs = self._logprobs(chat, i, part.tokens, reported[i], characters[i])
                        choice = protocol.part_choice(chat, i, part.text, part.finish, logprobs, first=i not in begun)
                        yield _event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})
                        begun.add(i)
                    characters[i] += len(part.text)
                    reported[i] += len(part.tokens)
                try:
                    parts = await anext(rest)
                except StopAsyncIteration:
                    break
            if with_usage:
                yield _event({**head, "choices": [], "usage": protocol.usage(self.prompt_tokens, self.generated)})
        except APIError as error:
            yield _event(error.body())
        finally:
            self.close()
        yield b"data: [DONE]\n\n"

    def _logprobs(
        self, chat: bool, index: int, tokens: Sequence[int], start: int, characters: int
    ) -> protocol.JSON | None:
        sampling = self.samplings[index]
        if sampling.logprobs is None:
            return None
        shown = [t for t in tokens if t not in self.engine.ends]
        reported = sampling.reported[start : start + len(shown)]
        return protocol.logprobs_of(chat, self.tokenizer, shown, reported, characters)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
