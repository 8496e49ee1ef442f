"""`Examples`: a few labelled prompts, and what P experts, in P rows, make of them in one batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2kernels.rollout.generation import Rollout, Sampler, completion_logits
from t2kernels.rollout.prefix import forward, hoist, prefill
from t2kernels.rollout.rewards import Reward, Scorer
from t2kernels.train.data import is_task
from t2kernels.train.loss import log_probs

MEMORY = 4 * 2**30
"""Bytes of keys, values and logits that a batch may hold, unless said otherwise."""


@dataclass(frozen=True)
class Scores:
    """rewards: [P, K * samples], of the answers, or None; likelihood: [P] mean log-likelihood of a right answer in nats, or None;
    answers: P lists of what was written, one for each example and sample"""

    rewards: Tensor | None
    likelihood: Tensor | None
    answers: list[list] | None = None

    @property
    def reward(self) -> Tensor | None:
        """[P], the mean."""
        return None if self.rewards is None else self.rewards.mean(1)


class Examples:
    """K labelled prompts for one patched model.

    rows: dicts with a prompt (text or chat) and the columns that the reward takes; a task stands for its reward only
    reward: reward(prompts, completions, **columns), a task, or None where only likelihoods are wanted
    gold: the column that holds a right completion, or a function row -> completion; None where only rewards are wanted
    max_new_tokens: of an answer; None: the task's, else 64
    memory: bytes that one batch may take beside the weights; more candidates go through in chunks
    at_once: set it to let fewer rows do: most candidates of a chunk, whatever fits into memory

    Raises ValueError before any forward: no examples, a missing or empty prompt or gold answer, a tokenizer that cannot pad, neither reward
    nor gold, a reward that fails on an empty answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        rows: Sequence[Mapping],
        reward=None,
        gold=None,
        max_new_tokens: int | None = None,
        memory=MEMORY,
    ):
        if getattr(model, "t2_bank", None) is None:
            raise ValueError("the model is not patched: bank = t2kernels.patch_model(model) first")
        rows = check_rows(rows)
        if reward is None and gold is None:
            raise ValueError("examples need a reward, a gold answer, or both: nothing else says what is right")
        self.model, self.bank, self.rows, self.memory = model, model.t2_bank, rows, memory
        self.at_once: int | None = None
        self.scorer, max_new_tokens = scorer_of(reward, rows, max_new_tokens)
        self.sampler = Sampler(model, tokenizer, max_new_tokens)
        self.prompts = [row["prompt"] for row in self.rows]
        ids, mask = self.sampler.encode(self.prompts, self.bank.device)
        self.prefix, self.ids, self.mask = hoist(ids, mask)
        self.gold = None if gold is None else self._encode_gold(gold)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def reward(self) -> Reward | None:
        """The reward function, as it was given."""
        return None if self.scorer is None else self.scorer.rewards[0]

    def score(
        self, ids: Tensor, temperature: float = 0.0, samples: int = 1, reward: bool = True, likelihood: bool = True
    ) -> Scores:
        """What the experts in these rows of the bank make of the examples; as many as `memory` allows at once.

        ids: [P] int32, one for each candidate. temperature, samples: of the answers that are rewarded; 0 is greedy
        """
        ids = ids.reshape(-1)
        rewards, likelihoods, answers = [], [], []
        reward, likelihood = reward and self.scorer is not None, likelihood and self.gold is not None
        if not (reward or likelihood):
            raise ValueError(
                "nothing to score by: these examples have no reward or no gold answer, and the other was not asked for"
            )
        for chunk in ids.split(self.chunk(samples if reward else 1)):
            # Both read the prompts, and both change the cache they are given; one alone reads them in its own first forward.
            cache = (
                self._read_prompts(chunk)
                if reward and likelihood
                else prefill(self.model, self.prefix, chunk, len(self))
            )
            if reward:
                drawn = self._answers(chunk, copy.deepcopy(cache) if likelihood else cache, temperature, samples)
                got, written = rewarded(self.scorer, self.rows, drawn, samples)
                rewards.append(got)
                answers += written
            if likelihood:
                likelihoods.append(self._likelihoods(chunk, cache).cpu())
        if not reward:
            return Scores(None, torch.cat(likelihoods))
        return Scores(torch.cat(rewards), torch.cat(likelihoods) if likelihood else None, answers)

    def chunk(self, samples: int = 1) -> int:
        """How many candidates go through at once: what `memory` allows, and at most `at_once`."""
        gold = 0 if self.gold is None else self.gold[0].shape[1]
        tokens = self.ids.shape[1] + max(self.sampler.max_new_tokens if self.scorer else 0, gold)
        fit = int(self.memory // (bytes_per_token(self.model) * tokens * len(self) * samples))
        return max(1, fit if self.at_once is None else min(fit, self.at_once))

    def _read_prompts(self, chunk: Tensor):
        """The cache of all prompts but their last tokens, candidates side by side; of their common beginning only once a candidate."""
        cache = prefill(self.model, self.prefix, chunk, len(self))
        if self.ids.shape[1] - 1 > len(self.prefix):
            ids, mask = self._rows(chunk, self.ids[:, :-1], self.mask[:, :-1])
            _, cache = forward(self.model, ids, mask, cache, keep=1, expert_ids=chunk.repeat_interleave(len(self)))
        return cache

    def _rows(self, chunk: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [t.repeat(len(chunk), 1) for t in tensors]

    def _answers(self, chunk: Tensor, cache, temperature: float, samples: int) -> list:
        if cache is not None:
            cache.batch_repeat_interleave(samples)
        each = chunk.repeat_interleave(len(self))
        drawn = self.sampler.draw(
            self.model, *self._rows(chunk, self.ids, self.mask), temperature, samples, cache=cache, expert_ids=each
        )
        return self.sampler.decode(drawn, [p for p in self.prompts for _ in range(samples)] * len(chunk))

    @torch.no_grad()
    def _likelihoods(self, chunk: Tensor, cache) -> Tensor:
        """[P'] mean over the examples of log p(gold | prompt), in one forward."""
        tokens, there = self.gold
        ids, mask = self._rows(chunk, torch.cat([self.ids, tokens], 1), torch.cat([self.mask, there.long()], 1))
        rollout = Rollout(ids, mask, *self._rows(chunk, there))
        logits = completion_logits(self.model, rollout, cache=cache, expert_ids=chunk.repeat_interleave(len(self)))
        found = log_probs(logits).gather(-1, rollout.tokens[..., None])[..., 0]
        return torch.where(rollout.completion, found, 0).sum(1).reshape(len(chunk), -1).mean(1)

    def _encode_gold(self, gold) -> tuple[Tensor, Tensor]:
        texts = [gold(row) if callable(gold) else row.get(gold) for row in self.rows]
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text:
                what = "its gold answer" if callable(gold) else f"its {gold!r}"
                raise ValueError(f"example {i}: {what} is {text!r}; wanted the text of a right completion")
        return encode_completions(self.sampler.tokenizer, texts, self.bank.device)


def check_rows(rows: Sequence[Mapping]) -> list[Mapping]:
    """Labelled prompts as a list. Raises ValueError for what is none, or none at all, and for a row without a prompt."""
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__len__") or is_task(rows):
        raise ValueError(
            f"examples are a {type(rows).__name__}; wanted a list of dicts with a prompt; task.split('train', 16) gives one"
        )
    if not len(rows):
        raise ValueError("there are no examples: few-shot adaptation needs at least one labelled prompt")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row.get("prompt"):
            raise ValueError(f"example {i} is {row!r}; wanted a dict with a prompt that is not empty")
    return list(rows)


def scorer_of(reward, rows: Sequence[Mapping], max_new_tokens: int | None) -> tuple[Scorer | None, int]:
    """(the scorer of a reward or a task, tried on empty answers; the length of an answer). Raises what that reward raises."""
    if is_task(reward):
        max_new_tokens = max_new_tokens or getattr(reward, "max_new_tokens", None)
        reward = reward.reward
    scorer = None if reward is None else Scorer.of(reward)
    if scorer is not None:
        scorer(rows, ["" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": ""}] for row in rows])
    return scorer, max_new_tokens or 64


def rewarded(scorer: Scorer, rows: Sequence[Mapping], drawn: Sequence, samples: int) -> tuple[Tensor, list[list]]:
    """(rewards [P, K * samples], P lists of answers) of P * K * samples answers, each candidate's and each example's side by side."""
    each = len(rows) * samples
    got = scorer([row for row in rows for _ in range(samples)] * (len(drawn) // each), drawn).reshape(-1, each)
    return got, [list(drawn[i : i + each]) for i in range(0, len(drawn), each)]


def encode_completions(tokenizer, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Completions with the end of text behind them: ids [K, C] int64, right-padded, and [K, C] bool, where there is a token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id, dtype=torch.int64)
    there = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        there[i, : len(row)] = True
    return ids.to(device), there.to(device)


def bytes_per_token(model: nn.Module) -> int:
    """Keys and values of every layer, a row of hidden states, and logits in fp32 with their softmax: what a token of a batch costs at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=model.dtype).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * config.num_hidden_layers * heads * width * size + 3 * inner * size + 8 * config.vocab_size
