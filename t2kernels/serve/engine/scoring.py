"""log p of the tokens of a prompt, for `echo` with log-probabilities.

    reported[0] = None,  reported[t] = log p(prompt[t] | prompt[:t]) and the likeliest tokens there

Continuous batching computes logits of last tokens only. So these prompts are read by a forward of their own, between
two steps of generation, in pieces, so that logits of one piece are in memory at a time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from t2kernels.rollout.prefix import forward

from .handle import Generation
from .sampling import Logprobs, report
from .steps import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE: int = 4096
"""Tokens of one forward, over all prompts of a batch."""


class Scorer:
    """Scores prompts. Those that arrive together are read together.

    model: patched; paused: a context in which nothing is generated, to be entered on a thread
    """

    def __init__(self, model: PreTrainedModel, paused: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._paused = model, paused
        self._asked: list[tuple[Generation, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def score(self, generation: Generation) -> None:
        """Fill `reported` of the generation's sampling with an entry for each token of its prompt.

        The generation holds its row. Raises APIError if its numbers are not finite.
        """
        future = asyncio.get_running_loop().create_future()
        self._asked.append((generation, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())
        await future

    async def _answer(self) -> None:
        while self._asked:
            # Prompts of about the same length, so that little is padded.
            asked = sorted(self._asked, key=lambda a: len(a[0].prompt))
            longest = len(asked[-1][0].prompt)
            batch = asked[-max(1, PIECE // longest) :]
            self._asked = [a for a in self._asked if a not in batch]
            try:
                reports = await asyncio.to_thread(self._read, [generation for generation, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (generation, future), reported in zip(batch, reports, strict=True):
                if future.done():
                    continue
                if any(r is not None and math.isnan(r[0]) for r in reported):
                    future.set_exception(not_finite())
                    continue
                generation.sampling.reported[:] = reported
                future.set_result(None)

    @torch.no_grad()
    def _read(self, generations: Sequence[Generation]) -> list[list[Logprobs | None]]:
        prompts = [list(g.prompt) for g in generations]
        counts = [g.sampling.logprobs or 0 for g in generations]
        device, longest = self._model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        rows = torch.tensor([(g.rows or [0])[0] for g in generations], dtype=torch.int32, device=device)
        out: list[list[Logprobs | None]] = [[None] for _ in prompts]
        step, cache = max(1, PIECE // len(prompts)), None
        with self._paused(), self._model.t2_bank.routing.hold(None):
            for start in range(0, longest - 1, step):
                end = min(start + step, longest - 1)
                logits, cache = forward(self._model, ids[:, :end], mask[:, :end], cache, expert_ids=rows)
                for b, prompt in enumerate(prompts):
                    skip = max(0, longest - len(prompt) - start)  # padding in this piece
                    if skip < end - start:
                        out[b] += report(
                            logits[b, skip:], ids[b, start + skip + 1 : end + 1], [counts[b]] * (end - start - skip)
                        )
        return out
