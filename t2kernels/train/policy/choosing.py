"""`ChoiceTrainer`: the part of a trainer that answers by options, and what its subclasses say of their policy."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from t2kernels import InputError
from t2kernels.rollout.chat import as_completion
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.labels import likeliest, option_log_likelihoods
from t2kernels.rollout.rewards import RewardContext, Scorer
from t2kernels.train.config import SVFConfig
from t2kernels.train.processes import gather
from t2kernels.train.steering.measures import Measures

from .options import Choices, encoded, options_loss, pieces
from .scores import AtHead, TokenScorer


class ChoiceTrainer(Trainer):
    """A Trainer with a policy, rewards, and choices among the options of a row. `ReinforceTrainer` makes its parts.

    scorers: {expert: its Scorer}; choosers: {expert: what gives the options of its rows, and their norm}
    sampler: encodes prompts; option_scorer: scores tokens at temperature 1; measures: takes the numbers of a batch
    """

    args: SVFConfig
    scorers: dict[str | None, Scorer]
    choosers: dict[str | None, Any]
    sampler: Sampler
    option_scorer: TokenScorer
    measures: Measures

    # --- overridden by subclasses

    def routing(self, experts: Sequence[str | None]) -> dict[str, Tensor]:
        """Arguments of a forward that sends row i of a batch through experts[i]."""
        return {}

    def reference(self) -> contextlib.AbstractContextManager[object]:
        """A context in which the model is the reference of the KL."""
        raise NotImplementedError("a KL needs a reference: set kl_coef=0, or define reference()")

    def at_head(self, experts: Sequence[str | None]) -> AtHead:
        """A function of rows of a batch that gives a context. In it the head, called by itself, computes for each
        position what it does in a forward with `routing(experts)`; rows None: in a forward of the reference."""
        return lambda rows: contextlib.nullcontext()

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """The reward of each completion, by the scorer of its row's expert; NaN where no reward applies.

        completion_ids: their tokens; None: what the tokenizer makes of the texts
        Returns [B] fp32 on the CPU.
        """
        if completion_ids is None:
            texts = [c if isinstance(c, str) else str(c[-1].get("content")) for c in completions]
            completion_ids = self.sampler.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rewards = torch.zeros(len(rows), dtype=torch.float32)
        for expert in dict.fromkeys(row.get("expert") for row in rows):
            at = [i for i, row in enumerate(rows) if row.get("expert") == expert]
            context = self._context([completion_ids[i] for i in at])
            rewards[at] = self.scorers[expert]([rows[i] for i in at], [completions[i] for i in at], context)
        return rewards

    def _context(self, completion_ids: Sequence[Sequence[int]]) -> RewardContext:
        if not hasattr(self, "state"):  # the first try of the rewards, before there is a trainer
            return RewardContext(completion_ids, TrainerState())
        return RewardContext(completion_ids, self.state, self.measures.metric, self.measures.keep)

    def _counts(self, experts: Sequence[str | None]) -> Counter[str | None]:
        """How many rows each expert has in the batch of all processes."""
        return Counter(experts)

    # --- options

    @torch.no_grad()
    def choices(self, rows: Sequence[Mapping[str, Any]]) -> list[Choices]:
        """The options of each row, with their rewards, in pieces of at most `loss_batch_size` rows."""
        args, experts = self.args, [row.get("expert") for row in rows]
        prompts, texts = [row["prompt"] for row in rows], [self._options(row) for row in rows]
        each = [(row, text) for row, some in zip(rows, texts, strict=True) for text in some]
        rewards = self.score([row for row, _ in each], [as_completion(text, row["prompt"]) for row, text in each])
        if rewards.isnan().any():
            raise InputError(
                "no reward applies to an option: where options are compared, each needs a number, not None"
            )
        counts = self._counts([e for part in gather(experts, self.accelerator.num_processes) for e in part])
        return list(
            pieces(
                encoded(self.sampler.tokenizer, prompts, texts),
                prompts,
                texts,
                [part.tolist() for part in rewards.split([len(some) for some in texts])],
                experts,
                [self.accelerator.num_processes / counts[e] for e in experts],
                [self.choosers[e].norm for e in experts],
                self.sampler.pad,
                args.loss_batch_size,
                args.device,
            )
        )

    def _options(self, row: Mapping[str, Any]) -> list[str]:
        return list(self.choosers[row.get("expert")].options(row))

    def options_loss(self, model: nn.Module, inputs: Choices) -> Tensor:
        """`options_loss` of choices, a scalar."""
        args, rollout, at = self.args, inputs.rollout, self.at_head(inputs.rollout.experts)
        log_base = None
        if args.kl_coef:
            with torch.no_grad(), self.reference():
                base = self.option_scorer.score(
                    model, rollout, {}, at_head=lambda rows: at(None), options=inputs.tokens
                )
            log_base = inputs.log_policy(inputs.sums(base), args.temperature)
        routing = self.routing(rollout.experts)
        scores = self.option_scorer.score(model, rollout, routing, at_head=at, options=inputs.tokens)
        sums = inputs.sums(scores)
        log_pi, log_written = inputs.log_policy(sums, args.temperature), inputs.log_written(sums)
        rewards = inputs.rewards if args.reward_range is None else inputs.rewards.clamp(*args.reward_range)
        loss, kl = options_loss(
            log_pi,
            rewards,
            inputs.weights,
            log_base,
            args.kl_coef,
            "log" if args.supervised else args.policy_loss,
            args.kl_direction,
            log_written,
            1.0 if args.supervised else args.written_coef,
        )
        p = log_pi.detach().exp()
        texts, best = inputs.chosen(log_pi)
        self.measures.note(inputs.experts, reward=(p * inputs.rewards).sum(1), accuracy=best > 0)
        self.measures.note(inputs.experts, entropy=torch.special.entr(p).sum(1))
        self.measures.note(inputs.experts, written=log_written.detach().exp())
        self.measures.answers(inputs.experts, inputs.prompts, texts, best > 0)
        if kl is not None:
            self.measures.note(inputs.experts, kl=kl.detach())
        return loss

    def chosen(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], routing: dict[str, Tensor]) -> list[float]:
        """The reward of the likeliest option of each row."""
        prompts, texts, ids = [row["prompt"] for row in rows], list(map(self._options, rows)), routing.get("expert_ids")
        if ids is not None and not ids.dim():
            ids = ids.expand(len(rows))
        found = option_log_likelihoods(model, self.sampler.tokenizer, prompts, texts, ids)
        best = [
            likeliest(sums, some, self.choosers[row.get("expert")].norm)
            for row, some, sums in zip(rows, texts, found, strict=True)
        ]
        return self.score(rows, [as_completion(t, p) for t, p in zip(best, prompts, strict=True)]).tolist()
