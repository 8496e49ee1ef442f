"""Rewards of completions, and the advantages made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Reward = Callable[..., Sequence[float]]
"""reward(prompts=[...], completions=[...], **columns) -> one number a completion: the form that TRL calls."""


@dataclass(frozen=True)
class Scorer:
    """r = Σ_k weights_k reward_k(prompts, completions, **columns).

    Raises ValueError without a reward, or with another number of weights.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, reward: Reward | Sequence[Reward] | None, weights: Sequence[float] | None = None) -> Scorer:
        rewards = tuple(reward) if isinstance(reward, (list, tuple)) else (reward,)
        if not rewards or not all(map(callable, rewards)):
            raise ValueError(
                f"reward={reward!r}; wanted a callable reward(prompts, completions, **columns) -> list of numbers, a list of these, "
                "or a task, which brings its own"
            )
        weights = tuple(map(float, weights or [1.0] * len(rewards)))
        if len(weights) != len(rewards):
            raise ValueError(f"{len(weights)} reward_weights for {len(rewards)} rewards; wanted one for each")
        return cls(rewards, weights)

    @property
    def name(self) -> str:
        return " + ".join(getattr(r, "__qualname__", type(r).__name__) for r in self.rewards)

    def __call__(self, rows: Sequence[Mapping], completions: Sequence) -> Tensor:
        """[B] fp32 on the CPU: the reward of each completion of the row beside it. Raises ValueError on a count or a value that cannot be."""
        prompts = [row["prompt"] for row in rows]
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
        total = torch.zeros(len(rows))
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            total += weight * _numbers(
                reward(prompts=prompts, completions=list(completions), **columns), len(rows), reward
            )
        return total


def _numbers(values: object, count: int, reward: Reward) -> Tensor:
    who = f"the reward {getattr(reward, '__qualname__', reward)!s}"
    if isinstance(values, Tensor):
        values = values.detach().reshape(-1).tolist()
    if not hasattr(values, "__len__") or len(values) != count:
        got = f"{len(values)} values" if hasattr(values, "__len__") else repr(values)
        raise ValueError(f"{who} returned {got} for {count} completions; wanted one number for each")
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{who} returned something that is no number: {e}") from None
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{who} returned {number} for completion {i} of {count}; wanted finite numbers")
    return torch.tensor(numbers)


def advantages(
    rewards: Tensor, groups: Sequence, samples: int, kind: str = "none", clip: float | None = None
) -> Tensor:
    """[B] fp32: what each completion's log-probability is weighted with.

    rewards: [B], the `samples` completions of a prompt side by side
    groups: [B] hashable; "batch" takes mean and deviation over the completions of equal group (an expert's)
    kind: "none" r; "batch" (r - mean) / std, 0 where all are equal; "group" r - mean over the prompt's completions; "leave_one_out" r - mean
        over the prompt's other completions, which keeps the estimate unbiased
    clip: the result is cut to [-clip, clip]
    """
    if kind == "batch":
        out = torch.empty_like(rewards)
        for group in dict.fromkeys(groups):
            at = torch.tensor([g == group for g in groups])
            r = rewards[at]
            std = r.std(unbiased=False)
            out[at] = (r - r.mean()) / std if std > 1e-8 else torch.zeros_like(r)
    elif kind in ("group", "leave_one_out"):
        r = rewards.reshape(-1, samples)
        out = (r - r.mean(1, keepdim=True)).reshape(-1)
        if kind == "leave_one_out":
            out = out * (samples / (samples - 1))  # r - (S - r) / (G - 1) = G / (G - 1) (r - S / G)
    else:
        out = rewards.clone()
    return out if clip is None else out.clamp(-clip, clip)
