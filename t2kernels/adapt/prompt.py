"""`Prompt` and `Classifier`: the model says in one forward what a prompt is about (arXiv 2501.06252, section 3.2).

    label(x) = argmax_c s_c(x),    s_c(x) = log p(c | question(x)) - prior_c
    prior_c  = the mean of log p(c | question(x)) over neutral prompts, or over prompts that are like those to come

The prior takes off what a label has by itself (calibration: arXiv 2102.09690); without one it is 0. norm="length"
divides s_c by the tokens of c.

The expert of that label answers if it leads by `margin` nats over every label of another expert, else the base model.
The base model is asked ("prompt engineering"), or an expert that was trained to be ("classification expert").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.names import CLASSIFIER, Name
from t2kernels.rollout.chat import AnyPrompt, PromptForm
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.labels import NORMS, encode_labels, label_log_likelihoods, split_labels
from t2kernels.rollout.patched import bank_of
from t2kernels.rollout.rewards import Scorer
from t2kernels.tasks.base import SPLITS

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
    neutral: prompts of no category, such as [""]; their mean is the prior. Empty: none, as for a trained expert.
        `calibrate` takes prompts like those to come instead.
    norm: "sum", or "length": a score is divided by the tokens of its label

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
        neutral: Sequence[AnyPrompt] = (),
        norm: str = "sum",
    ) -> None:
        super().__init__(model, tokenizer, max_new_tokens=8 if method == "likelihood" else 16)
        if method not in METHODS:
            raise InputError(f"method={method!r}; wanted {' or '.join(map(repr, METHODS))}")
        if norm not in NORMS:
            raise InputError(f"norm={norm!r}; wanted {' or '.join(map(repr, NORMS))}")
        self.check_in_bank(list(question.labels.values()), "the question's labels name")
        self.check_in_bank([asked], "the question shall be answered by")
        self.question: Question = question
        self.margin: float = margin
        self.method: str = method
        self.asked: str | None = asked
        self.readers: Sequence[str | None] = [asked]
        self.experts: list[str | None] = list(question.labels.values())
        self._labels = encode_labels(self.sampler.tokenizer, list(question.labels))
        self.norm: str = norm
        self.neutral: Sequence[AnyPrompt] = neutral
        self._prior: Tensor | None = None

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The expert of the best label of each prompt, or None."""
        if self.method == "generate":
            return [None if label is None else self.question.labels[label] for label in self._written(prompts)]
        return [name if lead >= self.margin else None for name, lead in self._leads(prompts)]

    def log_likelihoods(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """log p(label | question), without the tokens that all labels start with. Returns [B, labels] on the CPU."""
        ids, mask = self.sampler.encode([self.question.ask(p) for p in prompts], self.bank.device)
        return label_log_likelihoods(self.model, ids, mask, self._labels, self.bank.ids(self.asked)).cpu()

    def calibrate(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """Set the prior of each label to its mean log-likelihood over prompts, whose categories need not be known.

        prompts: some that are like those to come, the categories about equally often. They say more than
            neutral ones.
        Returns the prior, [labels]. Raises ValueError without prompts.
        """
        if not len(prompts):
            raise InputError("there are no prompts to calibrate on")
        parts = [prompts[i : i + self.batch] for i in range(0, len(prompts), self.batch)]
        self._prior = torch.cat([self.log_likelihoods(part) for part in parts]).mean(0)
        return self._prior

    def scores(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """s_c of each prompt, [B, labels] on the CPU, in nats. The prior of neutral prompts costs one forward, once."""
        found = self.log_likelihoods(prompts)
        if self._prior is None and len(self.neutral):
            self.calibrate(self.neutral)
        if self._prior is not None:
            found = found - self._prior
        if self.norm == "length":
            _, rest = split_labels(self._labels)
            found = found / torch.tensor([len(tokens) for tokens in rest], dtype=found.dtype, device="cpu")
        return found

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
        for row in self.scores(prompts).tolist():
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
    other: bool = True,
    calibrate: str | Path | None = None,
    tiny: bool = False,
    form: PromptForm | None = None,
) -> Prompt:
    """The `Prompt` that asks which of `experts` fits. Arguments as of `make_strategy`.

    other: as of `Question.for_experts`; calibrate: a file of problems, whose prompts are for `Prompt.calibrate`
    """
    chat = None if form is None else form.chat
    made = Prompt(model, tokenizer, Question.for_experts(experts, tokenizer, tiny, other, chat), margin)
    if calibrate is not None:
        made.calibrate(prompts_of(calibrate, form))
    return made


def prompts_of(path: str | Path, form: PromptForm | None = None) -> list[AnyPrompt]:
    """The prompts of all problems in a file, in a form. Raises ValueError or FileNotFoundError as `tasks.load`."""
    from t2kernels import tasks

    task = tasks.load(str(path))
    task = task if form is None else form.of_task(task)
    return [row["prompt"] for split in SPLITS if task.rows(split, 1, 0) for row in task.split(split)]


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
