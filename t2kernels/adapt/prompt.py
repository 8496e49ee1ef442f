"""`Prompt`: the model itself says what a prompt is about (arXiv 2501.06252, section 3.2, "prompt engineering"), in one forward.

label(x) = argmax_c log p(c | question(x));   expert(label) if it leads by `margin` nats over every label of another expert, else the base
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2kernels.experts.names import Name
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.prefix import forward, hoist, prefill
from t2kernels.rollout.rewards import Scorer
from t2kernels.train.data import is_task

from .question import Question
from .strategy import Strategy

METHODS = ("likelihood", "generate")


class Prompt(Strategy):
    """Asks the base model, or an expert of its own (`Classifier`), for the category of each prompt.

    question: `Question.about(["math", "code"])`, or one of your own
    margin: nats by which the best label must lead; below it the prompt keeps the base model. `fit_margin` sets it from validation data
    method: "likelihood", the log-likelihood of every label, without decoding; "generate", what the model writes is parsed, as in the release:
        an answer that holds no label, or several, keeps the base model, and there is no margin
    asked: the expert that the question is answered with; None: the base model

    Raises ValueError before any forward: an unknown method, a label whose expert is not in the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        question: Question,
        margin: float = 0.0,
        method: str = "likelihood",
        asked: str | None = None,
    ):
        super().__init__(model, tokenizer, max_new_tokens=8 if method == "likelihood" else 16)
        if method not in METHODS:
            raise ValueError(f"method={method!r}; wanted {' or '.join(map(repr, METHODS))}")
        self._in_bank(list(question.labels.values()), "the question's labels name")
        self._in_bank([asked], "the question shall be answered by")
        self.question, self.margin, self.method, self.asked = question, margin, method, asked
        self.experts = list(question.labels.values())
        self._labels = [
            self.sampler.tokenizer(label, add_special_tokens=False)["input_ids"] for label in question.labels
        ]

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        if self.method == "generate":
            return [self.question.labels.get(label) for label in self._written(prompts)]
        return [name if lead >= self.margin else None for name, lead in self._leads(prompts)]

    def log_likelihoods(self, prompts: Sequence) -> Tensor:
        """[B, labels]: log p(label | question), less what all labels have in common, on the host."""
        ids, mask = self.sampler.encode([self.question.ask(p) for p in prompts], self.bank.device)
        return label_log_likelihoods(self.model, ids, mask, self._labels, self._row()).cpu()

    def fit_margin(self, rows: Sequence[Mapping], reward, max_new_tokens: int | None = None) -> MarginFit:
        """Set the margin to what gains most on validation data, the larger of equals; infinity, never to route, if no margin gains anything.

        rows: dicts with a prompt and the columns of the reward; reward: a task, or reward(prompts, completions, **columns)
        Each prompt is answered by the base model and by the expert it would be sent to, in one batch.
        """
        if self.method != "likelihood":
            raise ValueError("method='generate' has no margin: its answers are text, not likelihoods")
        if not len(rows):
            raise ValueError("there is no validation data to fit a margin on")
        max_new_tokens = max_new_tokens or getattr(reward, "max_new_tokens", None) or 64
        scorer = Scorer.of(reward.reward if is_task(reward) else reward)
        sampler = Sampler(self.model, self.sampler.tokenizer, max_new_tokens)
        prompts = [row["prompt"] for row in rows]
        leads = [x for i in range(0, len(prompts), self.batch) for x in self._leads(prompts[i : i + self.batch])]
        both: list[Tensor] = []
        for i in range(0, len(prompts), self.batch):
            part = list(range(i, min(i + self.batch, len(prompts))))
            ids, mask = sampler.encode([prompts[j] for j in part] * 2, self.bank.device)
            routed = self.bank.ids([None] * len(part) + [leads[j][0] for j in part])
            written = sampler.decode(
                sampler.draw(self.model, ids, mask, 0.0, expert_ids=routed), [prompts[j] for j in part] * 2
            )
            both.append(scorer([rows[j] for j in part] * 2, written).reshape(2, -1))
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

    def _leads(self, prompts: Sequence) -> list[tuple[str | None, float]]:
        """For each prompt the expert of its best label, and by how many nats that leads over the best label of another expert."""
        out = []
        for row in self.log_likelihoods(prompts).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            others = [v for v, name in zip(row, self.experts, strict=True) if name != self.experts[best]]
            out.append((self.experts[best], row[best] - max(others, default=float("-inf"))))
        return out

    def _written(self, prompts: Sequence) -> list[str | None]:
        asked = [self.question.ask(p) for p in prompts]
        ids, mask = self.sampler.encode(asked, self.bank.device)
        row = self._row()
        drawn = self.sampler.draw(self.model, ids, mask, 0.0, **({} if row is None else {"expert_ids": row}))
        return [self.question.parse(text) for text in self.sampler.decode(drawn, asked)]

    def _row(self) -> Tensor:
        return self.bank.ids(self.asked)


@dataclass(frozen=True)
class MarginFit:
    """margin: nats; share: of the prompts that are routed with it; base, routed, always: mean reward without routing, with it, and at margin 0"""

    margin: float
    share: float
    base: float
    routed: float
    always: float


@torch.no_grad()
def label_log_likelihoods(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Sequence[Sequence[int]], row: Tensor
) -> Tensor:
    """[B, L] fp32: log p(label | prompt), less the log-likelihood of the tokens that all labels begin with, which decides nothing.

    ids, mask: [B, S], left-padded; labels: token ids of each; row: the expert's, 0-dim int32
    One forward over the prompts, whose common beginning is computed once; a second, short one over the same cache if labels differ beyond
    one token.
    """
    common = 0
    while all(len(label) > common + 1 for label in labels) and len({label[common] for label in labels}) == 1:
        common += 1
    shared = torch.tensor(labels[0][:common], dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    rest = [list(label[common:]) for label in labels]
    prefix, ids, mask = hoist(torch.cat([ids, shared], 1), torch.cat([mask, mask.new_ones(shared.shape)], 1))
    with model.t2_bank.routing.hold(None):
        cache = prefill(model, prefix, row[None], len(ids))
        logits, cache = forward(model, ids, mask, cache, keep=1, expert_ids=row)
        first = torch.log_softmax(logits[:, -1].float(), -1)
        out = first[:, [label[0] for label in rest]]
        longest = max(map(len, rest))
        if longest == 1:
            return out
        tokens = torch.zeros(len(rest), longest, dtype=ids.dtype)
        for i, label in enumerate(rest):
            tokens[i, : len(label)] = torch.tensor(label)
        there = torch.arange(longest) < torch.tensor([[len(label)] for label in rest])
        tokens, there = tokens.to(ids.device).repeat(len(ids), 1), there.to(ids.device).repeat(len(ids), 1)
        cache.batch_repeat_interleave(len(rest))
        mask = torch.cat([mask.repeat_interleave(len(rest), 0), there[:, :-1].to(mask)], 1)
        longer = torch.cat([ids.repeat_interleave(len(rest), 0), tokens[:, :-1]], 1)
        logits, _ = forward(model, longer, mask, cache, expert_ids=row)
        more = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
        return out + torch.where(there[:, 1:], more, 0).sum(1).reshape(len(ids), -1)
