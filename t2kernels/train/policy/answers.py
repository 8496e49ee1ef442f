"""Right answers in the place of completions: REINFORCE with advantage 1 on them is supervised training.

loss = -Σ_i weights_i Σ_t log p(token_t of answer i | prompt i, tokens before t)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.rollout.generation import Rollout, Sampler
from t2kernels.rollout.labels import encode_options


def right_answers(sampler: Sampler, rows: Sequence[Mapping[str, Any]], device: torch.device) -> Rollout:
    """The answers of the rows as completions, each with the end token, and with advantage 1.

    rows: [B] dicts with a prompt and a column "answer". A text gets a space before its answer, unless it ends in white
        space; a chat gets the answer as the assistant's
    Raises InputError for a row whose answer is missing, empty, or longer than `sampler.max_new_tokens`.
    """
    answers = [str(row.get("answer") or "") for row in rows]
    if not all(text.strip() for text in answers):
        at = next(i for i, text in enumerate(answers) if not text.strip())
        raise InputError(
            f"the prompt {str(rows[at]['prompt'])!r:.60} has no right answer to train on: wanted a text in the column "
            "'answer'"
        )
    prompts = [row["prompt"] for row in rows]
    contexts, found = encode_options(sampler.tokenizer, prompts, [[text] for text in answers])
    end = sampler.tokenizer.eos_token_id
    tokens = [options[0] + ([] if end is None else [end]) for options in found]
    if (longest := max(map(len, tokens))) > sampler.max_new_tokens:
        raise InputError(
            f"a right answer has {longest} tokens, and max_new_tokens is {sampler.max_new_tokens}: raise it, or leave "
            "the row out"
        )
    ids, mask = _padded(contexts, sampler.pad, left=True)
    answer, there = _padded(tokens, sampler.pad, left=False)
    return Rollout(
        torch.cat([ids, answer], 1).to(device),
        torch.cat([mask, there], 1).long().to(device),
        there.to(device),
        advantages=torch.ones(len(rows), dtype=torch.float32, device=device),
        experts=[row.get("expert") for row in rows],
    )


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """(ids [B, longest] int64; [B, longest] bool, True for a token)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    there = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span], there[i, span] = torch.tensor(row), True
    return ids, there
