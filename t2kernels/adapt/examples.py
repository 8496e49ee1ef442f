"""`Examples`: a few labelled prompts, and the scores of many experts on them, in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.rollout.chat import AnyPrompt, as_completion
from t2kernels.rollout.generation import Rollout, Sampler, completion_logits, log_probs
from t2kernels.rollout.labels import equally_sharp, likeliest, normalised, option_log_likelihoods
from t2kernels.rollout.patched import bank_of
from t2kernels.rollout.prefix import forward, hoist, prefill, window_of
from t2kernels.rollout.rewards import Reward, Scorer, is_task
from t2kernels.tasks.judging import CHOICE

MEMORY = 4 * 2**30
"""Default for the bytes of keys, values and logits of a batch."""


@dataclass(frozen=True)
class Scores:
    """The scores of P candidates on K examples.

    rewards: [P, K * samples] fp32, of the answers, or None
    likelihoods: [P, K] fp32, log-likelihood of a right answer in nats, or None
    answers: P lists of K * samples answers, or None
    expected: [P, K] fp32, the probability of the right option where all candidates are equally sure of their choices
        (`rollout.labels.equally_sharp`); None for examples without options
    """

    rewards: Tensor | None
    likelihoods: Tensor | None
    answers: list[list[Any]] | None = None
    expected: Tensor | None = None

    @property
    def reward(self) -> Tensor | None:
        """[P], the mean reward of each candidate."""
        return None if self.rewards is None else self.rewards.mean(1)

    @property
    def likelihood(self) -> Tensor | None:
        """[P], the mean log-likelihood of a right answer under each candidate, nats."""
        return None if self.likelihoods is None else self.likelihoods.mean(1)


class Examples:
    """K labelled prompts for one patched model, and the scores of experts on them.

    rows: dicts with a prompt (text or chat) and the columns of the reward
    reward: reward(prompts, completions, **columns), a task (for its reward), or None if only likelihoods are wanted.
        A task with check "choice" is answered by the likeliest option, and nothing is written: the reward is that of
        this option, the likelihood is log p(right option) among the options
    gold: the column with a right completion, or a function row -> completion; None if only rewards are wanted
    max_new_tokens: of an answer; None: the task's, else 64
    memory: bytes that one batch may take beside the weights; more candidates go through in chunks
    at_once: (attribute) most candidates of a chunk, on top of the memory limit; None: no such limit

    Raises ValueError before any forward: no examples, a missing or empty prompt or gold answer, a tokenizer that cannot
    pad, neither reward nor gold, a reward that fails on an empty answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        reward: Any = None,
        gold: str | Callable[[Mapping[str, Any]], str] | None = None,
        max_new_tokens: int | None = None,
        memory: float = MEMORY,
    ) -> None:
        self.model: nn.Module = model
        self.bank: ExpertBank = bank_of(model)
        self.rows: list[Mapping[str, Any]] = check_rows(rows)
        self.memory: float = memory
        if reward is None and gold is None:
            raise InputError("examples need a reward, a gold answer, or both: nothing else says what is right")
        self.at_once: int | None = None
        self.scorer: Scorer | None
        self.scorer, max_new_tokens = scorer_of(reward, self.rows, max_new_tokens)
        self.chooser: Any = reward if is_task(reward) and reward.check == CHOICE else None
        if self.chooser is not None:
            self._right: list[int] = [right_option(reward, row) for row in self.rows]
            gold = gold or "answer"
        self.sampler: Sampler = Sampler(model, tokenizer, max_new_tokens)
        self.prompts: list[AnyPrompt] = [row["prompt"] for row in self.rows]
        ids, mask = self.sampler.encode(self.prompts, self.bank.device)
        self.prefix: Tensor
        self.ids: Tensor
        self.mask: Tensor
        self.gold: tuple[Tensor, Tensor] | None = None if gold is None else self._encode_gold(gold)
        after = max(max_new_tokens, 0 if self.gold is None else self.gold[0].shape[1])
        self.prefix, self.ids, self.mask = hoist(ids, mask, window_of(model) - after)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def reward(self) -> Reward | None:
        """The reward function, or None."""
        return None if self.scorer is None else self.scorer.rewards[0]

    def score(
        self, ids: Tensor, temperature: float = 0.0, samples: int = 1, reward: bool = True, likelihood: bool = True
    ) -> Scores:
        """Score experts on the examples, as many at once as `memory` allows.

        ids: [P] int32, the table rows of the experts
        temperature, samples: of the answers that are rewarded; 0 is greedy
        reward, likelihood: False to leave out that part
        Raises ValueError if no part is left.
        """
        ids = ids.reshape(-1)
        rewards, likelihoods, answers = [], [], []
        reward, likelihood = reward and self.scorer is not None, likelihood and self.gold is not None
        if not (reward or likelihood):
            raise InputError(
                "nothing to score by: one of reward and likelihood is off, and these examples lack the other"
            )
        if self.chooser is not None:
            if temperature or samples != 1:
                raise InputError(
                    f"temperature={temperature} and samples={samples}, but these examples are answered by the "
                    "likeliest option: nothing is drawn. Leave both out"
                )
            found = self._choose(ids)
            return found if reward else Scores(None, found.likelihoods, None, found.expected)
        for chunk in ids.split(self.chunk(samples if reward else 1)):
            # Reward and likelihood both read the prompts, and both change the cache that they get. One alone reads the
            # prompts in its own first forward.
            cache = (
                self._read_prompts(chunk)
                if reward and likelihood
                else prefill(self.model, self.prefix, chunk, len(self))
            )
            if reward and self.scorer is not None:
                drawn = self._answers(chunk, copy.deepcopy(cache) if likelihood else cache, temperature, samples)
                got, written = rewarded(self.scorer, self.rows, drawn, samples)
                rewards.append(got)
                answers += written
            if likelihood:
                likelihoods.append(self._likelihoods(chunk, cache).cpu())
        if not reward:
            return Scores(None, torch.cat(likelihoods))
        return Scores(torch.cat(rewards), torch.cat(likelihoods) if likelihood else None, answers)

    @torch.no_grad()
    def _choose(self, ids: Tensor) -> Scores:
        """The likeliest option of each example under each candidate, its reward, and log p(right option)."""
        assert self.scorer is not None
        options = [self.chooser.options(row) for row in self.rows]
        rewards, likelihoods, expected, answers = [], [], [], []
        for chunk in ids.split(self.chunk()):
            count = len(chunk)
            sums = option_log_likelihoods(
                self.model,
                self.sampler.tokenizer,
                self.prompts * count,
                options * count,
                chunk.repeat_interleave(len(self)),
            )
            chosen = [
                likeliest(found, some, self.chooser.norm) for found, some in zip(sums, options * count, strict=True)
            ]
            got, said = rewarded(self.scorer, self.rows, chosen, 1)
            rewards.append(got)
            answers += said
            right = [found.log_softmax(0)[i] for found, i in zip(sums, self._right * count, strict=True)]
            likelihoods.append(torch.stack(right).float().reshape(count, -1))
            compared = [normalised(f, some, self.chooser.norm) for f, some in zip(sums, options * count, strict=True)]
            sharp = equally_sharp(pad_sequence(compared, True, -torch.inf).reshape(count, len(self), -1))
            expected.append(sharp.gather(-1, torch.tensor(self._right).expand(count, -1)[..., None])[..., 0])
        return Scores(torch.cat(rewards), torch.cat(likelihoods), answers, torch.cat(expected))

    def chunk(self, samples: int = 1) -> int:
        """How many candidates go through at once: as many as `memory` allows, at most `at_once`."""
        gold = 0 if self.gold is None else self.gold[0].shape[1]
        tokens = self.ids.shape[1] + max(self.sampler.max_new_tokens if self.scorer else 0, gold)
        fit = int(self.memory // (bytes_per_token(self.model) * tokens * len(self) * samples))
        return max(1, fit if self.at_once is None else min(fit, self.at_once))

    def _read_prompts(self, chunk: Tensor) -> Any:
        """The KV cache of all prompts without their last tokens, candidate by candidate.

        Each candidate reads the common prefix of the prompts once.
        """
        cache = prefill(self.model, self.prefix, chunk, len(self))
        if self.ids.shape[1] - 1 > len(self.prefix):
            ids, mask = self._rows(chunk, self.ids[:, :-1], self.mask[:, :-1])
            _, cache = forward(self.model, ids, mask, cache, keep=1, expert_ids=chunk.repeat_interleave(len(self)))
        return cache

    def _rows(self, chunk: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [t.repeat(len(chunk), 1) for t in tensors]

    def _answers(self, chunk: Tensor, cache: Any, temperature: float, samples: int) -> list[Any]:
        """The answers of each candidate to each example, side by side."""
        if cache is not None:
            cache.batch_repeat_interleave(samples)
        each = chunk.repeat_interleave(len(self))
        drawn = self.sampler.draw(
            self.model, *self._rows(chunk, self.ids, self.mask), temperature, samples, cache=cache, expert_ids=each
        )
        return self.sampler.decode(drawn, [p for p in self.prompts for _ in range(samples)] * len(chunk))

    @torch.no_grad()
    def _likelihoods(self, chunk: Tensor, cache: Any) -> Tensor:
        """log p(gold | prompt) of each example under each candidate of the chunk, [P, K], in one forward."""
        assert self.gold is not None
        tokens, there = self.gold
        ids, mask = self._rows(chunk, torch.cat([self.ids, tokens], 1), torch.cat([self.mask, there.long()], 1))
        rollout = Rollout(ids, mask, *self._rows(chunk, there))
        logits = completion_logits(self.model, rollout, cache=cache, expert_ids=chunk.repeat_interleave(len(self)))
        found = log_probs(logits).gather(-1, rollout.tokens[..., None])[..., 0]
        return torch.where(rollout.completion, found, 0).sum(1).reshape(len(chunk), -1)

    def _encode_gold(self, gold: str | Callable[[Mapping[str, Any]], str]) -> tuple[Tensor, Tensor]:
        texts = [gold(row) if callable(gold) else row.get(gold) for row in self.rows]
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text:
                what = "its gold answer" if callable(gold) else f"its {gold!r}"
                raise InputError(f"example {i}: {what} is {text!r}; wanted the text of a right completion")
        return encode_completions(self.sampler.tokenizer, texts, self.bank.device)


def check_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The examples as a list. Raises ValueError for anything but a list of dicts, for no rows, and without a prompt."""
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__len__") or is_task(rows):
        raise InputError(
            f"examples are a {type(rows).__name__}; wanted a list of dicts with a prompt: task.split('train', 16)"
        )
    if not len(rows):
        raise InputError("there are no examples: few-shot adaptation needs at least one labelled prompt")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row.get("prompt"):
            raise InputError(f"example {i} is {row!r}; wanted a dict with a prompt that is not empty")
    return list(rows)


def right_option(task: Any, row: Mapping[str, Any]) -> int:
    """Which option of a row is its answer. Raises ValueError if none is."""
    options = [option.strip() for option in task.options(row)]
    if str(row.get("answer", "")).strip() not in options:
        raise InputError(f"the answer {row.get('answer')!r} is none of the options {options!r:.120}")
    return options.index(str(row["answer"]).strip())


def scorer_of(reward: Any, rows: Sequence[Mapping[str, Any]], max_new_tokens: int | None) -> tuple[Scorer | None, int]:
    """(the scorer of a reward or a task, or None; the length of an answer).

    Tries the reward on empty answers to `rows`, and raises what it raises.
    """
    if is_task(reward):
        max_new_tokens = max_new_tokens or getattr(reward, "max_new_tokens", None)
    scorer = None if reward is None else Scorer.of(reward)
    if scorer is not None:
        scorer(rows, [as_completion("", row["prompt"]) for row in rows])
    return scorer, max_new_tokens or 64


def rewarded(
    scorer: Scorer, rows: Sequence[Mapping[str, Any]], drawn: Sequence[Any], samples: int
) -> tuple[Tensor, list[list[Any]]]:
    """Score the answers of P candidates.

    drawn: P * K * samples answers, those of a candidate side by side, and among them those of an example
    Returns (rewards [P, K * samples], P lists of answers).
    """
    each = len(rows) * samples
    got = scorer([row for row in rows for _ in range(samples)] * (len(drawn) // each), drawn).reshape(-1, each)
    return got, [list(drawn[i : i + each]) for i in range(0, len(drawn), each)]


def encode_completions(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of completions, each with the end-of-text token at its end.

    Returns (ids [K, C] int64, right-padded; [K, C] bool, True for a token).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id, dtype=torch.int64)
    there = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        there[i, : len(row)] = True
    return ids.to(device), there.to(device)


def bytes_per_token(model: nn.Module) -> int:
    """Upper bound of the memory of one token: keys and values of all layers, an MLP, and fp32 logits with softmax."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=model.dtype).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * config.num_hidden_layers * heads * width * size + 3 * inner * size + 8 * config.vocab_size
