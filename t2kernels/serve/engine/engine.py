"""`Engine`: the queue of requests, and the row that each of them holds.

It runs on the event loop; batching.py generates on a thread. An accepted request waits for a place in the batch and for
a row for its expert. It holds that row until it ends. The base model needs no row.

A request that waits for a row may be overtaken up to PATIENCE times. After that the queue blocks until a row is free,
so that no request waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.names import Name
from t2kernels.serve.http.errors import APIError, EngineError

from .batching import BatchSettings, free_share, longest_request, make_manager
from .handle import Generation
from .sampling import Sampling
from .scoring import Scorer
from .steps import Output, choose, outputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger: logging.Logger = logging.getLogger(__name__)

PATIENCE: int = 64
"""How often a request that waits for a row may be overtaken. At two a step this is a second or two on a GPU."""
WATCH_SECONDS: float = 0.2
"""Time between two looks at the generation thread."""


class Engine:
    """Runs requests with experts on one patched model. Make it, then `await start()`.

    model: patched; ends: tokens that end a text
    settings: sizes of the batch and of the KV cache
    max_running: most requests in the batch; max_waiting: most requests that wait for a place in it
    Raises what `make_manager` raises, and EngineError if the KV cache does not fit into memory.
    """

    model: PreTrainedModel
    bank: ExpertBank
    ends: list[int]
    max_running: int
    max_waiting: int
    longest: int
    """Most tokens (prompt and completion) of one request."""
    waiting: dict[str, Generation]
    """Accepted requests that have not started, in order of arrival."""
    running: dict[str, Generation]
    """Requests with a row: in the batch, or being scored."""
    draining: bool
    """Whether the server is shutting down: no new request is accepted."""
    failure: str | None
    """Why nothing can run any more."""
    generated: int
    """Tokens generated since the start, over all requests."""

    def __init__(
        self,
        model: PreTrainedModel,
        ends: Sequence[int],
        settings: BatchSettings | None = None,
        max_running: int = 64,
        max_waiting: int = 512,
    ) -> None:
        self.model, self.bank, self.ends = model, model.t2_bank, list(ends) or [-1]
        self.max_running, self.max_waiting = max_running, max_waiting
        self.waiting, self.running = {}, {}
        self.failure, self.draining, self.generated = None, False, 0
        self._admitting = self._changed = self._reserved = False  # while reserved, nothing starts
        self._alone = threading.Lock()
        self._ids = map(str, itertools.count())
        self._watch: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._scorer = Scorer(model, self.paused)
        self._stopping = asyncio.Lock()
        self._manager = make_manager(model, settings or BatchSettings(), self._sample, self._deliver)
        try:
            self._manager.warmup()  # allocates the KV cache
        except MemoryError as error:
            raise EngineError(
                f"the KV cache does not fit into memory ({error}); use a smaller --kv-tokens or --batch-tokens"
            ) from None
        self.longest = longest_request(self._manager)

    async def start(self) -> None:
        """Start the generation thread and generate two tokens as a check. Later calls do nothing.

        Raises EngineError if the model does not run.
        """
        if self._watch is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._manager.start()
        self._watch = asyncio.create_task(self._watch_thread())
        try:
            async for _ in self.submit([0, 0], max_tokens=2):  # one step reads the prompt, one reads the cache
                pass
        except APIError as error:
            await self.drain(0)
            raise EngineError(
                f"{type(self.model).__name__} does not run with transformers' continuous batching ({error.message}); "
                "use --engine vllm"
            ) from None

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        expert: Name = None,
        sampling: Sampling | None = None,
        on_end: Callable[[], None] = lambda: None,
        ends: Sequence[int] | None = None,
        score: bool = False,
    ) -> Generation:
        """Accept a request.

        prompt: token ids; max_tokens: most new tokens; expert: name in the bank, None for the base model, or a mixture
        sampling: greedy by default; on_end: called once, after the request has finished, failed or been cancelled
        ends: tokens that end the text, the model's by default; score: whether to report log p of the prompt's tokens
        Raises APIError: 400 too long for the cache, 429 too many requests wait, 503 shutting down or dead.
        """
        self.check_open()
        if len(prompt) + max_tokens > self.longest:
            raise APIError(
                400,
                f"{len(prompt)} tokens of prompt and up to {max_tokens} more do not fit into the KV cache, which holds "
                f"{self.longest}, the maximum context length here; start the server with a larger --kv-tokens",
                "context_length_exceeded",
            )
        sampling, ends = sampling or Sampling(), self.ends if ends is None else list(ends) or [-1]
        if sampling.adjustment is not None:
            sampling.adjustment.prompt = prompt
        generation = Generation(
            next(self._ids), list(prompt), expert, max_tokens, sampling, self.cancel, on_end, ends, score
        )
        self.waiting[generation.id] = generation
        self._idle.clear()
        self._admit()
        if generation.id in self.waiting and len(self.waiting) > self.max_waiting:
            del self.waiting[generation.id]
            raise APIError(
                429,
                f"{self.max_waiting} requests are waiting, the limit of this server; try again later",
                "queue_full",
                headers={"Retry-After": "1"},
            )
        return generation

    def check_open(self) -> None:
        """Raises APIError 503 if no new request is accepted."""
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
        """The free share of the KV cache, from 0 to 1."""
        return free_share(self._manager) if self.failure is None else 1.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it no step of generation runs, so that the caller may use the model.

        One caller at a time; others wait. Not to be used on the event loop.
        """
        with self._alone, self._manager.pause():
            yield

    @contextlib.asynccontextmanager
    async def reserved(self, timeout: float) -> AsyncIterator[int]:
        """Within it no request starts. Running requests go on and keep their rows.

        Yields the number of free rows, at least 1.

        timeout: seconds to wait for a free row. Raises APIError 503 after that. One caller at a time.
        """
        self._reserved, until = True, time.monotonic() + timeout
        try:
            while (free := self.bank.rows - 1 - self.bank.rows_in_use) < 1:
                self.check_open()
                if time.monotonic() > until:
                    raise APIError(503, f"no row became free in {timeout:g} s; nothing has changed", "no_row")
                await asyncio.sleep(0.02)
            yield free
        finally:
            self._reserved = False
            self._admit()

    async def drain(self, timeout: float) -> bool:
        """Accept nothing new, wait for all accepted requests, and end the generation thread.

        timeout: seconds to wait; then the remaining requests fail. Returns whether all requests finished in time.
        """
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        done = self._idle.is_set()
        message = f"the server shut down before this request had finished ({timeout:g} s were left)"
        self._fail_all(APIError(503, message, "draining"))
        if self._watch is not None:
            self._watch.cancel()
        async with self._stopping:
            if self._manager.is_running():
                await asyncio.to_thread(self._manager.stop, block=True, timeout=10, hard_stop=True)
        self.failure = self.failure or "the server has shut down"
        return done

    # --- on the event loop

    def _admit(self) -> None:
        """Start every request that can start, the oldest first. A call within a call makes the outer one repeat."""
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
        """Load the expert into a row, and start."""
        del self.waiting[generation.id]
        try:
            with torch.no_grad():
                generation.rows = self.bank.pin([generation.expert])
            self.settle()
        except Exception as error:
            logger.exception("request %s: expert %r could not be loaded", generation.id, generation.expert)
            self._fail(generation, APIError(500, f"the expert could not be loaded: {error}", "expert_not_loaded"))
            return
        generation.admitted = time.perf_counter()
        self.running[generation.id] = generation
        if generation.score:
            generation.scoring = asyncio.create_task(self._score(generation))
        else:
            self._generate(generation)

    async def _score(self, generation: Generation) -> None:
        try:
            await self._scorer.score(generation)
        except APIError as error:
            self._fail(generation, error)
        except Exception as error:
            self._fail_with(generation, error)
        else:
            self._generate(generation)

    def _generate(self, generation: Generation) -> None:
        """Hand a request with its row to the generation thread."""
        if generation.over:
            return
        if not generation.max_tokens:  # its prompt was all that is wanted
            generation.finished("length")
            self._end(generation)
            return
        try:
            accepted = self._manager.add_request(
                generation.prompt,
                request_id=generation.id,
                max_new_tokens=generation.max_tokens,
                streaming=True,
                eos_token_id=list(generation.ends),
                expert_row=generation.rows[0],
            )
        except Exception as error:
            self._fail_with(generation, error)
        else:
            if accepted is None:
                self._fail(generation, APIError(503, f"generation has ended: {self._why()}", "engine_dead"))

    def settle(self) -> None:
        """Wait until this thread's writes to rows are done, because generation reads them on another CUDA stream."""
        if self.bank.device.type == "cuda":
            torch.cuda.current_stream(self.bank.device).synchronize()

    def _end(self, generation: Generation) -> None:
        """Forget a request that has finished, failed or been cancelled, and start what can start now."""
        if generation.over:
            return
        generation.over = True
        self.waiting.pop(generation.id, None)
        self.running.pop(generation.id, None)
        if generation.rows is not None:
            self.bank.unpin(generation.rows)
            generation.rows = None
        try:
            generation.on_end()
        except Exception:  # the other requests must go on
            logger.exception("request %s: its on_end failed", generation.id)
        if not self.waiting and not self.running:
            self._idle.set()
        self._admit()

    def _fail(self, generation: Generation, error: APIError) -> None:
        generation.events.put_nowait(error)
        self._end(generation)

    def _fail_with(self, generation: Generation, error: Exception) -> None:
        """Fail a request for a fault of this file. Call it where the error was caught."""
        logger.exception("request %s failed", generation.id)
        self._drop(generation, APIError(500, f"{type(error).__name__}: {error}", "internal_error"))

    def _drop(self, generation: Generation, error: APIError) -> None:
        if not generation.over:
            generation.events.put_nowait(error)
            self.cancel(generation)

    def _fail_all(self, error: APIError) -> None:
        # Waiting requests first, so that none of them starts when a running one ends.
        for generation in [*self.waiting.values(), *self.running.values()]:
            self._fail(generation, error)

    def _step(self, outputs: Sequence[Output]) -> None:
        """Take the outputs of one step. An error, which the loop would only log, fails the request it came from."""
        for output in outputs:
            generation = self.running.get(output.id)
            if generation is None:  # cancelled
                continue
            try:
                self._take(generation, output)
            except Exception as error:
                self._fail_with(generation, error)

    def _take(self, generation: Generation, output: Output) -> None:
        if output.error is not None:
            self._fail(generation, APIError(500, f"generation failed: {output.error}", "generation_failed"))
            return
        before = generation.tokens
        generation.take(output.tokens)
        self.generated += generation.tokens - before
        if output.last:
            generation.finished("stop" if output.tokens and output.tokens[-1] in generation.ends else "length")
            self._end(generation)

    async def _watch_thread(self) -> None:
        while self._manager.is_running():
            await asyncio.sleep(WATCH_SECONDS)
        self.failure = self._why()
        error = self._manager.background_thread_status.fatal_error
        logger.error("the generation thread has ended: %s", self.failure, exc_info=error)
        self._fail_all(APIError(500, f"generation has ended: {self.failure}", "engine_dead"))

    def _why(self) -> str:
        error = self._manager.background_thread_status.fatal_error
        return f"{type(error).__name__}: {error}" if error is not None else "its thread was ended"

    # --- on the generation thread

    def _deliver(self, outputs: Sequence[Any]) -> None:
        self._loop.call_soon_threadsafe(self._step, outputs_of(outputs))

    def _sample(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        running = [self.running.get(name) for name in names]  # None for one that was cancelled during this step
        return choose(logits, running, lambda *a: self._loop.call_soon_threadsafe(self._drop, *a))
