"""`ZeroShot`, `Router` and `Nearest`: choices that are not in the paper.

    "likelihood"   argmax_e log p(x | e)            the expert that predicts the prompt best
    "confidence"   argmax_e max_v log p(v | x, e)   the expert that is surest of the first token of its answer
    `Router`       z = 1 + Σ_c p(c | x) (z_c - 1)   a mixture by the probabilities of a classifier
    `Nearest`      argmax_e cos(n(h(x)), mean of n(h) over example prompts of e),    n(h) = (h - mean) / std
                   h: the base model's last hidden state at the last token of a prompt; mean, std: over all examples

The first two take one forward with a row for each expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.names import BASE, Name
from t2kernels.rollout.chat import AnyPrompt, PromptForm
from t2kernels.rollout.generation import Rollout, completion_logits, forward_inputs, log_probs
from t2kernels.rollout.modes import eval_mode
from t2kernels.tasks.records import json_lines

from .prompt import Prompt, make_classifier
from .strategy import Strategy, bank_names


class ZeroShot(Strategy):
    """Chooses by how well the experts themselves predict a prompt or its answer.

    experts: names to choose from; the base model is always one more
    by: "likelihood" or "confidence"
    Raises ValueError: no experts, one that is not in the bank, an unknown `by`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, experts: Sequence[str], by: str = "likelihood") -> None:
        super().__init__(model, tokenizer, max_new_tokens=1)
        if by not in ("likelihood", "confidence"):
            raise InputError(f"by={by!r}; wanted 'likelihood' or 'confidence'")
        if isinstance(experts, str) or not len(experts):
            raise InputError(f"experts={experts!r}; wanted a list of names in the bank, at least one")
        self.check_in_bank(experts, "to choose from are")
        self.experts: list[str | None] = [None, *experts]
        self.by: str = by
        self.readers: Sequence[str | None] = self.experts

    @torch.no_grad()
    def scores(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """log p(prompt | expert), or the log-probability of its most likely next token, in nats.

        Returns [B, 1 + E] fp32 on the CPU, the base model first.
        """
        ids, mask = self.sampler.encode(prompts, self.bank.device)
        rows = self.bank.ids(self.experts)
        E, B = len(self.experts), len(prompts)
        dummy = ids[:, :1]  # any token after the prompt: its logits are those of the answer's first token
        ids, mask = torch.cat([ids, dummy], 1).repeat(E, 1), torch.cat([mask, torch.ones_like(dummy)], 1).repeat(E, 1)
        if self.by == "confidence":
            rollout = Rollout(ids, mask, torch.ones_like(ids[:, -1:], dtype=torch.bool))
        else:
            rollout = Rollout(ids, mask, mask[:, 1:].bool() & mask[:, :-1].bool())
        with eval_mode(self.model):
            found = log_probs(completion_logits(self.model, rollout, expert_ids=rows.repeat_interleave(B)))
        if self.by == "confidence":
            return found[:, 0].amax(-1).reshape(E, B).T.cpu()
        there = rollout.completion.clone()
        there[:, -1] = False  # the dummy
        picked = found.gather(-1, rollout.tokens[..., None])[..., 0]
        return torch.where(there, picked, 0).sum(1).reshape(E, B).T.cpu()

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The expert with the best score for each prompt."""
        return [self.experts[i] for i in self.scores(prompts).argmax(1).tolist()]


class Router(Strategy):
    """A mixture of experts by the probabilities that a `Prompt` or `Classifier` gives its labels.

    judge: gives the probabilities; the share of labels without an expert goes to the base model
    step: probabilities are rounded to multiples of it, so that similar prompts share a mixture, which takes a row
    most: largest number of mixtures in a batch; prompts with a rarer one get their likeliest expert. None: a quarter of
        the bank's rows.
    """

    def __init__(self, judge: Prompt, step: float = 0.25, most: int | None = None) -> None:
        super().__init__(judge.model, judge.sampler.tokenizer)
        self.judge: Prompt = judge
        self.step: float = step
        self.most: int = max(1, self.bank.rows // 4) if most is None else most
        self.readers: Sequence[str | None] = judge.readers

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The mixture of each prompt, or its one expert."""
        likelihoods = self.judge.scores(prompts)
        chosen: list[tuple[tuple[str, float], ...]] = []
        for row in likelihoods.softmax(1).tolist():
            weights: dict[str, float] = {}
            for name, p in zip(self.judge.experts, row, strict=True):
                if name is not None:
                    weights[name] = weights.get(name, 0.0) + p
            chosen.append(
                tuple(
                    (name, round(self.step * round(p / self.step), 6))
                    for name, p in sorted(weights.items())
                    if round(p / self.step)
                )
            )
        kept = {mixture for mixture, _ in Counter(c for c in chosen if len(c) > 1).most_common(self.most)}
        out: list[Name] = []
        for mixture, best in zip(chosen, likelihoods.argmax(1).tolist(), strict=True):
            if len(mixture) > 1 and mixture not in kept:
                out.append(self.judge.experts[best])
            elif len(mixture) == 1 and mixture[0][1] == 1:
                out.append(mixture[0][0])
            else:
                out.append(dict(mixture) or None)
        return out


class Nearest(Strategy):
    """Chooses by the similarity of a prompt to example prompts, in one forward of the base model.

    examples: {expert, or None for the base model: some of its prompts}; four of each are often enough
    margin: by which the best cosine must lead; below it the base model answers

    Attributes: `experts`, and `centres` [E, H] fp32.
    Raises ValueError before any forward: fewer than two kinds of prompts, one without a prompt, an expert that is not
    in the bank.
    """

    batch: int = 32  # the states of all layers of a batch are in memory at once

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Mapping[str | None, Sequence[AnyPrompt]],
        margin: float = 0.0,
    ) -> None:
        super().__init__(model, tokenizer, max_new_tokens=1)
        if len(examples) < 2 or not all(len(prompts) for prompts in examples.values()):
            raise InputError(
                f"there are examples of {[name or BASE for name in examples]}; wanted two experts or more, each with a "
                "prompt. 'base' may be one"
            )
        self.check_in_bank(list(examples), "the examples are of")
        self.readers: Sequence[str | None] = [None]
        self.margin: float = margin
        self.experts: list[str | None] = list(examples)
        states = [self.states(prompts) for prompts in examples.values()]
        every = torch.cat(states)
        self._mean: Tensor = every.mean(0)
        self._std: Tensor = every.std(0, unbiased=False).clamp(min=1e-4)
        self.centres: Tensor = torch.stack([self._normal(part).mean(0) for part in states])

    @torch.no_grad()
    def states(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """h of each prompt, [B, H] fp32 on the CPU."""
        out = []
        for i in range(0, len(prompts), self.batch):
            ids, mask = self.sampler.encode(prompts[i : i + self.batch], self.bank.device)
            inputs = forward_inputs(self.model, ids, mask, 1)
            with self.bank.routing.hold(None), eval_mode(self.model):
                found = self.model(
                    **inputs, output_hidden_states=True, use_cache=False, expert_ids=self.bank.ids([None] * len(ids))
                )
            out.append(found.hidden_states[-1][:, -1].float().cpu())
        return torch.cat(out)

    def scores(self, prompts: Sequence[AnyPrompt]) -> Tensor:
        """score_e of each prompt, [B, E] fp32 on the CPU."""
        states = self._normal(self.states(prompts))
        return torch.cosine_similarity(states[:, None], self.centres[None], dim=-1)

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The most similar expert of each prompt, or None."""
        best, at = self.scores(prompts).topk(2, dim=1)
        leads = (best[:, 0] - best[:, 1]).tolist()
        return [
            self.experts[i] if lead >= self.margin else None for i, lead in zip(at[:, 0].tolist(), leads, strict=True)
        ]

    def _normal(self, states: Tensor) -> Tensor:
        return (states - self._mean) / self._std


def make_likelihood(
    model: nn.Module, tokenizer: Any, experts: Sequence[str] | Mapping[str, str], *, tiny: bool = False
) -> ZeroShot:
    """`ZeroShot` by "likelihood". Arguments as of `make_strategy`."""
    return ZeroShot(model, tokenizer, bank_names(experts), by="likelihood")


def make_confidence(
    model: nn.Module, tokenizer: Any, experts: Sequence[str] | Mapping[str, str], *, tiny: bool = False
) -> ZeroShot:
    """`ZeroShot` by "confidence". Arguments as of `make_strategy`."""
    return ZeroShot(model, tokenizer, bank_names(experts), by="confidence")


def make_router(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    classifier: str | None,
    tiny: bool = False,
) -> Router:
    """`Router` with a `Classifier`. Arguments as of `make_strategy`."""
    return Router(make_classifier(model, tokenizer, experts, classifier=classifier, tiny=tiny))


def make_nearest(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    examples: str | Path,
    margin: float = 0.0,
    tiny: bool = False,
    form: PromptForm | None = None,
) -> Nearest:
    """`Nearest` on a .jsonl file with `prompt` and `expert`, one of `experts` or "base". Arguments as of
    `make_strategy`.

    Raises ValueError with the file and the line of another expert.
    """
    known = {**(experts if isinstance(experts, Mapping) else {name: name for name in bank_names(experts)}), BASE: None}
    found: dict[str | None, list[AnyPrompt]] = {}
    for where, row in json_lines(Path(examples)):
        prompt, name = row.get("prompt"), row.get("expert")
        if not prompt or name not in known:
            raise InputError(f"{where}: wanted a prompt, and an expert that is one of {', '.join(known)}; got {name!r}")
        found.setdefault(known[name], []).append(prompt if form is None else form.apply(prompt))
    return Nearest(model, tokenizer, found, margin)
