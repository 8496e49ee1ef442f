"""The numbers of each batch: gathered for the log, and shown to `Watch`."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels.train.processes import gather

from .watch import Watch


class Measures:
    """Collects values of completions. watch: sees each batch; several: whether there are several experts."""

    def __init__(self, watch: Watch, several: bool) -> None:
        self.watch: Watch = watch
        self.several: bool = several
        self.since_log: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = {}
        self._batch: dict[str | None, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._answers: list[tuple[str | None, object, str, bool]] = []

    def note(self, experts: Sequence[str | None], **values: Tensor) -> None:
        """Take values of the rows of a batch. experts: of the rows; values: [B] each"""
        for key, v in values.items():
            for e, one in zip(experts, v.tolist(), strict=True):
                self.since_log[key].append(one)
                self._batch[e][key].append(one)
                if self.several:
                    self.since_log[f"{e}_{key}"].append(one)

    def metric(self, name: str, value: float) -> None:
        """Take a number of a reward, for the mean of this name."""
        self.since_log[name].append(float(value))

    def keep(self, column: str, values: Sequence[Any]) -> None:
        """Take a value of a reward for each completion. `extra` has those of the newest call for each column."""
        self.extra[column] = list(values)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """In the block numbers are collected apart from those of the training."""
        kept, self.since_log = self.since_log, defaultdict(list)
        try:
            yield
        finally:
            self.since_log = kept

    def answers(
        self, experts: Sequence[str | None], prompts: Sequence[object], texts: Sequence[Any], right: Tensor
    ) -> None:
        """Take what was answered to each prompt. texts: texts, or chats whose last message is the answer"""
        plain = [t if isinstance(t, str) else str(t[-1].get("content")) for t in texts]
        self._answers += zip(experts, prompts, plain, right.tolist(), strict=True)

    def end_of_batch(self) -> None:
        """Show the batch to `watch`. To be called when its loss is known."""
        if self._answers:
            shares = self.watch.texts(*zip(*self._answers, strict=True))
            self.note(list(shares), same_text=torch.tensor(list(shares.values())))
        for expert, values in self._batch.items():
            self.watch.levels(expert, {key: math.fsum(v) / len(v) for key, v in values.items()})
        self._batch.clear()
        self._answers.clear()

    def means(self, processes: int) -> dict[str, float]:
        """{key: mean since the last call}, over all processes, which all must call it."""
        everyone: dict[str, list[float]] = defaultdict(list)
        for (part,) in gather([dict(self.since_log)], processes):
            for key, values in part.items():
                everyone[key] += values
        self.since_log.clear()
        return {key: math.fsum(values) / len(values) for key, values in everyone.items()}


def statistics(values: Sequence[Any], prefix: str) -> dict[str, float]:
    """Means and standard errors of (reward, length) pairs. A reward of NaN is left out."""
    rewards, lengths = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    rewards = rewards[~rewards.isnan()]
    n = max(len(rewards), 1)
    accuracy = (rewards > 0).double().mean().item()
    return {
        f"{prefix}_accuracy": accuracy,
        f"{prefix}_accuracy_se": (accuracy * (1 - accuracy) / n) ** 0.5,
        f"{prefix}_reward": rewards.mean().item(),
        f"{prefix}_reward_se": ((rewards - rewards.mean()).square().mean() / n).sqrt().item(),
        f"{prefix}_completion_length": lengths.mean().item(),
    }
