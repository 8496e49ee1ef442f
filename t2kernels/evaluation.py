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
from t2kernels.tasks.judging import CHOICE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from t2kernels.factors.store import Factor
    from t2kernels.tasks import Task

__all__ = ["Arm", "Chooser", "Measured", "Meter", "Score", "answers", "choices", "measure", "rebuild", "scores"]

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
    """right: how many answers are right; of: how many there are; formed: how many have the form of an answer, such as
    one label or a number; None where nothing is written, or any text has the form"""

    right: int
    of: int
    formed: int | None = None

    @property
    def accuracy(self) -> float:
        """p = right / n"""
        return self.right / self.of

    @property
    def well_formed(self) -> float | None:
        """The share of answers that have the form of one, right or wrong."""
        return None if self.formed is None else self.formed / self.of

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


def choices(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[AnyPrompt],
    options: Sequence[Sequence[str]],
    experts: Sequence[Name] | None,
    norm: str = "sum",
    batch: int = 256,
    done: Callable[[int], object] | None = None,
    meter: Meter | None = None,
) -> list[str]:
    """The likeliest option of each prompt, each with its own expert. Nothing is written.

    argmax_o log p(o | prompt), divided by the characters of o for norm="length", as lm-eval's acc_norm.

    options: for each prompt the texts to choose from; norm: "sum" or "length"
    Other arguments as of `answers`. The meter counts no tokens, only seconds.
    """
    from t2kernels.rollout.labels import likeliest, option_log_likelihoods
    from t2kernels.rollout.patched import bank_of

    bank = None if experts is None else bank_of(model)
    chosen: list[str] = []
    start_time = time.perf_counter()
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        rows = None if bank is None or experts is None else bank.ids(experts[part])
        for some, sums in zip(
            options[part],
            option_log_likelihoods(model, tokenizer, prompts[part], options[part], rows),
            strict=True,
        ):
            chosen.append(likeliest(sums, some, norm))
        if done:
            done(len(prompts[part]))
    if meter is not None:
        meter.seconds += time.perf_counter() - start_time
    return chosen


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
    A task with check "choice" is answered by `choices`. With None alone the model need not be patched.
    """
    rights, formed, _ = _verdicts(
        model, tokenizer, task, problems, [[expert] * len(problems) for expert in experts], batch, done
    )
    return [_score(right, form) for right, form in zip(rights, formed, strict=True)]


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
    With None as the only arm the model need not be patched.
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
    rights, formed, meter = _verdicts(model, tokenizer, task, problems, list(made.values()), batch, done)
    categories = [str(problem.get("category", task.name)) for problem in problems]
    found = {}
    for (label, names), right, form in zip(made.items(), rights, formed, strict=True):
        at = {c: [i for i, other in enumerate(categories) if other == c] for c in sorted(set(categories))}
        parts = {
            c: _score([right[i] for i in rows], None if form is None else [form[i] for i in rows])
            for c, rows in at.items()
        }
        routes = None
        if label in seconds:
            routes = {c: dict(Counter(_label(names[i]) for i in rows)) for c, rows in at.items()}
        found[label] = Arm(_score(right, form), parts if len(parts) > 1 else {}, routes, seconds.get(label, 0.0))
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
) -> tuple[list[list[bool]], list[list[bool] | None], Meter]:
    """([arm][problem] True for a right answer; the same for a well-formed one, None where any is; the cost of all
    answers). An arm is an expert for each problem."""
    from t2kernels.rollout.rewards import columns_of

    work = [(problem, arm[i]) for i, problem in enumerate(problems) for arm in arms]
    prompts = [problem["prompt"] for problem, _ in work]
    plain = not hasattr(model, "t2_bank") and all(expert is None for _, expert in work)
    experts = None if plain else [expert for _, expert in work]
    meter, rows = Meter(), [dict(problem) for problem, _ in work]
    if getattr(task, "check", None) == CHOICE:
        options = [task.options(row) for row in rows]
        written = choices(model, tokenizer, prompts, options, experts, task.norm, batch, done, meter)
        formed = None
    else:
        stop = () if task.chat else task.stop
        written = answers(
            model, tokenizer, prompts, experts, task.max_new_tokens, batch, done=done, stop=stop, meter=meter
        )
        formed = task.formed(written, rows) if hasattr(task, "formed") else None
    rewards = task.reward(prompts, written, **columns_of(rows))
    arms_of = range(len(arms))
    return (
        [[reward > 0 for reward in rewards[k :: len(arms)]] for k in arms_of],
        [None if formed is None else formed[k :: len(arms)] for k in arms_of],
        meter,
    )


def _score(right: Sequence[bool], formed: Sequence[bool] | None) -> Score:
    return Score(sum(right), len(right), None if formed is None else sum(formed))


def _label(name: Name) -> str:
    if isinstance(name, Mapping):
        return " + ".join(f"{weight:.2g} {expert}" for expert, weight in name.items())
    return name or BASE
