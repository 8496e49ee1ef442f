"""`FewShot`: one new expert for all prompts of a task, found on a few of them (arXiv 2501.06252, section 3.2, "few-shot adaptation")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from t2kernels.experts.expert import Expert
from t2kernels.experts.names import Name

from .cem import CEMConfig, Found, search
from .examples import Examples, Scores
from .strategy import Strategy


class FewShot(Strategy):
    """Searches when it is made, puts what it found into the bank, and sends every prompt there.

    examples: labelled prompts; experts: to mix, names in the bank or {name: Expert}; config, progress: of the search
    name: of the new expert; replace: whether it may replace one
    caution: keep the base model unless the mean gain on the examples is above so many of its standard errors; None: never mind the base.
        A search over many candidates always finds one that is a little better on few examples.

    After that: `found`, what the search found; `name`, the expert, or None for the base model; `gain` and `error`: the mean reward of the examples'
    answers less that of the base model's, and its standard error over examples (without a reward: of the likelihood, and 0)
    Raises as `search`, before any forward, and ValueError for a name that is taken.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        examples: Examples,
        experts: Sequence[str] | Mapping[str, Expert],
        config: CEMConfig | None = None,
        name: str = "few-shot",
        replace: bool = False,
        caution: float | None = 2.0,
        progress: Callable[[int, float], None] | None = None,
    ):
        super().__init__(model, tokenizer)
        if examples.bank is not self.bank:
            raise ValueError("the examples were made for another model")
        if name in self.bank and not replace:
            raise ValueError(f"the bank has an expert named {name!r}: choose another name, or pass replace=True")
        self.found: Found = search(examples, experts, name, config, progress=progress)
        self.bank.add(name, self.found.expert, replace=replace)
        scores = examples.score(self.bank.ids([None, name]), likelihood=examples.scorer is None)
        self.gain, self.error = gain(scores)
        self.name = name if caution is None or self.gain > caution * self.error else None

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        return [self.name] * len(prompts)


def gain(scores: Scores) -> tuple[float, float]:
    """What the second of two experts gains over the first: (difference of the mean reward, its standard error over examples); without a reward
    (difference of the likelihood, 0)."""
    if scores.rewards is None:
        return (scores.likelihood[1] - scores.likelihood[0]).item(), 0.0
    difference = scores.rewards[1] - scores.rewards[0]
    return difference.mean().item(), (difference.std(unbiased=False) / len(difference) ** 0.5).item()
