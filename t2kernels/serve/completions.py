"""One request of the API from its prompts to its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request as HTTPRequest

from t2kernels.serve.engine.engine import Generation
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.text import Decoder

from .http import protocol
from .registry import Chosen, Experts

if TYPE_CHECKING:
    from .app import Service


@dataclass
class Part:
    """What is new of one of the completions. finish: None until its last part"""

    index: int
    text: str
    tokens: list[int]
    finish: str | None = None


class Answer:
    """The completions of one request. Iterate over it for parts; `close` ends whatever still runs.

    prompts: token ids, with how many tokens may follow each; chosen: held, and released here; model: who the answer says it is from
    Raises APIError if the engine does not take all of them: then none of them runs.
    """

    def __init__(
        self,
        service: Service,
        prompts: list[list[int]],
        limits: list[int],
        request: protocol.Request,
        chosen: Chosen,
        model: str,
    ):
        self.engine, self.metrics, self.tokenizer, experts = (
            service.engine,
            service.metrics,
            service.tokenizer,
            service.experts,
        )
        self.request, self.chosen, self.model = request, chosen, model
        self.prompt_tokens = sum(map(len, prompts))
        self.experts, self.status = experts, "499"  # the client has gone, unless something else happens
        self.samplings = [request.sampling(i) for i in range(len(prompts) * request.n)]
        self.generations: list[Generation] = []
        self._parts: asyncio.Queue = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []
        self._closed = False
        try:
            for i, sampling in enumerate(self.samplings):
                self._submit(experts, prompts[i // request.n], limits[i // request.n], sampling)
        except BaseException as error:
            self.status = str(getattr(error, "status_code", 500))
            self.close()
            raise
        finally:
            experts.release(chosen)
        self.metrics.tokens_in.labels(self.label).inc(self.prompt_tokens)
        self._tasks = [asyncio.create_task(self._follow(i, g)) for i, g in enumerate(self.generations)]

    def _submit(self, experts: Experts, prompt: list[int], limit: int, sampling) -> None:
        held = experts.share(self.chosen)

        def release() -> None:
            experts.release(held)

        try:
            self.generations.append(self.engine.submit(prompt, limit, held.expert, sampling, release))
        except APIError:
            release()
            raise

    @property
    def label(self) -> str:
        return self.experts.label(self.chosen.label)

    @property
    def generated(self) -> int:
        return sum(g.tokens for g in self.generations)

    def close(self) -> None:
        """Cancel what runs, and count the request; whatever calls after the first do nothing."""
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
            generation.cancel()
            self._parts.put_nowait(APIError(500, f"{type(error).__name__}: {error}", "internal_error"))
        finally:
            self._time(generation)

    def _time(self, generation: Generation) -> None:
        if generation.started is not None:
            self.metrics.first.labels(self.label).observe(generation.started - generation.arrived)
            if generation.tokens > 1:
                self.metrics.each.labels(self.label).observe(
                    (time.perf_counter() - generation.started) / (generation.tokens - 1)
                )

    async def __aiter__(self) -> AsyncIterator[list[Part]]:
        """Parts, as many as have come. Raises APIError if one of the completions fails: then all do."""
        open_ = len(self.generations)
        while open_:
            parts = [await self._parts.get(), *(self._parts.get_nowait() for _ in range(self._parts.qsize()))]
            for part in parts:
                if isinstance(part, APIError):
                    self.status = str(part.status_code)
                    raise part
                open_ -= part.finish is not None
            if not open_:
                self.status = "200"
            yield parts

    # --- the two forms of an answer

    async def whole(self, chat: bool) -> dict:
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
        answer = {**protocol.envelope(chat, self.model, self.chosen.fingerprint), "choices": choices}
        return {
            **answer,
            "object": "chat.completion" if chat else "text_completion",
            "usage": protocol.usage(self.prompt_tokens, self.generated),
        }

    async def events(self, chat: bool, first: list[Part], rest: AsyncIterator[list[Part]]) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each part, then [DONE]; an error as a chunk that holds one."""
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

    def _logprobs(self, chat: bool, index: int, tokens: list[int], start: int, characters: int) -> dict | None:
        way = self.samplings[index]
        if way.logprobs is None:
            return None
        shown = [t for t in tokens if t not in self.engine.ends]
        return protocol.logprobs_of(chat, self.tokenizer, shown, way.reported[start : start + len(shown)], characters)


def _event(body: dict) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


async def while_connected(http: HTTPRequest, work: asyncio.Task):
    """The result of `work`, which is cancelled when the client hangs up. Raises APIError 499 then; nobody reads it."""
    gone = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise APIError(499, "the client has gone")
        return work.result()
    finally:
        for task in (gone, work):
            task.cancel()


async def _gone(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
