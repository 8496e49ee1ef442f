"""`Strategy`: prompts in, the expert of each out (arXiv 2501.06252, section 3.2: the first of two passes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.names import Name
from t2kernels.rollout.chat import AnyPrompt
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.patched import bank_of


class Strategy:
    """Base class. `model.generate(**batch, experts=strategy)` lets it choose; `choose` does the same for texts.

    model: patched; tokenizer: the model's; max_new_tokens: of an answer that the strategy reads
    readers: the experts that read prompts for the strategy; each takes a row of the bank during the first pass
    batch: prompts of one forward of the first pass
    Raises ValueError for a model that is not patched, or a tokenizer that cannot pad.
    """

    batch: int = 256
    readers: Sequence[str | None] = ()

    def __init__(self, model: nn.Module, tokenizer: Any, max_new_tokens: int = 16) -> None:
        self.model: nn.Module = model
        self.bank: ExpertBank = bank_of(model)
        self.sampler: Sampler = Sampler(model, tokenizer, max_new_tokens)

    def choose(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """The choice for each prompt: the name of an expert in the bank, None (the base model), or {name: weight}."""
        out: list[Name] = []
        for start in range(0, len(prompts), self.batch):
            out += self.choose_batch(prompts[start : start + self.batch])
        return out

    def choose_batch(self, prompts: Sequence[AnyPrompt]) -> list[Name]:
        """`choose` for the prompts of one forward. Subclasses implement this."""
        raise NotImplementedError

    def choose_for(self, model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None) -> list[Name]:
        """`choose` for the tokens that `generate` was given. Raises ValueError without tokens, or on another model.

        input_ids, attention_mask: [B, S]
        """
        if getattr(model, "t2_bank", None) is not self.bank:
            raise InputError("this strategy was made for another model: it names experts of that model's bank")
        if input_ids is None or input_ids.dim() != 2:
            raise InputError(
                "a strategy chooses by the prompt: generate needs input_ids [B, S] with it, not inputs_embeds alone"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [row[there.bool()] for row, there in zip(input_ids, mask, strict=True)]
        return self.choose(self.sampler.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def check_in_bank(self, names: Sequence[str | None], what: str) -> None:
        """Raise ValueError if an expert is not in the bank. what: how the error begins."""
        missing = sorted({n for n in names if n is not None and n not in self.bank})
        if missing:
            raise InputError(
                f"{what} {', '.join(map(repr, missing))}: no such expert in the bank, which has "
                f"{self.bank.names or 'none yet'}"
            )


def bank_names(experts: Sequence[str] | Mapping[str, str]) -> list[str]:
    """The names in the bank of the experts that a maker was given (see `make_strategy`)."""
    return list(experts.values()) if isinstance(experts, Mapping) else list(experts)
