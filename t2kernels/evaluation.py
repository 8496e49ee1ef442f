"""Accuracy of experts on tasks, all experts in the same mixed batches.

    from t2kernels import evaluation, tasks

    task = tasks.load("math")
    problems = task.split("test", 200)
    base, math = evaluation.scores(model, tokenizer, task, problems, [None, "math"])
    print(base, math, math.interval)

`scores` is the accuracy of a few experts, `measure` also that of ways to choose an expert, by category, with the time
that they took. `answers` gives the texts. The model is patched; importing this module does not import torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Protocol

from t2kernels import InputError
from t2kernels.experts.names import BASE, Name
from t2kernels.rollout.chat import AnyPrompt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from t2kernels.factors.store import Factor
    from t2kernels.tasks import Task

__all__ = ["Arm", "Chooser", "Measured", "Meter", "Score", "answers", "measure", "rebuild", "scores"]

Problem = Mapping[str, Any]
"""A row of a task: a prompt, its answer, and further columns."""
Choose = Callable[[Sequence[AnyPrompt]], Sequence[Name]]
"""Prompts -> the expert that each is to be answered with."""


class Chooser(Protocol):
    """An object that chooses the expert of each prompt, such as a strategy of `t2kernels.adapt`."""

    def choose(self, prompts: Sequence[AnyPrompt]) -> Sequence[Name]:
        """The expert of each prompt."""
        ...


@dataclass(frozen=True)
class Score:
    """right: how many answers are right; of: how many there are"""

    right: int
    of: int

    @property
    def accuracy(self) -> float:
        """p = right / n"""
        return self.right / self.of

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)"""
        return sqrt(self.accuracy * (1 - self.accuracy) / self.of)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval. It stays inside [0, 1], and has a width even if every answer is right."""
        z, n, p = 1.96, self.of, self.accuracy
        scale = 1 + z * z / n
        centre = (p + z * z / (2 * n)) / scale
        half = z / scale * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%}"


@dataclass
class Meter:
    """tokens: how many were written, end tokens included; seconds: how long that took"""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Arm:
    """The result of one expert, or of one way to choose an expert.

    score: over all problems
    parts: {category: score} if the problems have more than one category, else empty
    routes: {category: {expert: how often it was chosen}}; None for a fixed expert
    seconds: time of choosing, which is the first pass
    """

    score: Score
    parts: dict[str, Score]
    routes: dict[str, dict[str, int]] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """arms: {label: its result}; meter: tokens and time of all answers, which are the second pass"""

    arms: dict[str, Arm]
    meter: Meter


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[AnyPrompt],
    experts: Sequence[Name] | None,
    max_new_tokens: int,
    batch: int = 256,
    temperature: float = 0.0,
    done: Callable[[int], object] | None = None,
    stop: Sequence[str] = (),
    meter: Meter | None = None,
) -> list[str]:
    """The text that the model writes after each prompt, each with its own expert.

    model: patched, or any causal language model of transformers with experts=None; tokenizer: the model's
    prompts: texts, or chats, which go through the tokenizer's template
    experts: a name, a mixture {name: weight} or None (the base model) for each prompt; None: the model as it is
    max_new_tokens: of an answer; batch: prompts of one batch
    temperature: 0 is greedy; the model's own generation settings apply
    done: called with the number of prompts answered since the last call
    stop: texts that end an answer; they stay in it
    meter: its counts are added to

    Raises ValueError if the model is not patched, KeyError for an expert that is not in its bank.
    """
    from t2kernels.rollout.generation import Sampler
    from t2kernels.rollout.patched import bank_of

    bank = None if experts is None else bank_of(model)
    written, meter = [""] * len(prompts), meter or Meter()
    sampler = Sampler(model, tokenizer, max_new_tokens)
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i])))
    start_time = time.perf_counter()
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        ids, mask = sampler.encode([prompts[i] for i in picked], model.device)
        route = {} if bank is None else {"expert_ids": bank.ids([experts[i] for i in picked])}
        drawn = sampler.draw(model, ids, mask, temperature, stop=stop, own_settings=True, **route)
        meter.tokens += int(drawn.completion.sum())
        for i, text in zip(picked, sampler.decode(drawn, [""] * len(picked)), strict=True):
            written[i] = text
        if done:
            done(len(picked))
    meter.seconds += time.perf_counter() - start_time
    return written


def scores(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Problem],
    experts: Sequence[Name],
    batch: int = 256,
    done: Callable[[int], object] | None = None,
) -> list[Score]:
    """The score of each expert on the same problems of a task, such as `task.split("test", 200)`.

    experts: names in the bank, mixtures {name: weight}, or None, the base model. Other arguments as of `answers`.
    """
    rights, _ = _verdicts(
        model, tokenizer, task, problems, [[expert] * len(problems) for expert in experts], batch, done
    )
    return [_score(right) for right in rights]


def measure(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Problem],
    arms: Mapping[str, Name | Sequence[Name] | Chooser | Choose],
    batch: int = 256,
    done: Callable[[int], object] | None = None,
) -> Measured:
    """Answer every problem in every arm, and count right answers.

    arms: {label: arm}. An arm is an expert for all problems (a name, a mixture {name: weight}, None for the base
        model), a list with an expert for each problem, or a way to choose: a strategy, or a function from prompts to
        experts.
    A column "category" of the problems gives the score of each category as well. Other arguments as of `answers`.

    Raises ValueError for an arm with another number of experts than problems, KeyError for an expert not in the bank.
    """
    made: dict[str, list[Name]] = {}
    seconds: dict[str, float] = {}
    for label, arm in arms.items():
        choose = getattr(arm, "choose", arm)
        if callable(choose):
            start = time.perf_counter()
            made[label] = list(choose([problem["prompt"] for problem in problems]))
            seconds[label] = time.perf_counter() - start
        elif isinstance(arm, (str, Mapping)) or arm is None:
            made[label] = [arm] * len(problems)
        else:
            made[label], seconds[label] = list(arm), 0.0
    for label, names in made.items():
        if len(names) != len(problems):
            raise InputError(f"{label} chose {len(names)} experts for {len(problems)} prompts; wanted one for each")
    rights, meter = _verdicts(model, tokenizer, task, problems, list(made.values()), batch, done)
    categories = [str(problem.get("category", task.name)) for problem in problems]
    found = {}
    for (label, names), right in zip(made.items(), rights, strict=True):
        at = {c: [i for i, other in enumerate(categories) if other == c] for c in sorted(set(categories))}
        parts = {c: _score([right[i] for i in rows]) for c, rows in at.items()}
        routes = None
        if label in seconds:
            routes = {c: dict(Counter(_label(names[i]) for i in rows)) for c, rows in at.items()}
        found[label] = Arm(_score(right), parts if len(parts) > 1 else {}, routes, seconds.get(label, 0.0))
    return Measured(found, meter)


def rebuild(model: nn.Module, factors: Mapping[str, Factor], z: Mapping[str, Tensor]) -> None:
    """Write W' = U diag(sigma z) Vᵀ into every weight of a dense model, as the authors' release does.

    It is the baseline for a table of experts, and a way to check one.
    factors: {matrix: Factor}, of the model; z: {matrix: [R]}; matrices without z get z = 1
    """
    import torch

    with torch.no_grad():
        for name, factor in factors.items():
            model.get_submodule(name).weight.copy_(factor.dense(z.get(name)))


def _verdicts(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Problem],
    arms: Sequence[Sequence[Name]],
    batch: int,
    done: Callable[[int], object] | None,
) -> tuple[list[list[bool]], Meter]:
    """([arm][problem] True for a right answer; the cost of all answers). An arm is an expert for each problem."""
    work = [(problem, arm[i]) for i, problem in enumerate(problems) for arm in arms]
    prompts = [problem["prompt"] for problem, _ in work]
    meter, stop = Meter(), () if task.chat else task.stop
    written = answers(
        model, tokenizer, prompts, [e for _, e in work], task.max_new_tokens, batch, done=done, stop=stop, meter=meter
    )
    columns = {key: [problem.get(key) for problem, _ in work] for key in problems[0] if key != "prompt"}
    rewards = task.reward(prompts, written, **columns)
    return [[reward > 0 for reward in rewards[k :: len(arms)]] for k in range(len(arms))], meter


def _score(right: Sequence[bool]) -> Score:
    return Score(sum(right), len(right))


def _label(name: Name) -> str:
    if isinstance(name, Mapping):
        return " + ".join(f"{weight:.2g} {expert}" for expert, weight in name.items())
    return name or BASE
