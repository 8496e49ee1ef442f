"""Rewards of completions, and the advantages made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError

Reward = Callable[..., Sequence[float]]
"""reward(prompts=[...], completions=[...], **columns) -> one number for each completion: the form that TRL calls."""


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
        if len(weights) != len(rewards):
            raise InputError(f"{len(weights)} reward_weights for {len(rewards)} rewards; wanted one for each")
        return cls(rewards, weights)

    @property
    def name(self) -> str:
        """The names of the reward functions."""
        return " + ".join(getattr(r, "__qualname__", type(r).__name__) for r in self.rewards)

    def __call__(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[Any]) -> Tensor:
        """The reward of each completion.

        rows: [B] dicts with a prompt and the columns of the reward; completions: [B] texts or chats
        Returns [B] fp32 on the CPU. Raises ValueError if a reward returns another count, or something that is not a
        finite number.
        """
        prompts = [row["prompt"] for row in rows]
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
        total = torch.zeros(len(rows), dtype=torch.float32)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            values = reward(prompts=prompts, completions=list(completions), **columns)
            total += weight * _numbers(values, len(rows), reward)
        return total


def _numbers(values: object, count: int, reward: Reward) -> Tensor:
    """What a reward returned as [B] fp32, after checks."""
    who = f"the reward {getattr(reward, '__qualname__', reward)!s}"
    if isinstance(values, Tensor):
        values = values.detach().reshape(-1).tolist()
    if not hasattr(values, "__len__") or len(values) != count:
        got = f"{len(values)} values" if hasattr(values, "__len__") else repr(values)
        raise InputError(f"{who} returned {got} for {count} completions; wanted one number for each")
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError) as e:
        raise InputError(f"{who} returned something that is not a number: {e}") from None
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise InputError(f"{who} returned {number} for completion {i} of {count}; wanted finite numbers")
    return torch.tensor(numbers, dtype=torch.float32)


def advantages(
    rewards: Tensor, groups: Sequence[Hashable], samples: int, kind: str = "none", clip: float | None = None
) -> Tensor:
    """The weight A of each completion's log-probability.

    rewards: [B] fp32, the `samples` completions of a prompt side by side
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
            std = r.std(unbiased=False)
            out[at] = (r - r.mean()) / std if std > 1e-8 else torch.zeros_like(r)
    elif kind in ("group", "grpo", "leave_one_out"):
        r = rewards.reshape(-1, samples)
        out = r - r.mean(1, keepdim=True)
        out = (out / (r.std(1, keepdim=True) + 1e-4) if kind == "grpo" else out).reshape(-1)
        if kind == "leave_one_out":
            out = out * (samples / (samples - 1))  # r - (S - r) / (G - 1) = G / (G - 1) (r - S / G)
    else:
        out = rewards.clone()
    return out if clip is None else out.clamp(-clip, clip)
