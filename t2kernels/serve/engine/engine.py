"""`Engine`: who runs, who waits, and who holds a row. Generation itself is a thread of `batching.py`; all of this runs on the event loop.

A request that has been accepted waits until there is a place in the batch and a row for its expert, and holds that row until it has ended.
Those whose expert has no row while every row is held are passed by others, though at most `PATIENCE` times: then nobody passes until a row is
free, so that every request runs in the end. The base model needs no row.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from t2kernels.experts.names import Name
from t2kernels.serve.http.errors import APIError

from .batching import BatchSettings, free_share, longest_request, make_manager
from .sampling import GREEDY, Sampling, draw

PATIENCE = 64
"""How often a request that waits for a row may be passed; at two passes a step this is a second or two on a GPU."""
WATCH = 0.2
"""Seconds between looks at the generation thread."""


@dataclass
class Generation:
    """One accepted request. Iterate over it for its tokens as they come; `cancel` whenever nobody wants them any more.

    on_end: called once, when it has finished, failed or been cancelled
    """

    engine: Engine
    id: str
    prompt: list[int]
    expert: Name
    max_tokens: int
    sampling: Sampling
    on_end: Callable[[], None]
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None  # of its first token
    tokens: int = 0  # that have come
    finish: str | None = None  # "stop" or "length", once it has ended well
    over: bool = False  # ended, in whichever way
    passed: int = 0
    held: Tensor | None = None  # ids of its row
    events: asyncio.Queue = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        """Stop generating and free what it holds; nothing if it has ended."""
        self.engine.cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """New tokens, as many as have come since the last look. Raises APIError if the request fails."""
        while True:
            tokens, last = [], False
            for event in [await self.events.get(), *(self.events.get_nowait() for _ in range(self.events.qsize()))]:
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    last = True
                else:
                    tokens += event
            if tokens:
                yield tokens
            if last:
                return


class Engine:
    """model: patched; ends: tokens that end a text; max_running: requests in the batch at once; max_waiting: requests that may wait for that.

    Make it, then `await start()`. longest: tokens that a request can have.
    Raises what `make_manager` raises, and RuntimeError without memory for the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        ends: Sequence[int],
        settings: BatchSettings | None = None,
        max_running: int = 64,
        max_waiting: int = 512,
    ):
        self.model, self.bank, self.ends = model, model.t2_bank, list(ends) or [-1]
        self.max_running, self.max_waiting = max_running, max_waiting
        self.waiting: dict[str, Generation] = {}  # in the order in which they came
        self.running: dict[str, Generation] = {}
        self.draining = False
        self.failure: str | None = None  # why nothing runs any more
        self._admitting = self._changed = False
        self._reserved = False  # nothing starts
        self._alone = threading.Lock()
        self._ids = map(str, itertools.count())
        self._watch: asyncio.Task | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Lock()
        self._manager = make_manager(model, settings or BatchSettings(), self._sample, self._deliver)
        try:
            self._manager.warmup()  # makes the cache
        except MemoryError as error:
            raise RuntimeError(
                f"the KV cache does not fit ({error}); take fewer --kv-tokens or --batch-tokens"
            ) from None
        self.longest = longest_request(self._manager)

    async def start(self) -> None:
        """Start the generation thread and see that the model runs on it; once. Raises RuntimeError if it does not."""
        if self._watch is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._manager.start()
        self._watch = asyncio.create_task(self._watch_thread())
        try:
            async for _ in self.submit(
                [0, 0], max_tokens=2
            ):  # a step that reads a prompt, and one that reads the cache
                pass
        except APIError as error:
            await self.drain(0)
            raise RuntimeError(
                f"{type(self.model).__name__} does not run with transformers' continuous batching ({error.message}); take --engine vllm"
            ) from None

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        expert: Name = None,
        sampling: Sampling | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Accept a request. Raises APIError: 400 too long for the cache, 429 too many wait, 503 shutting down or dead."""
        self.check_open()
        if len(prompt) + max_tokens > self.longest:
            raise APIError(
                400,
                f"{len(prompt)} tokens of prompt and up to {max_tokens} more do not fit into the KV cache, which holds {self.longest}; "
                "ask for fewer tokens, or start the server with a larger --kv-tokens",
                "context_length_exceeded",
            )
        generation = Generation(self, next(self._ids), list(prompt), expert, max_tokens, sampling or Sampling(), on_end)
        self.waiting[generation.id] = generation
        self._idle.clear()
        self._admit()
        if generation.id in self.waiting and len(self.waiting) > self.max_waiting:
            del self.waiting[generation.id]
            raise APIError(
                429,
                f"{self.max_waiting} requests are waiting, which is the most that may; try again later",
                "queue_full",
                headers={"Retry-After": "1"},
            )
        return generation

    def check_open(self) -> None:
        """Raises APIError 503 when nothing new is taken."""
        if self.failure:
            raise APIError(503, f"generation has ended: {self.failure}; the server must be restarted", "engine_dead")
        if self.draining:
            raise APIError(503, "the server is shutting down", "draining", headers={"Retry-After": "5"})

    def cancel(self, generation: Generation) -> None:
        """See `Generation.cancel`."""
        if generation.id in self.running and self._manager.is_running():
            self._manager.cancel_request(generation.id)
        self._end(generation)

    def free_cache(self) -> float:
        """The share of the KV cache that is free."""
        return free_share(self._manager) if self.failure is None else 1.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it no step of generation runs, so that the model can be used for something else, one at a time; not on the event loop."""
        with self._alone, self._manager.pause():
            yield

    @contextlib.asynccontextmanager
    async def reserved(self, timeout: float) -> AsyncIterator[int]:
        """Within it nothing starts that holds a row, and so many rows, at least one, are free: what runs keeps its own. One at a time.

        timeout: seconds to wait for that. Raises APIError 503.
        """
        self._reserved, until = True, time.monotonic() + timeout
        try:
            while (free := self.bank.rows - 1 - self.bank.rows_in_use) < 1:
                self.check_open()
                if time.monotonic() > until:
                    raise APIError(
                        503, f"no row of the tables became free in {timeout:g} s; nothing has changed", "no_row"
                    )
                await asyncio.sleep(0.02)
            yield free
        finally:
            self._reserved = False
            self._admit()

    async def drain(self, timeout: float) -> bool:
        """Take nothing new, wait for all that was accepted, and end the generation thread. Whether all of it finished in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
            done = True
        except TimeoutError:
            done = False
        self._fail_all(
            APIError(
                503, f"the server shut down before this request had finished ({timeout:g} s were left)", "draining"
            )
        )
        if self._watch is not None:
            self._watch.cancel()
        async with self._stopping:
            if self._manager.is_running():
                await asyncio.to_thread(self._manager.stop, block=True, timeout=10, hard_stop=True)
        self.failure = self.failure or "the server has shut down"
        return done

    # --- on the event loop

    def _admit(self) -> None:
        """Start what can start, the oldest first. What fails at its start calls this again: it then goes round once more, not deeper."""
        self._changed = True
        if self._admitting:
            return
        self._admitting = True
        try:
            while self._changed:
                self._changed = False
                self._admit_once()
        finally:
            self._admitting = False

    def _admit_once(self) -> None:
        blocked: list[Generation] = []
        for generation in list(self.waiting.values()):
            if len(self.running) >= self.max_running or self.failure or self._reserved:
                break
            if generation.over:
                continue
            waits = bool(blocked) and blocked[0].passed >= PATIENCE and generation.expert is not None
            try:
                if waits or not self.bank.has_room_for(generation.expert):
                    blocked.append(generation)
                    continue
            except KeyError as error:
                self._fail(generation, APIError(404, str(error.args[0]), "model_not_found", "model"))
                continue
            for earlier in blocked[:1]:
                earlier.passed += generation.expert is not None
            self._run(generation)

    def _run(self, generation: Generation) -> None:
        del self.waiting[generation.id]
        try:
            with torch.no_grad():
                generation.held = self.bank.ids(generation.expert)
            self.settle()
        except Exception as error:
            self._fail(generation, APIError(500, f"the expert could not be loaded: {error}", "expert_not_loaded"))
            return
        self.running[generation.id] = generation
        taken = self._manager.add_request(
            generation.prompt,
            request_id=generation.id,
            max_new_tokens=generation.max_tokens,
            streaming=True,
            eos_token_id=self.ends,
            expert_row=int(generation.held),
        )
        if taken is None:
            self._fail(generation, APIError(503, f"generation has ended: {self._why()}", "engine_dead"))

    def settle(self) -> None:
        """Wait until rows that this thread wrote are written: generation reads them on another stream."""
        if self.bank.device.type == "cuda":
            torch.cuda.current_stream(self.bank.device).synchronize()

    def _end(self, generation: Generation) -> None:
        """Forget a request, whichever way it ended, and start what can start now."""
        if generation.over:
            return
        generation.over = True
        self.waiting.pop(generation.id, None)
        self.running.pop(generation.id, None)
        generation.held = None  # lets go of its row
        generation.on_end()
        if not self.waiting and not self.running:
            self._idle.set()
        self._admit()

    def _fail(self, generation: Generation, error: APIError) -> None:
        generation.events.put_nowait(error)
        self._end(generation)

    def _fail_all(self, error: APIError) -> None:
        for generation in [
            *self.waiting.values(),
            *self.running.values(),
        ]:  # those that wait first: none of them starts
            self._fail(generation, error)

    def _step(self, outputs: list[tuple[str, list[int], str | None, bool]]) -> None:
        """What one step of generation brought: (request, its new tokens so far, error, whether it was the last)."""
        for name, tokens, error, last in outputs:
            generation = self.running.get(name)
            if generation is None:  # cancelled
                continue
            if error is not None:
                self._fail(generation, APIError(500, f"generation failed: {error}", "generation_failed"))
                continue
            new = tokens[generation.tokens :]
            if new:
                generation.started = generation.started or time.perf_counter()
                generation.tokens = len(tokens)
                generation.events.put_nowait(new)
            if last:
                generation.finish = "stop" if tokens and tokens[-1] in self.ends else "length"
                generation.events.put_nowait(None)
                self._end(generation)

    async def _watch_thread(self) -> None:
        while self._manager.is_running():
            await asyncio.sleep(WATCH)
        self.failure = self._why()
        self._fail_all(APIError(500, f"generation has ended: {self.failure}", "engine_dead"))

    def _why(self) -> str:
        error = self._manager.background_thread_status.fatal_error
        return f"{type(error).__name__}: {error}" if error is not None else "its thread was ended"

    # --- on the generation thread

    def _deliver(self, outputs: list) -> None:
        told = [(o.request_id, o.generated_tokens, o.error, o.is_finished()) for o in outputs]
        self._loop.call_soon_threadsafe(self._step, told)

    def _sample(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        # A request that was cancelled during this step is sampled anyhow; nobody reads it.
        running = [self.running.get(name) for name in names]
        return draw(logits, [GREEDY if g is None else g.sampling for g in running])
