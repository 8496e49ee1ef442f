"""Answers of many prompts by many experts in mixed batches, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any


@dataclass(frozen=True)
class Score:
    """How many of how many answers are right."""

    right: int
    of: int

    @property
    def accuracy(self) -> float:
        return self.right / self.of

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)."""
        return sqrt(self.accuracy * (1 - self.accuracy) / self.of)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which stays inside [0, 1] and is not empty when every answer is right."""
        z, n, p = 1.96, self.of, self.accuracy
        centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%}"


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    experts: Sequence | None,
    max_new_tokens: int,
    batch: int = 256,
    temperature: float = 0.0,
    done: Callable[[int], object] | None = None,
) -> list[str]:
    """What the model writes after each prompt, each with its own expert: greedily at temperature 0.

    experts: a name, mixture or None for each prompt, as in `bank.ids`; None altogether: the model as it is, patched or not
    done: called with the number of prompts answered since the last call
    """
    import torch

    written = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of like length together: less padding
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in picked], padding=True, return_tensors="pt").to(model.device)
        route = {} if experts is None else {"experts": [experts[i] for i in picked]}
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling, **route)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(picked, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            written[i] = text
        if done:
            done(len(picked))
    return written


def scores(
    model: Any, tokenizer: Any, task: Any, problems: Sequence[dict], experts: Sequence, batch: int = 256, done: Callable | None = None
) -> list[Score]:
    """The score of each expert on the same problems of a task; all experts run in the same batches."""
    work = [(problem, expert) for problem in problems for expert in experts]
    prompts = [problem["prompt"] for problem, _ in work]
    written = answers(model, tokenizer, prompts, [expert for _, expert in work], task.max_new_tokens, batch, done=done)
    columns = {key: [problem[key] for problem, _ in work] for key in problems[0] if key != "prompt"}
    rewards = task.reward(prompts, written, **columns)
    return [Score(sum(reward > 0 for reward in rewards[k :: len(experts)]), len(problems)) for k in range(len(experts))]
