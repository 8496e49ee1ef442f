"""`Drawing`: completions of the policy in training, from an engine, now or ahead of time.

A policy is published as NAME@VERSION when its first prompts are drawn, and dropped when its last ones are taken and a
newer one is there. With `ahead` the engine works in a thread of its own, in the order of `start`.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t2kernels.experts.expert import Expert
from t2kernels.rollout.engines import Draw, RolloutEngine
from t2kernels.rollout.generation import Rollout

Snapshot = Callable[[str], Expert | None]
"""The present policy of an expert's name; None for a name that means the base model."""


@dataclass
class _Started:
    rows: Sequence[Any]
    version: int
    policies: list[str]
    rollout: Future[Rollout]


class Drawing:
    """engine: draws; snapshot: the present policy of a name; ahead: whether draws run in a thread"""

    def __init__(self, engine: RolloutEngine, snapshot: Snapshot, ahead: bool = False) -> None:
        self.engine: RolloutEngine = engine
        self.snapshot: Snapshot = snapshot
        self.moved: int = 0  # bytes of policies since the start
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "rollout") if ahead else None
        self._started: deque[_Started] = deque()
        self._live: dict[str, str] = {}  # policy that is published -> its expert
        self._newest: dict[str, str] = {}  # expert -> its newest policy
        self._dropping: list[Future[Any]] = []

    def start(
        self, rows: Sequence[Any], ids: Tensor, mask: Tensor, experts: Sequence[str | None], version: int, how: Draw
    ) -> None:
        """Begin to draw for a batch with the policies as they are now.

        rows: the batch, given back by `take`; ids, mask: its prompts; experts: [B] names; version: a number that is
            another one after each update
        """
        names: dict[str | None, str | None] = {e: e for e in experts}
        new: dict[str, Expert] = {}
        if self.engine.keeps_versions:
            for e in {e for e in experts if e is not None}:
                policy = f"{e}@{version}"
                if policy not in self._live:
                    if (expert := self.snapshot(e)) is None:
                        names[e] = None
                        continue
                    new[policy] = expert
                    self._live[policy], self._newest[e] = e, policy
                names[e] = policy
        policies = [names[e] for e in experts]

        def work() -> Rollout:
            for policy, expert in new.items():
                self.moved += self.engine.publish(policy, expert)
            return self.engine.draw(ids, mask, policies, how)

        used = sorted({p for p in policies if p is not None}) if self.engine.keeps_versions else []
        self._started.append(_Started(rows, version, used, self._run(work)))

    def take(self, rows: Sequence[Any]) -> tuple[Rollout, int]:
        """(the rollout of the oldest batch that was started, the version that drew it). Raises what the engine raised.

        rows: that batch
        """
        one = self._started.popleft()
        assert one.rows is rows, "batches are taken in the order in which they were started"
        rollout = one.rollout.result()
        self._drop_unused()
        return rollout, one.version

    def close(self) -> None:
        """End the thread, without the draws that have not begun, and the engine."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()

    def _drop_unused(self) -> None:
        for done in [d for d in self._dropping if d.done()]:
            self._dropping.remove(done)
            done.result()
        used = Counter(policy for one in self._started for policy in one.policies)
        old = [p for p, e in self._live.items() if not used[p] and self._newest[e] != p]
        for policy in old:
            del self._live[policy]
        if old:
            self._dropping.append(self._run(lambda: self.engine.drop(old)))

    def _run(self, work: Callable[[], Any]) -> Future[Any]:
        if self._thread is not None:
            return self._thread.submit(work)
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except Exception as e:
            done.set_exception(e)
        return done


@contextlib.contextmanager
def closing(trainer: Any) -> Any:
    """Close `trainer.drawing` after the block, if it was opened."""
    try:
        yield
    finally:
        drawing, trainer.drawing = trainer.drawing, None
        if drawing is not None:
            drawing.close()
