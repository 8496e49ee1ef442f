"""Completions of a model: drawn with a KV cache, then scored in one forward with gradients."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from t2kernels import InputError
from t2kernels.layers.dense.head import contiguous_head

from .chat import AnyPrompt, as_completion, encode, end_tokens
from .modes import eval_mode

STAGE = 8
"""Least tokens of a stage of `Sampler.draw`. Fewer would spend more on the set-up of `generate`; more would go on
drawing for rows that have ended."""

NEUTRAL: dict[str, object] = {
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings of `generate` that are switched off by another value than None."""
NOT_SETTINGS = ("_from_model_config", "transformers_version")
"""Fields of a GenerationConfig that `generate` does not take."""


@dataclass
class Rollout:
    """Prompts, left-padded to P tokens, and their completions, right-padded to C tokens.

    ids: [B, P + C] int64
    mask: [B, P + C] int64, 1 for a token of the prompt or the completion
    completion: [B, C] bool, True up to the end token, which counts
    advantages, weights: [B] fp32, or None before they are known
    experts: [B] the name of each row's expert, or empty
    old: [B, C] log-probabilities under the policy that drew the completions, or None
    sampled: [B, C] fp32 log-probabilities that the sampler itself drew the tokens with, or None if it is the trainer's
        own forward
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor
    advantages: Tensor | None = None
    weights: Tensor | None = None
    experts: Sequence[str | None] = ()
    old: Tensor | None = None
    sampled: Tensor | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        pad: int,
        device: torch.device | str = "cpu",
        sampled: Sequence[Sequence[float]] | None = None,
    ) -> Rollout:
        """A rollout of these tokens, padded. prompts, completions: [B] lists, a completion with its end token

        sampled: log-probabilities of the tokens of each completion, or None
        """
        P, C = (max(map(len, part)) for part in (prompts, completions))
        ids = torch.full((len(prompts), P + C), pad, dtype=torch.int64)
        mask, known = torch.zeros_like(ids), torch.zeros(len(prompts), C)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            there = slice(P - len(prompt), P + len(completion))
            ids[i, there], mask[i, there] = torch.tensor([*prompt, *completion]), 1
            if sampled is not None:
                known[i, : len(completion)] = torch.tensor(sampled[i])
        own = None if sampled is None else known.to(device)
        return cls(ids.to(device), mask.to(device), mask[:, P:].bool().to(device), sampled=own)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> Tensor:
        """[B, C] int64, the completions."""
        return self.ids[:, -self.completion.shape[1] :]

    def completion_ids(self) -> list[list[int]]:
        """[B] lists, the tokens of each completion without padding."""
        lengths = self.completion.sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]

    def split(self, size: int | None) -> list[Rollout]:
        """Pieces of at most `size` rows (None: all), shortest rows first, without columns that are all padding."""
        order = self.mask.sum(1).argsort(stable=True)
        return [self.take(rows) for rows in order.split(size or len(self))]

    def take(self, rows: Tensor) -> Rollout:
        """The rows of these numbers, at least one, without columns that are all padding. rows: [n] int64"""
        prompt = self.ids.shape[1] - self.completion.shape[1]
        left = int(self.mask[rows].any(0).int().argmax())
        length = int(self.completion[rows].any(0).sum())
        cut = slice(left, prompt + length)
        return Rollout(
            self.ids[rows, cut],
            self.mask[rows, cut],
            self.completion[rows, :length],
            None if self.advantages is None else self.advantages[rows],
            None if self.weights is None else self.weights[rows],
            [self.experts[i] for i in rows.tolist()] if self.experts else (),
            None if self.old is None else self.old[rows, :length],
            None if self.sampled is None else self.sampled[rows, :length],
        )


class Sampler:
    """Turns prompts into tokens and tokens into completions, for one model and its tokenizer.

    model: only its end tokens and its number of positions are read; None if they are not known
    max_new_tokens: length of the longest completion
    Raises ValueError if the tokenizer has neither a pad token nor an end-of-text token.
    """

    def __init__(self, model: nn.Module | None, tokenizer: Any, max_new_tokens: int) -> None:
        self.tokenizer: Any = tokenizer
        self.max_new_tokens: int = max_new_tokens
        self.ends: list[int] = end_tokens(model, tokenizer)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    "the tokenizer has no pad token and no end-of-text token to pad with: set tokenizer.pad_token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        self.pad: int = tokenizer.pad_token_id
        self.limit: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def encode(self, prompts: Sequence[AnyPrompt], device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids, mask), both [B, P] int64, left-padded.

        Raises ValueError for a batch of both texts and chats, and for a prompt without room for `max_new_tokens`.
        """
        rows = encode(self.tokenizer, prompts)
        width = max(map(len, rows))
        if self.limit is not None and width + self.max_new_tokens > self.limit:
            raise InputError(
                f"the longest prompt has {width} tokens, with max_new_tokens={self.max_new_tokens} that is "
                f"{width + self.max_new_tokens}; the model has {self.limit} positions: leave such prompts out, or "
                "lower max_new_tokens"
            )
        ids = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[i, width - len(row) :] = 1
        return ids.to(device), mask.to(device)

    @torch.no_grad()
    def draw(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        temperature: float,
        samples: int = 1,
        cache: Any = None,
        stop: Sequence[str] = (),
        own_settings: bool = False,
        **routing: Tensor,
    ) -> Rollout:
        """Draw completions with `model.generate`, in eval mode.

        ids, mask: [B, P] int64, left-padded prompts; samples: completions of each, side by side
        temperature: 0 is greedy. Raises ValueError if it is negative or not finite
        cache: KV cache of the first tokens of all B * samples rows, or None. It is changed.
        stop: texts that end a completion as well; they stay in it
        own_settings: False: the model's own generation settings (top-k, penalties, ...) do not apply, so that tokens
            have the probabilities that `completion_logits` gives. True: they apply.
        routing: `expert_ids` of `generate`, 0-dim or [B]

        Completions are drawn in stages over one cache. Rows that have ended leave the batch after each stage, so that
        the others do not wait for a few long rows. With `stop` or the model's own settings there is one stage, since
        these depend on where the completion begins. The model is not changed: other threads may use it.
        """
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise InputError(f"temperature={temperature}; expected 0 (greedy) or more")
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        prompts = mask
        routing = {k: v.repeat_interleave(samples, 0) if v.dim() else v for k, v in routing.items()}
        settings: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            settings["temperature"] = float(temperature)
        if not own_settings:
            settings = _settings(model, **settings, **({"top_k": 0, "top_p": 1.0} if temperature > 0 else {}))
        settings |= {"eos_token_id": self.ends or None, "pad_token_id": self.pad}
        settings |= {"use_cache": True, "return_dict_in_generate": True}
        if stop:
            settings |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        whole = bool(stop) or own_settings
        prompt, stage = ids.shape[1], self.max_new_tokens if whole else max(STAGE, self.max_new_tokens // 8)
        out = torch.cat([ids, ids.new_full((len(ids), self.max_new_tokens), self.pad)], 1)
        rows, width = torch.arange(len(ids), device=ids.device), prompt
        with eval_mode(model), contiguous_head(model):
            while len(rows) and width < out.shape[1]:
                settings["max_new_tokens"] = min(stage, out.shape[1] - width)
                known = {} if cache is None else {cache_argument(): cache}
                drawn = model.generate(input_ids=ids, attention_mask=mask, **settings, **known, **routing)
                ids = drawn.sequences
                out[rows, width : ids.shape[1]] = ids[:, width:]
                going = ~self._is_end(ids[:, width:], bool(stop)).any(1)
                width, kept = ids.shape[1], going.nonzero()[:, 0]
                if whole or not len(kept):
                    break
                cache = drawn[cache_argument()]
                mask = torch.cat([mask, mask.new_ones(len(mask), width - mask.shape[1])], 1)
                if len(kept) < len(rows):
                    ids, mask, rows = ids[kept], mask[kept], rows[kept]
                    cache.batch_select_indices(kept)
                    routing = {k: v[kept] if v.dim() else v for k, v in routing.items()}
        ends = self._is_end(out[:, prompt:], bool(stop))
        completion = (ends.cumsum(1) - ends.long() == 0)[:, : width - prompt]  # [B, C], True until after the first end
        mask = torch.cat([prompts, completion.long()], 1)
        return Rollout(out[:, :width], mask, completion)

    def _is_end(self, tokens: Tensor, stopped: bool) -> Tensor:
        """[B, C] bool. After a stop text `generate` pads: then the first pad token ends the row."""
        ends = [*self.ends, self.pad] if stopped else self.ends
        return torch.isin(tokens, torch.tensor(ends, device=tokens.device, dtype=tokens.dtype))

    def decode(self, rollout: Rollout, prompts: Sequence[AnyPrompt]) -> list[Any]:
        """The completions as text without special tokens; as a chat message where the prompt is a chat."""
        return self.read(rollout.completion_ids(), prompts)

    def read(self, ids: Sequence[Sequence[int]], prompts: Sequence[AnyPrompt]) -> list[Any]:
        """`decode` for the token ids of each completion."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [as_completion(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]


def _settings(model: nn.Module, **chosen: Any) -> dict[str, Any]:
    """`chosen`, and the neutral value of every other field of the model's generation config that is set.

    `generate` fills fields that are left open from the model's config. Passing each by name keeps that config unread
    without changing it: another thread may be generating with it.
    """
    own = {k: v for k, v in model.generation_config.to_dict().items() if v is not None and k not in NOT_SETTINGS}
    plain = GenerationConfig().to_dict()
    return {k: NEUTRAL.get(k, plain.get(k)) for k in own if k in plain} | chosen


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), in at least fp32. Temperature 0 (greedy) counts as 1.

    logits: [B, C, vocabulary]
    Returns [B, C, vocabulary].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def completion_logits(model: nn.Module, rollout: Rollout, cache: Any = None, **routing: Any) -> Tensor:
    """[B, C, vocabulary]: the logits that each token of the completion is drawn from.

    cache: KV cache of the first tokens of every row, or None. It is changed.
    routing: `expert_ids` of the forward
    """
    length = rollout.completion.shape[1]
    ids, mask = rollout.ids[:, :-1], rollout.mask[:, :-1]  # nothing follows the last token
    inputs = forward_inputs(model, ids, mask, length, cache)
    with contiguous_head(model):
        return model(**inputs, use_cache=cache is not None, **routing).logits[:, -length:]


def forward_inputs(model: nn.Module, ids: Tensor, mask: Tensor, keep: int, cache: Any = None) -> dict[str, Any]:
    """Arguments of a forward over left-padded tokens.

    ids, mask: [B, S] int64, with the tokens that `cache` holds already
    keep: how many last logits to compute, 0 for all
    """
    known = 0 if cache is None else cache.get_seq_length()
    accepted = forward_arguments(model)
    inputs: dict[str, Any] = {"input_ids": ids[:, known:], "attention_mask": mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
    if "logits_to_keep" in accepted:  # the head is most of the work where the vocabulary is large
        inputs["logits_to_keep"] = keep
    if cache is not None:
        inputs[cache_argument()] = cache
    return inputs


@functools.cache
def cache_argument() -> str:
    """The name of the KV cache in arguments and outputs: "cache", or "past_key_values" before transformers 5.24."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def forward_arguments(model: nn.Module) -> set[str]:
    """The names of the arguments of a model's forward, without what wraps the model."""
    while hasattr(model, "module"):  # DistributedDataParallel
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return set(inspect.signature(type(model).forward).parameters)  # of the class: mixed precision wraps the instance's
