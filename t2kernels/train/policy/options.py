"""The policy over the options of a row: nothing is written, and the expected reward has an exact gradient.

    pi_k = softmax_k(s_k / temperature),    s_k = Σ_t log p(token_t of option k | prompt, tokens before t)
    loss = Σ_i weights_i (-Σ_k pi_k r_k + kl_coef KL(pi || pi_base) - written_coef log Σ_k exp(s_k))

With norm "length", s_k is divided by the characters of the option, as lm-eval's acc_norm. The KL is between policies
over options: 0 where expert and base choose alike, whatever else they would write. The last term is the probability
that the model writes an option at all: the first two do not change it, and a model that is asked to write would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.labels import encode_options, normalised
from t2kernels.train.loss import kl_divergence

from .scores import Scores

NONE = -1e30
"""The log-likelihood of an option that is not there. It is finite: a difference of two of them is a number."""

OptionRow = tuple[list[int], list[list[int]]]
"""The tokens of a prompt, and those of each of its options."""


@dataclass
class Choices:
    """Prompts with options.

    rollout: a row for each option; or, where every option is a single token, a row for each prompt
    tokens: [B, 1, K] int64, the tokens of the options in the second case, else None
    there: [B, K] bool, which options there are
    rewards: [B, K] fp32
    prompts, texts: [B], the prompts and the texts of their options
    lengths: [B, K] fp32, what the log-likelihood of an option is divided by
    experts, weights: [B], as of a `Rollout`
    """

    rollout: Rollout
    tokens: Tensor | None
    there: Tensor
    rewards: Tensor
    lengths: Tensor
    experts: Sequence[str | None]
    weights: Tensor
    prompts: Sequence[Any]
    texts: Sequence[Sequence[str]]

    def sums(self, scores: Scores) -> Tensor:
        """s, the log-likelihood of each option, [B, K]; NONE where there is no option.

        scores: of `rollout`, with the options `tokens`
        """
        if self.tokens is not None and scores.options is not None:
            return scores.options[:, 0].masked_fill(~self.there, NONE)
        each = scores.log_probs.sum(1)
        return torch.full_like(self.lengths, NONE, dtype=each.dtype).masked_scatter(self.there, each)

    def log_written(self, sums: Tensor) -> Tensor:
        """log Σ_k exp(s_k), [B]: of the probability that the model writes an option. 0 for options that are compared by
        length: these are texts to rank, not answers to write."""
        # An option that begins with another one counts twice, so the sum can exceed 1.
        return sums.logsumexp(1).clamp(max=0) * (self.lengths == 1).all(1)

    def log_policy(self, sums: Tensor, temperature: float = 1.0) -> Tensor:
        """log pi, [B, K]; NONE and below where there is no option."""
        compared = sums / (self.lengths * (temperature or 1.0))
        return torch.log_softmax(compared.masked_fill(~self.there, NONE), 1)

    def chosen(self, log_policy: Tensor) -> tuple[list[str], Tensor]:
        """(the likeliest option of each prompt; its reward, [B])."""
        best = log_policy.argmax(1)
        return [texts[k] for texts, k in zip(self.texts, best.tolist(), strict=True)], self.rewards.gather(
            1, best[:, None]
        )[:, 0]


def options_loss(
    log_pi: Tensor,
    rewards: Tensor,
    weights: Tensor,
    log_base: Tensor | None = None,
    kl_coef: float = 0.0,
    kind: str = "expected",
    direction: str = "reverse",
    log_written: Tensor | None = None,
    written_coef: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Returns (loss, the KL of each prompt, [B], or None), with the scalar

        loss = Σ_i weights_i (-f(E_pi[r]) + kl_coef KL_i - written_coef log_written_i)

    log_pi, log_base: [B, K], as `Choices.log_policy` gives them; rewards: [B, K]; weights: [B]
    kind: "expected", f(e) = e; "log", f(e) = log e: with rewards 1 and 0 the cross-entropy of the right options, whose
        gradient does not vanish where the policy is sure of a wrong one
    log_written: [B], from `Choices.log_written`
    """
    expected = (log_pi.exp() * rewards).sum(1)
    gain = expected if kind == "expected" else expected.clamp(min=1e-30).log()
    kl = None if log_base is None else kl_divergence(log_pi, log_base, direction)
    per_row = -gain if kl is None else kl_coef * kl - gain
    if log_written is not None:
        per_row = per_row - written_coef * log_written
    return (weights * per_row).sum(), kl


def encoded(tokenizer: Any, prompts: Sequence[Any], options: Sequence[Sequence[str]]) -> list[OptionRow]:
    """The tokens of each prompt and of its options, as `encode_options` cuts them."""
    return list(zip(*encode_options(tokenizer, prompts, options), strict=True))


def pieces(
    rows: Sequence[OptionRow],
    prompts: Sequence[Any],
    texts: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    experts: Sequence[str | None],
    weights: Sequence[float],
    norms: Sequence[str],
    pad: int,
    size: int | None,
    device: torch.device,
) -> Iterator[Choices]:
    """Choices of at most `size` rows of a rollout (None: all), at least one prompt; prompts of equal length together.

    rows: from `encoded`, of the prompts; texts: the options; rewards: of the options; norms: "sum" or "length", of each
        row
    """
    order = sorted(range(len(rows)), key=lambda i: (max(map(len, rows[i][1])), len(rows[i][0])))
    while order:
        count, options, single = 0, 0, True
        for i in order:
            options += len(rows[i][1])
            single = single and max(map(len, rows[i][1])) == 1
            if count and size is not None and (count + 1 if single else options) > size:
                break
            count += 1
        part, order = order[:count], order[count:]
        K = max(len(rows[i][1]) for i in part)
        there, value, length = torch.zeros(count, K, dtype=torch.bool), torch.zeros(count, K), torch.ones(count, K)
        for at, i in enumerate(part):
            k = len(rows[i][1])
            there[at, :k] = True
            value[at, :k] = torch.tensor(rewards[i], dtype=torch.float32)
            length[at, :k] = 1 / normalised(torch.ones(k), texts[i], norms[i])
        single = all(len(option) == 1 for i in part for option in rows[i][1])
        if single:
            drawn = Rollout.of([rows[i][0] for i in part], [rows[i][1][0] for i in part], pad, device)
            tokens = torch.tensor([[*(o[0] for o in rows[i][1]), *[pad] * (K - len(rows[i][1]))] for i in part])
        else:
            pairs = [(rows[i][0], option) for i in part for option in rows[i][1]]
            drawn, tokens = Rollout.of(*zip(*pairs, strict=True), pad, device), None
        own = [experts[i] for i in part]
        drawn.experts = own if single else [experts[i] for i in part for _ in rows[i][1]]
        yield Choices(
            drawn,
            None if tokens is None else tokens[:, None].to(device),
            there.to(device),
            value.to(device),
            length.to(device),
            own,
            torch.tensor([weights[i] for i in part], dtype=torch.float32, device=device),
            [prompts[i] for i in part],
            [texts[i] for i in part],
        )
