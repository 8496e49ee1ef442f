"""Answers of many prompts by many experts in mixed batches, and what they are worth."""

from __future__ import annotations

import time
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
        centre, half = (
            (p + z * z / (2 * n)) / (1 + z * z / n),
            z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
        )
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%}"


@dataclass
class Meter:
    """Tokens written, end of text included, and the seconds that took."""

    tokens: int = 0
    seconds: float = 0.0


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence,
    experts: Sequence | None,
    max_new_tokens: int,
    batch: int = 256,
    temperature: float = 0.0,
    done: Callable[[int], object] | None = None,
    stop: Sequence[str] = (),
    meter: Meter | None = None,
) -> list[str]:
    """What the model writes after each prompt, each with its own expert: greedily at temperature 0.

    prompts: texts, or chats, which go through the tokenizer's template
    experts: a name, mixture or None for each prompt, as in `bank.ids`; None altogether: the model as it is, patched or not
    done: called with the number of prompts answered since the last call
    stop: texts after which nothing more is written; they are part of what is returned
    meter: what is added to
    """
    import torch

    from t2kernels.rollout.generation import Sampler

    written, meter = [""] * len(prompts), meter or Meter()
    sampler = Sampler(model, tokenizer, max_new_tokens)
    order = sorted(
        range(len(prompts)), key=lambda i: len(str(prompts[i]))
    )  # prompts of like length together: less padding
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if stop:
        sampling |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    start_time = time.perf_counter()
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        ids, mask = sampler.encode([prompts[i] for i in picked], model.device)
        route = {} if experts is None else {"experts": [experts[i] for i in picked]}
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling, **route
            )[:, ids.shape[1] :]
        ends = torch.isin(made, torch.tensor(sampler.ends, device=made.device)).long()
        meter.tokens += int((ends.cumsum(1) - ends == 0).sum())
        for i, text in zip(picked, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            written[i] = text
        if done:
            done(len(picked))
    meter.seconds += time.perf_counter() - start_time
    return written


def scores(
    model: Any,
    tokenizer: Any,
    task: Any,
    problems: Sequence[dict],
    experts: Sequence,
    batch: int = 256,
    done: Callable | None = None,
) -> list[Score]:
    """The score of each expert on the same problems of a task; all experts run in the same batches."""
    rights, _ = verdicts(
        model, tokenizer, task, problems, [[expert] * len(problems) for expert in experts], batch, done
    )
    return [Score(sum(right), len(right)) for right in rights]


def verdicts(
    model: Any,
    tokenizer: Any,
    task: Any,
    problems: Sequence[dict],
    arms: Sequence[Sequence],
    batch: int = 256,
    done: Callable | None = None,
) -> tuple[list[list[bool]], Meter]:
    """Whether each arm answers each problem rightly, and what it took. An arm is an expert for each problem; all run in the same batches."""
    work = [(problem, arm[i]) for i, problem in enumerate(problems) for arm in arms]
    prompts = [problem["prompt"] for problem, _ in work]
    meter, stop = Meter(), () if task.chat else task.stop
    written = answers(
        model, tokenizer, prompts, [e for _, e in work], task.max_new_tokens, batch, done=done, stop=stop, meter=meter
    )
    columns = {key: [problem.get(key) for problem, _ in work] for key in problems[0] if key != "prompt"}
    rewards = task.reward(prompts, written, **columns)
    return [[reward > 0 for reward in rewards[k :: len(arms)]] for k in range(len(arms))], meter
