"""`Strategy`: prompts in, an expert for each of them out (Transformer², arXiv 2501.06252, section 3.2: the first of two passes)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2kernels.experts.names import Name
from t2kernels.rollout.generation import Sampler


class Strategy:
    """Base of all strategies. `model.generate(**batch, experts=strategy)` lets it choose; `choose` does the same for texts.

    model: patched; tokenizer: the model's. Raises ValueError for a model that is not patched, or a tokenizer that cannot pad.
    """

    batch = 256  # prompts of one forward of the first pass

    def __init__(self, model: nn.Module, tokenizer, max_new_tokens: int = 16):
        if getattr(model, "t2_bank", None) is None:
            raise ValueError("the model is not patched: bank = t2kernels.patch_model(model) first")
        self.model, self.bank, self.sampler = model, model.t2_bank, Sampler(model, tokenizer, max_new_tokens)

    def choose(self, prompts: Sequence) -> list[Name]:
        """For each prompt, text or chat: the name of an expert in the bank, None (the base model), or a mixture {name: weight}."""
        out: list[Name] = []
        for start in range(0, len(prompts), self.batch):
            out += self.choose_batch(prompts[start : start + self.batch])
        return out

    def choose_batch(self, prompts: Sequence) -> list[Name]:
        """`choose` for as many prompts as fit into one forward; what a strategy implements."""
        raise NotImplementedError

    def choose_for(self, model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None) -> list[Name]:
        """`choose` for the tokens that `generate` was given. Raises ValueError without tokens, or on another model."""
        if getattr(model, "t2_bank", None) is not self.bank:
            raise ValueError("this strategy was made for another model: it names experts of that model's bank")
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError(
                "a strategy chooses by the prompt: generate needs input_ids [B, S] with it, not inputs_embeds alone"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [row[there.bool()] for row, there in zip(input_ids, mask, strict=True)]
        return self.choose(self.sampler.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def _in_bank(self, names: Sequence[str | None], what: str) -> None:
        missing = sorted({n for n in names if n is not None and n not in self.bank})
        if missing:
            raise ValueError(
                f"{what} {', '.join(map(repr, missing))}: no such expert in the bank, which has {self.bank.names or 'none yet'}"
            )
