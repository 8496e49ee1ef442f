"""`Generation`: one accepted request, as its caller sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from t2kernels.experts.names import Name

from .sampling import Sampling


@dataclass(eq=False)
class Generation:
    """One accepted request. Iterate over it to get its tokens as they are generated.

    id: unique within the engine; prompt: token ids; expert: name in the bank, None for the base model, or a mixture
    max_tokens: most new tokens; sampling: how they are chosen; ends: tokens that end the text
    score: whether the log-probabilities of the prompt are wanted
    on_cancel: called by `cancel`; on_end: called once, after the request has finished, failed or been cancelled
    """

    id: str
    prompt: Sequence[int]
    expert: Name
    max_tokens: int
    sampling: Sampling
    on_cancel: Callable[[Generation], None]
    on_end: Callable[[], None]
    ends: Sequence[int]
    score: bool

    arrived: float = field(default_factory=time.perf_counter)
    """Time at which the request was accepted, of `time.perf_counter`."""
    admitted: float | None = None
    """Time at which it got its row, of `time.perf_counter`."""
    started: float | None = None
    """Time of its first token, of `time.perf_counter`."""
    tokens: int = 0
    """Number of tokens generated so far."""
    finish: str | None = None
    """"stop" or "length" after the request has finished."""
    over: bool = False
    """Whether the request has ended: finished, failed or cancelled."""
    failed: bool = False
    """Whether its outputs were not finite. It is told once; steps may follow until the event loop has ended it."""
    passed: int = 0
    """How many other requests have overtaken it while it waited for a row."""
    scoring: asyncio.Task[None] | None = None
    """Reads the prompt for its log-probabilities."""
    rows: list[int] | None = None
    """The pinned row of its expert while it runs."""
    events: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    """New tokens, the error that ended it, or None at its end."""

    def take(self, tokens: Sequence[int]) -> None:
        """Pass on what is new. tokens: all so far"""
        new = list(tokens[self.tokens :])
        if new:
            self.started = self.started or time.perf_counter()
            self.tokens = len(tokens)
            self.events.put_nowait(new)

    def finished(self, reason: str) -> None:
        """Note that no token comes any more, and why."""
        self.finish = reason
        self.events.put_nowait(None)

    def cancel(self) -> None:
        """Stop generating and free the row and the cache. Does nothing if the request has ended."""
        self.on_cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """All tokens that are new since the last look. Raises APIError if the request fails."""
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
