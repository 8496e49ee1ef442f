"""Rewards of completions, and the advantages made of them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError

Reward = Callable[..., Any]
"""reward(prompts=[...], completions=[...], **columns) -> for each completion a number, or None where the reward does
not apply: the form that TRL calls. It may be async. A trainer also passes the fields of a `RewardContext` that the
function names, or all if it takes **kwargs."""


def _nowhere(name: str, value: Any) -> None:
    pass


@dataclass(frozen=True)
class RewardContext:
    """What a reward may ask for beside the columns, under TRL's names.

    completion_ids: [B] lists of token ids, the end token among them
    trainer_state: transformers' TrainerState
    log_metric: log_metric(name, number) adds to a mean that is logged
    log_extra: log_extra(column, values) keeps a value for each completion
    """

    completion_ids: Sequence[Sequence[int]]
    trainer_state: Any = None
    log_metric: Callable[[str, float], None] = field(default=_nowhere)
    log_extra: Callable[[str, Sequence[Any]], None] = field(default=_nowhere)

    def accepted(self, reward: Reward) -> dict[str, Any]:
        """Those fields that a reward takes."""
        try:
            parameters = inspect.signature(reward).parameters
        except (TypeError, ValueError):  # a builtin
            return {}
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {name: value for name, value in vars(self).items() if every or name in parameters}


def is_task(data: object) -> bool:
    """True for a `t2kernels.tasks.Task` or the like: it has splits, and its own reward."""
    return callable(getattr(data, "reward", None)) and callable(getattr(data, "split", None))


@dataclass(frozen=True)
class Scorer:
    """r = Σ_k weights_k reward_k(prompts, completions, **columns)."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, reward: Any, weights: Sequence[float] | None = None) -> Scorer:
        """The scorer of a reward, of several (a list), or of a task, which brings its own.

        weights: one for each reward; None: all 1
        Raises ValueError for what is not callable, and for another number of weights.
        """
        reward = reward.reward if is_task(reward) else reward
        rewards = tuple(reward) if isinstance(reward, (list, tuple)) else (reward,)
        if not rewards or not all(map(callable, rewards)):
            raise InputError(
                f"reward={reward!r}; wanted a callable reward(prompts, completions, **columns) -> list of numbers, "
                "a list of these, or a task"
            )
        weights = tuple(map(float, weights or [1.0] * len(rewards)))
        if not all(map(math.isfinite, weights)):
            raise InputError(f"reward_weights={list(weights)}; wanted finite numbers")
        if len(weights) != len(rewards):
            raise InputError(f"{len(weights)} reward_weights for {len(rewards)} rewards; wanted one for each")
        return cls(rewards, weights)

    @property
    def name(self) -> str:
        """The names of the reward functions."""
        return " + ".join(getattr(r, "__qualname__", type(r).__name__) for r in self.rewards)

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], completions: Sequence[Any], context: RewardContext | None = None
    ) -> Tensor:
        """The reward of each completion: the weighted sum over the rewards that apply to it, those that are not None.

        rows: [B] dicts with a prompt and the columns of the reward; completions: [B] texts or chats
        context: for rewards that ask for more; with it a completion to which no reward applies has the reward NaN
        Async rewards run at the same time, after the others.

        Returns [B] fp32 on the CPU. Raises ValueError if a reward returns another count, or something that is neither
        a finite number nor None; and without context, if no reward applies to a completion.
        """
        prompts = [row["prompt"] for row in rows]
        columns = columns_of(rows)
        found: list[Any] = []
        for reward in self.rewards:
            more = {} if context is None else context.accepted(reward)
            found.append(reward(prompts=prompts, completions=list(completions), **{**columns, **more}))
        waiting = [i for i, values in enumerate(found) if inspect.isawaitable(values)]
        for i, values in zip(waiting, _awaited([found[i] for i in waiting]), strict=True):
            found[i] = values
        each = torch.stack(
            [_numbers(values, len(rows), reward) for values, reward in zip(found, self.rewards, strict=True)]
        )
        total = torch.zeros(len(rows), dtype=torch.float32)
        for weight, numbers in zip(self.weights, each, strict=True):
            total += weight * numbers.nan_to_num()
        if not total.isfinite().all():
            raise InputError(f"the weighted sum of {self.name} does not fit fp32; wanted smaller rewards or weights")
        nothing = each.isnan().all(0)
        if context is None and nothing.any():
            raise InputError(
                f"no reward applies to completion {int(nothing.nonzero()[0])} of {len(rows)}: {self.name} returned "
                "None for it; wanted a number from at least one reward"
            )
        return total.masked_fill(nothing, math.nan)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{column: its value in each row, None where a row lacks it}, without the prompts.

    The columns of all rows count: which one comes first is chance.
    """
    return {key: [row.get(key) for row in rows] for key in {k: 0 for row in rows for k in row} if key != "prompt"}


def _awaited(waiting: Sequence[Any]) -> list[Any]:
    """The results of awaitables that run at the same time. The thread that calls may have an event loop of its own."""
    if not waiting:
        return []

    async def everything() -> list[Any]:
        return list(await asyncio.gather(*waiting))

    return asyncio.run_coroutine_threadsafe(everything(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls: what a reward keeps open, such as a connection, belongs to its loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="rewards").start()
    return loop


def _numbers(values: object, count: int, reward: Reward) -> Tensor:
    """What a reward returned as [B] fp32, after checks; NaN for None."""
    who = f"the reward {getattr(reward, '__qualname__', reward)!s}"
    if isinstance(values, Tensor):
        values = values.detach().reshape(-1).tolist()
    if not hasattr(values, "__len__") or len(values) != count or isinstance(values, (str, bytes, Mapping, Set)):
        got = f"{len(values)} values" if hasattr(values, "__len__") else repr(values)
        raise InputError(f"{who} returned {got} for {count} completions; wanted one number for each")
    try:
        numbers = [None if v is None else float(v) for v in values]
    except (TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{who} returned something that is not a number: {e}") from None
    for i, number in enumerate(numbers):
        if number is not None and not abs(number) <= torch.finfo(torch.float32).max:  # also False for NaN
            raise InputError(
                f"{who} returned {number} for completion {i} of {count}; wanted finite numbers, or None where the "
                "reward does not apply"
            )
    return torch.tensor([math.nan if n is None else n for n in numbers], dtype=torch.float32)


def advantages(
    rewards: Tensor, groups: Sequence[Hashable], samples: int, kind: str = "none", clip: float | None = None
) -> Tensor:
    """The weight A of each completion's log-probability.

    rewards: [B] fp32, the `samples` completions of a prompt side by side; NaN for one that no reward applies to: its A
        is 0, and it is in no mean
    groups: [B], whose completions "batch" takes mean and deviation over (an expert's)
    kind:
        "none"           A = r
        "batch"          A = (r - mean) / std over the group; 0 where all rewards are equal
        "group"          A = r - mean over the completions of the prompt
        "grpo"           A = (r - mean) / (std + 1e-4) over the completions of the prompt, with the unbiased std (GRPO,
                         arXiv 2402.03300, section 4.1.2; the constant is TRL's)
        "leave_one_out"  A = r - mean over the other completions of the prompt, which keeps the estimate unbiased
    clip: A is cut to [-clip, clip]
    Returns [B] fp32.
    """
    if kind == "batch":
        out = torch.empty_like(rewards)
        for group in dict.fromkeys(groups):
            at = torch.tensor([g == group for g in groups])
            r = rewards[at]
            there = r[~r.isnan()]
            std = there.std(unbiased=False) if len(there) else r.new_zeros(())
            out[at] = (r - there.mean()) / std if std > 1e-8 else torch.zeros_like(r)
    elif kind in ("group", "grpo", "leave_one_out"):
        r = rewards.reshape(-1, samples)
        n = (~r.isnan()).sum(1, keepdim=True)
        out = r - r.nansum(1, keepdim=True) / n
        if kind == "grpo":
            out = out / ((out.square().nansum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
        if kind == "leave_one_out":
            out = out * (n / (n - 1).clamp(min=1))  # r - (S - r) / (n - 1) = n / (n - 1) (r - S / n)
        out = out.reshape(-1)
    else:
        out = rewards.clone()
    out = out.nan_to_num()
    return out if clip is None else out.clamp(-clip, clip)
