"""`Answer`: the completions of one request, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.engine.handle import Generation
from t2kernels.serve.engine.sampling import Sampling
from t2kernels.serve.experts.registry import Chosen, ExpertRegistry
from t2kernels.serve.http import protocol
from t2kernels.serve.http.access import Facts
from t2kernels.serve.http.choices import envelope, logprobs_of, part_choice, usage, whole_choice
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.metrics import Metrics
from t2kernels.serve.http.text import Decoder
from t2kernels.serve.http.tools import ToolReader
from t2kernels.serve.http.vocabulary import Vocabulary

from .large_answers import MANY, encode
from .prompts import Prepared
from .service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)


@dataclass
class Part:
    """What is new in one of the completions.

    tokens: those that log-probabilities are shown for; finish: None until its last part; calls: of tools
    """

    index: int
    text: str
    tokens: list[int]
    finish: str | None = None
    calls: list[protocol.JSON] = field(default_factory=list)


class Answer:
    """All completions of one request, n per prompt. Iterate over it to get their parts; `close` stops what still runs.

    prepared: the prompts; limits: most new tokens, one per prompt; request: of the API
    chosen: the held expert, which is released here; model: the name that the answer gives; facts: for the log
    Raises APIError if the engine does not accept all completions; then none of them runs.
    """

    engine: Engine
    metrics: Metrics
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    experts: ExpertRegistry
    prepared: Prepared
    facts: Facts
    request: protocol.Request
    chosen: Chosen
    model: str
    prompt_tokens: int
    status: str
    """HTTP status for metrics; 499 (the client has hung up) until the request ends otherwise."""
    ends: list[int]
    """Tokens that end a text. They are no part of it."""
    samplings: list[Sampling]
    generations: list[Generation]

    def __init__(
        self,
        service: Service,
        prepared: Prepared,
        limits: Sequence[int],
        request: protocol.Request,
        chosen: Chosen,
        model: str,
        facts: Facts,
    ) -> None:
        prompts = prepared.prompts
        self.prepared, self.facts = prepared, facts
        self.engine, self.metrics = service.engine, service.metrics
        self.tokenizer, self.experts, self.vocabulary = service.tokenizer, service.experts, service.vocabulary
        self.request, self.chosen, self.model = request, chosen, model
        self.prompt_tokens = sum(map(len, prompts))
        self.status = "499"
        self.ends = [*([] if request.ignore_eos else self.engine.ends), *request.stop_token_ids]
        grammar = prepared.grammar
        self.samplings = [
            request.sampling(i, self.ends, None if grammar is None else grammar.copy())
            for i in range(len(prompts) * request.n)
        ]
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
            score = self.request.echoes and sampling.logprobs is not None
            made = self.engine.submit(prompt, limit, held.expert, sampling, release, self.ends, score)
            self.generations.append(made)
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
        self._tell()

    def _tell(self) -> None:
        """Fill in the facts for the log."""

        def longest(begin: str, end: str) -> float | None:
            times = [(getattr(g, begin), getattr(g, end)) for g in self.generations]
            return max((late - early for early, late in times if early and late), default=None)

        self.facts.counted = True
        self.facts.said |= {
            "expert": self.chosen.fingerprint,
            "completions": len(self.samplings) if len(self.samplings) > 1 else None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "queue": longest("arrived", "admitted"),
            "first": longest("arrived", "started"),
            "ended": None if self.status == "200" else self.status,
        }

    async def _follow(self, index: int, generation: Generation) -> None:
        """Turn the tokens of one completion into parts."""
        decoder = Decoder(self.tokenizer, self.request.stops)
        tools = ToolReader() if self.request.uses_tools else None
        echoing = self.request.echoes
        try:
            async for tokens in generation:
                if echoing:
                    echoing = self._echo(index)
                text = decoder.feed([t for t in tokens if t not in self.ends])
                if decoder.stopped:
                    generation.cancel()
                    generation.finish = "stop"
                    break
                self._put(index, text, tokens, tools)
            if echoing:
                self._echo(index)
            text, tokens = (text, tokens) if decoder.stopped else (decoder.finish(), [])
            self._put(index, text, tokens, tools, "stop" if decoder.stopped else generation.finish)
        except APIError as error:
            self._parts.put_nowait(error)
        except Exception as error:
            logger.exception("request %s: completion %d failed", generation.id, index)
            generation.cancel()
            self._parts.put_nowait(APIError(500, f"{type(error).__name__}: {error}", "internal_error"))
        finally:
            self._time(generation)

    def _echo(self, index: int) -> bool:
        """Begin a completion with its prompt. Returns False: it is done."""
        i = index // self.request.n
        self._parts.put_nowait(Part(index, self.prepared.texts[i], list(self.prepared.prompts[i])))
        return False

    def _put(
        self, index: int, text: str, tokens: Sequence[int], tools: ToolReader | None, finish: str | None = None
    ) -> None:
        # The end is shown beside a prompt only: clients that score prompts cut the one token off that they asked for.
        shown = list(tokens) if self.request.echoes else [t for t in tokens if t not in self.ends]
        part = Part(index, text, shown, finish)
        if tools is not None:
            before = tools.found
            part.text, calls = tools.feed(text)
            part.calls = [{"index": before + i, **call} for i, call in enumerate(calls)]
            if finish is not None:
                part.text += tools.finish()
                part.finish = "tool_calls" if tools.found and finish == "stop" else finish
        self._parts.put_nowait(part)

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
                    self.status, self.facts.error = str(part.status_code), part.message
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
        calls: list[list[protocol.JSON]] = [[] for _ in self.generations]
        async for parts in self:
            for part in parts:
                texts[part.index] += part.text
                tokens[part.index] += part.tokens
                calls[part.index] += [{k: v for k, v in call.items() if k != "index"} for call in part.calls]
                finishes[part.index] = part.finish or ""
        reported = [await self._logprobs(chat, i, shown, 0, 0) for i, shown in enumerate(tokens)]
        choices = [whole_choice(chat, i, text, finishes[i], reported[i], calls[i]) for i, text in enumerate(texts)]
        return {
            **envelope(chat, self.model, self.chosen.fingerprint),
            "choices": choices,
            "object": "chat.completion" if chat else "text_completion",
            "usage": usage(self.prompt_tokens, self.generated),
        }

    async def events(self, chat: bool, first: list[Part], rest: AsyncIterator[list[Part]]) -> AsyncIterator[bytes]:
        """The answer as server-sent events: a chunk for each part, then [DONE]. An error becomes a chunk of its own.

        first: parts that have been read already; rest: the iterator that they came from
        """
        head = {
            **envelope(chat, self.model, self.chosen.fingerprint),
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
                    if (
                        part.text
                        or part.calls
                        or part.finish
                        or i not in begun
                        or self.samplings[i].logprobs is not None
                    ):
                        logprobs = await self._logprobs(chat, i, part.tokens, reported[i], characters[i])
                        choice = part_choice(chat, i, part.text, part.finish, logprobs, i not in begun, part.calls)
                        body = {**head, "choices": [choice], **({"usage": None} if with_usage else {})}
                        many = self.entries(len(part.tokens)) > MANY
                        yield await asyncio.to_thread(_large_event, body) if many else _event(body)
                        begun.add(i)
                    characters[i] += len(part.text)
                    reported[i] += len(part.tokens)
                try:
                    parts = await anext(rest)
                except StopAsyncIteration:
                    break
            if with_usage:
                yield _event({**head, "choices": [], "usage": usage(self.prompt_tokens, self.generated)})
        except APIError as error:
            yield _event(error.body())
        finally:
            self.close()
        yield b"data: [DONE]\n\n"

    def entries(self, tokens: int) -> int:
        """How many log-probabilities are shown with so many tokens."""
        wanted = self.request.wanted_logprobs()
        return 0 if wanted is None else tokens * (1 + wanted)

    async def _logprobs(
        self, chat: bool, index: int, tokens: Sequence[int], start: int, characters: int
    ) -> protocol.JSON | None:
        sampling = self.samplings[index]
        if sampling.logprobs is None:
            return None
        given = chat, self.vocabulary, tokens, sampling.reported[start : start + len(tokens)], characters
        many = self.entries(len(tokens)) > MANY
        return await asyncio.to_thread(logprobs_of, *given) if many else logprobs_of(*given)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def _large_event(body: dict[str, Any]) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
