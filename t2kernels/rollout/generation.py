"""Completions of a model: drawn with its KV cache, then scored in one forward with gradients."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

STAGE = 8  # tokens: few enough that little is drawn for rows that have ended, enough that the set-up of `generate` stays small beside it


@dataclass
class Rollout:
    """Prompts, left-padded to P tokens, and their completions, right-padded to C.

    ids: [B, P + C] int64; mask: [B, P + C] int64, 1 for prompt and completion; completion: [B, C] bool, up to the end of text, which counts
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor
    advantages: Tensor | None = None  # [B]
    weights: Tensor | None = None  # [B]
    experts: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> Tensor:
        """[B, C], the completions."""
        return self.ids[:, -self.completion.shape[1] :]

    def split(self, size: int | None) -> list[Rollout]:
        """Pieces of at most `size` rows, the shortest first, each without the columns that are padding in all of it."""
        order = self.mask.sum(1).argsort(stable=True)
        size, prompt = size or len(self), self.ids.shape[1] - self.completion.shape[1]
        pieces = []
        for rows in order.split(size):
            left = int(self.mask[rows].any(0).int().argmax())
            length = int(self.completion[rows].any(0).sum())
            cut = slice(left, prompt + length)
            pieces.append(
                Rollout(
                    self.ids[rows, cut],
                    self.mask[rows, cut],
                    self.completion[rows, :length],
                    None if self.advantages is None else self.advantages[rows],
                    None if self.weights is None else self.weights[rows],
                    [self.experts[i] for i in rows.tolist()] if self.experts else (),
                )
            )
        return pieces


class Sampler:
    """Prompts to tokens, tokens to completions, for one model and its tokenizer.

    Raises ValueError if the tokenizer has neither a pad nor an end-of-text token.
    """

    def __init__(self, model: nn.Module, tokenizer, max_new_tokens: int):
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self.ends = list(dict.fromkeys(e for e in ends if e is not None))
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "the tokenizer has no pad token and no end-of-text token to pad with: set tokenizer.pad_token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        self.pad = tokenizer.pad_token_id
        self.limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def encode(self, prompts: Sequence, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids, mask), both [B, P] int64, left-padded. A prompt is text or a chat, which goes through the tokenizer's template."""
        chats = [not isinstance(p, str) for p in prompts]
        if any(chats) and not all(chats):
            raise ValueError("some prompts of this batch are text and some are chats: use one of the two throughout")
        texts = [
            self.tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) if chat else p
            for p, chat in zip(prompts, chats, strict=True)
        ]
        # A chat template writes its own special tokens.
        encoded = self.tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not any(chats),
            return_attention_mask=True,
            return_tensors="pt",
        )
        longest = encoded["input_ids"].shape[1] + self.max_new_tokens
        if self.limit is not None and longest > self.limit:
            raise ValueError(
                f"the longest prompt has {encoded['input_ids'].shape[1]} tokens, with max_new_tokens={self.max_new_tokens} that is {longest}; "
                f"the model has {self.limit} positions: leave such prompts out, or lower max_new_tokens"
            )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    @torch.no_grad()
    def draw(
        self, model: nn.Module, ids: Tensor, mask: Tensor, temperature: float, samples: int = 1, cache=None, **routing
    ) -> Rollout:
        """Completions by `model.generate`; temperature 0 is greedy. The model's own generation settings (top-k, penalties, ...) do not apply:
        what is drawn must be what `completion_logits` gives the probabilities of.

        cache: keys and values of the first tokens of every row, if they are known; B * samples rows. It is changed.
        Drawn in stages over one cache: rows that have ended leave the batch after each, so that a few long ones do not hold up the rest.
        """
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        prompts = mask
        routing = {k: v.repeat_interleave(samples, 0) if v.dim() else v for k, v in routing.items()}
        sampling = (
            {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False}
        )
        prompt, stage = ids.shape[1], max(STAGE, self.max_new_tokens // 8)
        out = torch.cat([ids, ids.new_full((len(ids), self.max_new_tokens), self.pad)], 1)
        rows, width = torch.arange(len(ids), device=ids.device), prompt
        training = model.training
        model.eval()
        try:
            while len(rows) and width < out.shape[1]:
                step = min(stage, out.shape[1] - width)
                plain = GenerationConfig(
                    max_new_tokens=step, eos_token_id=self.ends or None, pad_token_id=self.pad, **sampling
                )
                with _generation_config(model, plain):
                    known = {kept_as(): cache}
                    drawn = model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        use_cache=True,
                        return_dict_in_generate=True,
                        **known,
                        **routing,
                    )
                ids, cache = drawn.sequences, drawn[kept_as()]
                out[rows, width : ids.shape[1]] = ids[:, width:]
                going = ~self._ends(ids[:, width:]).any(1)
                width = ids.shape[1]
                mask = torch.cat([mask, mask.new_ones(len(mask), width - mask.shape[1])], 1)
                kept = going.nonzero()[:, 0]
                if len(kept) < len(rows) and len(kept):
                    ids, mask, rows = ids[kept], mask[kept], rows[kept]
                    cache.batch_select_indices(kept)
                    routing = {k: v[kept] if v.dim() else v for k, v in routing.items()}
                elif not len(kept):
                    break
        finally:
            model.train(training)
        ends = self._ends(out[:, prompt:])
        completion = (ends.cumsum(1) - ends.long() == 0)[:, : width - prompt]  # [B, C], nothing ended before
        mask = torch.cat([prompts, completion.long()], 1)
        return Rollout(out[:, :width], mask, completion)

    def _ends(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(self.ends, device=tokens.device, dtype=tokens.dtype))

    def decode(self, rollout: Rollout, prompts: Sequence) -> list:
        """The completions as text without special tokens; as a chat message where the prompt is a chat."""
        lengths = rollout.completion.sum(1).tolist()
        return self.read([row[:n] for row, n in zip(rollout.tokens.tolist(), lengths, strict=True)], prompts)

    def read(self, ids: Sequence[Sequence[int]], prompts: Sequence) -> list:
        """`decode` of the tokens of each completion."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            t if isinstance(p, str) else [{"role": "assistant", "content": t}]
            for t, p in zip(texts, prompts, strict=True)
        ]


@contextlib.contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig):
    """`generate` fills what a given config leaves open from the model's own; so the model's own is put aside."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def completion_logits(model: nn.Module, rollout: Rollout, cache=None, **routing) -> Tensor:
    """[B, C, vocabulary]: the logits that each completion token was, or would have been, drawn from.

    cache: keys and values of the first tokens of every row, if they are known. It is changed.
    """
    ids, mask, length = (
        rollout.ids[:, :-1],
        rollout.mask[:, :-1],
        rollout.completion.shape[1],
    )  # nothing follows the last token
    inputs = forward_inputs(model, ids, mask, length, cache)
    return model(**inputs, use_cache=cache is not None, **routing).logits[:, -length:]


def forward_inputs(model: nn.Module, ids: Tensor, mask: Tensor, keep: int, cache=None) -> dict:
    """What a forward is given for left-padded tokens [B, S] of which `cache` may hold the first; logits of the last `keep` tokens, 0: of all."""
    known = 0 if cache is None else cache.get_seq_length()
    accepted = _forward_arguments(model)
    inputs = {"input_ids": ids[:, known:], "attention_mask": mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
    if "logits_to_keep" in accepted:  # the head is most of the work where the vocabulary is large
        inputs["logits_to_keep"] = keep
    if cache is not None:
        inputs[kept_as()] = cache
    return inputs


@functools.cache
def kept_as() -> str:
    """What this transformers calls keys and values that are kept, as an argument and in outputs: "cache", or "past_key_values" before 5.24."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def _forward_arguments(model: nn.Module) -> set[str]:
    while hasattr(model, "module"):  # DistributedDataParallel
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return set(inspect.signature(type(model).forward).parameters)  # of the class: mixed precision wraps the instance's
