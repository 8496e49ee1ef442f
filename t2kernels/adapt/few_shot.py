"""`FewShot`: one new expert for all prompts of a task, found on a few (arXiv 2501.06252, section 3.2, "few-shot")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from t2kernels import InputError
from t2kernels.experts.expert import Expert
from t2kernels.experts.names import Name
from t2kernels.rollout.chat import AnyPrompt, PromptForm, prompt_form
from t2kernels.tasks.base import SPLITS

from .cem import CEMConfig, Found, search
from .examples import Examples, Scores
from .strategy import Strategy, bank_names

CAUTION_OF_OPTIONS: float = 1.5
"""Chosen on SmolLM2 and training rows of four tasks, 120 draws of 16 examples each, the scores of candidates read off a
quadratic fit to 13 or 17 measured mixtures: it gives away 1 point where the base model is best and wins 7 and 9 where
it is not. 1 gives away 2, a tenth of the draws 7 or more, and wins 10 and 12; 2 wins 4 and 6."""


class FewShot(Strategy):
    """Searches once, when it is made, puts the expert that it found into the bank, and sends every prompt there.

    examples: labelled prompts; experts: to mix, names in the bank or {name: Expert}
    config, progress: of the search
    name: of the new expert; replace: True if it may replace an expert of that name
    caution: the base model answers unless the mean gain on the examples is above so many of its standard errors; None:
        the new expert always answers. A search over many candidates always finds one that is a little better on few
        examples. "auto": 1.5 for examples with options, whose gain is in the probability of the right option, 2 for
        rewards of written answers.

    Attributes: `found`, the result of the search; `name`, the new expert, or None for the base model; `gain` and
    `error`, as of `gain`.
    Raises as `search`, before any forward, and ValueError for a name that is taken.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Examples,
        experts: Sequence[str] | Mapping[str, Expert],
        config: CEMConfig | None = None,
        name: str = "few-shot",
        replace: bool = False,
        caution: float | Literal["auto"] | None = "auto",
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        super().__init__(model, tokenizer)
        if examples.bank is not self.bank:
            raise InputError("the examples were made for another model")
        if name in self.bank and not replace:
            raise InputError(f"the bank has an expert named {name!r}: choose another name, or pass replace=True")
        self.found: Found = search(examples, experts, name, config, progress=progress)
        self.bank.add(name, self.found.expert, replace=replace)
        options = examples.chooser is not None
        scores = examples.score(self.bank.ids([None, name]), likelihood=examples.scorer is None)
        self.gain: float
        self.error: float
        self.gain, self.error = gain(scores, expected=options)
        if caution == "auto":
            caution = CAUTION_OF_OPTIONS if options else 2.0
        self.name: str | None = name if is_better(self.gain, self.error, caution) else None

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The new expert, or the base model, for every prompt."""
        return [self.name] * len(prompts)


def gain(scores: Scores, expected: bool = False) -> tuple[float, float]:
    """The gain of the second of two experts over the first.

    expected: True to compare the probabilities of the right options (`Scores.expected`), not the rewards
    Returns (difference of the mean reward or probability, its standard error over examples), or (difference of the
    likelihood in nats, 0) without a reward.
    """
    values = scores.expected if expected else scores.rewards
    if values is None:
        return (scores.likelihood[1] - scores.likelihood[0]).item(), 0.0
    difference = values[1] - values[0]
    return difference.mean().item(), (difference.std(unbiased=False) / len(difference) ** 0.5).item()


def is_better(gain: float, error: float, caution: float | None) -> bool:
    """True if a gain is above `caution` of its standard errors, and for caution=None."""
    return caution is None or gain > caution * error


def make_few_shot(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    examples: str | Path,
    tiny: bool = False,
    form: PromptForm | None = None,
) -> FewShot:
    """`FewShot` on the examples of a file, .jsonl with prompt and answer. Other arguments as of `make_strategy`.

    The examples are asked in `form`. Those of a task with check "choice" are answered by the likeliest label.
    """
    from t2kernels import tasks

    task = tasks.load(str(examples))
    if tiny:  # the built-in model's answers end in "=ANSWER", with or without working before it
        task = tasks.Task(task.name, task.rows, tasks.tiny.final, 32)
    else:
        task = (form or prompt_form(tokenizer, task=task)).of_task(task)
    rows = [row for split in SPLITS if task.rows(split, 1, 0) for row in task.split(split)]
    found = Examples(
        model, tokenizer, rows, task, gold=lambda row: ("=" if tiny else "") + (row.get("target") or row["answer"])
    )
    return FewShot(model, tokenizer, found, bank_names(experts))
