"""`ZeroShot`: no labels and no examples; what the experts themselves, or a classifier's doubts, say about a prompt. Not in the paper.

"likelihood"   argmax_e log p(x | e)            how well each expert predicts the prompt: one forward with a row for each
"confidence"   argmax_e max_v log p(v | x, e)   how sure each is of the first token of its answer: the same forward
"router"       z = 1 + Σ_c p(c | x) (z_c - 1)   a mixture by the classifier's probabilities
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2kernels.experts.names import Name
from t2kernels.rollout.generation import Rollout, completion_logits
from t2kernels.train.loss import log_probs

from .prompt import Prompt
from .strategy import Strategy


class ZeroShot(Strategy):
    """experts: names to choose from; the base model is always one of them. by: "likelihood" or "confidence".

    Raises ValueError: no experts, one that is not in the bank, an unknown `by`.
    """

    def __init__(self, model: nn.Module, tokenizer, experts: Sequence[str], by: str = "likelihood"):
        super().__init__(model, tokenizer, max_new_tokens=1)
        if by not in ("likelihood", "confidence"):
            raise ValueError(
                f"by={by!r}; wanted 'likelihood' or 'confidence' (the mixture by a classifier is `Router`)"
            )
        if isinstance(experts, str) or not len(experts):
            raise ValueError(f"experts={experts!r}; wanted a list of names in the bank, at least one")
        self._in_bank(experts, "to choose from are")
        self.experts, self.by = [None, *experts], by

    @torch.no_grad()
    def scores(self, prompts: Sequence) -> Tensor:
        """[B, 1 + E]: log p(prompt | expert), or of its most likely next token; the base model first. On the host."""
        ids, mask = self.sampler.encode(prompts, self.bank.device)
        rows = self.bank.ids(self.experts)
        E, B = len(self.experts), len(prompts)
        dummy = ids[:, :1]  # what follows the prompt; its logits are those of the answer's first token, whatever it is
        ids, mask = torch.cat([ids, dummy], 1).repeat(E, 1), torch.cat([mask, torch.ones_like(dummy)], 1).repeat(E, 1)
        if self.by == "confidence":
            rollout = Rollout(ids, mask, torch.ones_like(ids[:, -1:], dtype=torch.bool))
        else:
            rollout = Rollout(ids, mask, mask[:, 1:].bool() & mask[:, :-1].bool())
        training = self.model.training
        self.model.eval()
        try:
            found = log_probs(completion_logits(self.model, rollout, expert_ids=rows.repeat_interleave(B)))
        finally:
            self.model.train(training)
        if self.by == "confidence":
            return found[:, 0].amax(-1).reshape(E, B).T.cpu()
        there = rollout.completion.clone()
        there[:, -1] = False  # the dummy
        picked = found.gather(-1, rollout.tokens[..., None])[..., 0]
        return torch.where(there, picked, 0).sum(1).reshape(E, B).T.cpu()

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        return [self.experts[i] for i in self.scores(prompts).argmax(1).tolist()]


class Router(Strategy):
    """A mixture by the probabilities that a `Prompt` or `Classifier` gives its labels; what the base model's labels get is left to it.

    step: probabilities are rounded to multiples of it: a mixture is a row of the bank, and prompts that are much alike should share one
    most: mixtures in a batch at most, the rarest of more give way to the likeliest expert; None: a quarter of the bank's rows
    """

    def __init__(self, judge: Prompt, step: float = 0.25, most: int | None = None):
        super().__init__(judge.model, judge.sampler.tokenizer)
        self.judge, self.step, self.most = judge, step, max(1, self.bank.rows // 4) if most is None else most

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        likelihoods = self.judge.log_likelihoods(prompts)
        chosen: list[tuple] = []
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
