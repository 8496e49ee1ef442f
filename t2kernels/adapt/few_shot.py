"""`FewShot`: one new expert for all prompts of a task, found on a few of them (arXiv 2501.06252, section 3.2, "few-shot adaptation")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..bank import Name
from ..expert import Expert
from .cem import CEMConfig, Found, search
from .examples import Examples
from .strategy import Strategy


class FewShot(Strategy):
    """Searches when it is made, puts what it found into the bank, and sends every prompt there.

    examples: labelled prompts; experts: to mix, names in the bank or {name: Expert}; config: of the search
    name: of the new expert; replace: whether it may replace one
    cautious: keep the base model where the new expert does no better than it on the examples

    After that: `found`, what the search found; `name`, the expert, or None for the base model; `gain`, its reward on the examples less the base's
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
        cautious: bool = True,
    ):
        super().__init__(model, tokenizer)
        if examples.bank is not self.bank:
            raise ValueError("the examples were made for another model")
        if name in self.bank and not replace:
            raise ValueError(f"the bank has an expert named {name!r}: choose another name, or pass replace=True")
        self.found: Found = search(examples, experts, name, config)
        self.bank.add(name, self.found.expert, replace=replace)
        by_reward = examples.scorer is not None
        scores = examples.score(self.bank.ids([None, name]), reward=by_reward, likelihood=not by_reward)
        base, new = (scores.reward if by_reward else scores.likelihood).tolist()
        self.gain = new - base
        self.name = name if self.gain > 0 or not cautious else None

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        return [self.name] * len(prompts)
