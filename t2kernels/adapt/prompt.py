"""`Prompt` and `Classifier`: the model says in one forward what a prompt is about (arXiv 2501.06252, section 3.2).

    label(x) = argmax_c log p(c | question(x))

The expert of that label answers if it leads by `margin` nats over every label of another expert, else the base model.
The base model is asked ("prompt engineering"), or an expert that was trained to be ("classification expert").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.names import CLASSIFIER, Name
from t2kernels.rollout.chat import AnyPrompt
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.labels import encode_labels, label_log_likelihoods
from t2kernels.rollout.patched import bank_of
from t2kernels.rollout.rewards import Scorer

from .question import Question
from .strategy import Strategy

METHODS: tuple[str, ...] = ("likelihood", "generate")


class Prompt(Strategy):
    """Asks the base model, or an expert of its own (`Classifier`), for the category of each prompt.

    question: `Question.about(["math", "code"])`, or one of your own
    margin: nats by which the best label must lead; below it the base model answers. `fit_margin` sets it from data.
    method: "likelihood", the log-likelihood of every label, without decoding; "generate", as in the release: the model
        writes, and the text is parsed. A text with no label or several keeps the base model, and there is no margin.
    asked: the expert that answers the question; None: the base model

    Raises ValueError before any forward: an unknown method, a label whose expert is not in the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        question: Question,
        margin: float = 0.0,
        method: str = "likelihood",
        asked: str | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_new_tokens=8 if method == "likelihood" else 16)
        if method not in METHODS:
            raise InputError(f"method={method!r}; wanted {' or '.join(map(repr, METHODS))}")
        self.check_in_bank(list(question.labels.values()), "the question's labels name")
        self.check_in_bank([asked], "the question shall be answered by")
        self.question: Question = question
        self.margin: float = margin
        self.method: str = method
        self.asked: str | None = asked
        self.readers: Sequence[str | None] = [asked]
        self.experts: list[str | None] = list(question.labels.values())
        self._labels = encode_labels(self.sampler.tokenizer, list(question.labels))

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The expert of the best label of each prompt, or None."""
        if self.method == "generate":
            return [None if label is None else self.question.labels[label] for label in self._written(prompts)]
        return [name if lead >= self.margin else None for name, lead in self._leads(prompts)]

    def log_likelihoods(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """log p(label | question), without the tokens that all labels start with. Returns [B, labels] on the CPU."""
        ids, mask = self.sampler.encode([self.question.ask(p) for p in prompts], self.bank.device)
        return label_log_likelihoods(self.model, ids, mask, self._labels, self.bank.ids(self.asked)).cpu()

    def fit_margin(
        self, rows: Sequence[Mapping[str, Any]], reward: Any, max_new_tokens: int | None = None
    ) -> MarginFit:
        """Set the margin that gains most on validation data, the larger of equals; infinity if none gains anything.

        rows: dicts with a prompt and the columns of the reward
        reward: a task, or reward(prompts, completions, **columns)
        max_new_tokens: of an answer; None: the task's, else 64
        Each prompt is answered by the base model and by the expert of its best label, in one batch.
        """
        if self.method != "likelihood":
            raise InputError("method='generate' has no margin: its answers are text, not likelihoods")
        if not len(rows):
            raise InputError("there is no validation data to fit a margin on")
        scorer = Scorer.of(reward)
        sampler = Sampler(
            self.model, self.sampler.tokenizer, max_new_tokens or getattr(reward, "max_new_tokens", None) or 64
        )
        prompts = [row["prompt"] for row in rows]
        leads: list[tuple[str | None, float]] = []
        both: list[Tensor] = []
        for i in range(0, len(prompts), self.batch):
            part = prompts[i : i + self.batch]
            found = self._leads(part)
            leads += found
            ids, mask = sampler.encode(part * 2, self.bank.device)
            routed = self.bank.ids([None] * len(part) + [name for name, _ in found])
            written = sampler.decode(sampler.draw(self.model, ids, mask, 0.0, expert_ids=routed), part * 2)
            both.append(scorer(list(rows[i : i + self.batch]) * 2, written).reshape(2, -1))
        base, routed = torch.cat(both, 1)
        order = sorted(range(len(rows)), key=lambda i: -leads[i][1])
        gains = (routed - base)[order].cumsum(0)  # of routing the first i + 1, in order of their lead
        ends = [i for i in range(len(order)) if i + 1 == len(order) or leads[order[i + 1]][1] < leads[order[i]][1]]
        best = max(ends, key=lambda i: (gains[i].item(), -i))
        if gains[best] <= 0:
            self.margin, share, gain = float("inf"), 0.0, 0.0
        else:
            self.margin = 0.0 if best + 1 == len(order) else leads[order[best]][1]
            share, gain = (best + 1) / len(order), gains[best].item() / len(order)
        return MarginFit(self.margin, share, base.mean().item(), base.mean().item() + gain, routed.mean().item())

    def _leads(self, prompts: Sequence[AnyPrompt]) -> list[tuple[str | None, float]]:
        """For each prompt (the expert of its best label, its lead in nats over the best label of another expert)."""
        out = []
        for row in self.log_likelihoods(prompts).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            others = [v for v, name in zip(row, self.experts, strict=True) if name != self.experts[best]]
            out.append((self.experts[best], row[best] - max(others, default=float("-inf"))))
        return out

    def _written(self, prompts: Sequence[AnyPrompt]) -> list[str | None]:
        """The label that the model writes for each prompt, or None."""
        asked = [self.question.ask(p) for p in prompts]
        ids, mask = self.sampler.encode(asked, self.bank.device)
        drawn = self.sampler.draw(self.model, ids, mask, 0.0, expert_ids=self.bank.ids(self.asked))
        return [self.question.parse(text) for text in self.sampler.decode(drawn, asked)]


class Classifier(Prompt):
    """`Prompt`, with an expert of the bank answering the question.

    question: None: the one in the expert's manifest, where `t2 train --task classify --classes ...` writes it
    classifier: the expert's name
    settings: as of `Prompt`
    Raises ValueError: no such expert, no question, a label whose expert is not in the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        question: Question | None = None,
        classifier: str = CLASSIFIER,
        **settings: Any,
    ) -> None:
        if question is None:
            bank = bank_of(model)
            if classifier not in bank:
                raise InputError(
                    f"no expert {classifier!r} in the bank to take the question from; add it, or pass question="
                )
            recorded = bank[classifier].manifest.get("question")
            if recorded is None:
                raise InputError(
                    f"the manifest of expert {classifier!r} holds no question: pass the question of its training"
                )
            question = Question(**recorded)
        super().__init__(model, tokenizer, question, asked=classifier, **settings)


@dataclass(frozen=True)
class MarginFit:
    """margin: nats; share: of the prompts that are routed with it

    base, routed, always: mean reward without routing, with the margin, and with margin 0
    """

    margin: float
    share: float
    base: float
    routed: float
    always: float


def make_prompt(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    margin: float = 0.0,
    tiny: bool = False,
) -> Prompt:
    """The `Prompt` that asks which of `experts` fits. Arguments as of `make_strategy`."""
    return Prompt(model, tokenizer, Question.for_experts(experts, tokenizer, tiny), margin)


def make_classifier(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    classifier: str | None,
    margin: float = 0.0,
    tiny: bool = False,
) -> Classifier:
    """The `Classifier` that asks the recorded question of `classifier`, or else which of `experts` fits.

    experts: as of `make_strategy`. If it is a mapping, labels of experts that it lacks keep the base model.
    Raises ValueError for classifier=None, the base model.
    """
    if classifier is None:
        raise InputError("the base model is no classifier; strategy 'prompt' asks it")
    bank = bank_of(model)
    recorded = bank[classifier].manifest.get("question") if classifier in bank else None
    if recorded is None:
        question = Question.for_experts(experts, tokenizer, tiny)
    else:
        question = Question(**recorded)
        if isinstance(experts, Mapping):
            labels = {label: experts.get(name) for label, name in question.labels.items() if name is not None}
            question = replace(question, labels={**question.labels, **labels})
    return Classifier(model, tokenizer, question, classifier, margin=margin)
