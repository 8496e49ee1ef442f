"""The likelihood of a few fixed texts after a prompt, without decoding: labels of a question, options of a task.

log p(option | prompt) = Σ_t log p(token_t | prompt, tokens before t)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError

from .chat import AnyPrompt, render
from .generation import log_probs
from .prefix import common_start, forward, hoist, left_padded, prefill, window_of

MEMORY = 2**28
"""Bytes of fp32 logits of a batch of options. Larger batches were not faster on a CPU."""
NORMS: tuple[str, ...] = ("sum", "length")


def encode_labels(tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """The token ids of each label, without special tokens."""
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]


def split_labels(labels: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """(the tokens that all labels start with, the rest of each label). At least one token stays in each rest.

    The common tokens do not tell the labels apart, so they can be read as part of the prompt.
    """
    common = common_start(labels, min(map(len, labels)) - 1)
    return list(labels[0][:common]), [list(label[common:]) for label in labels]


def encode_options(
    tokenizer: Any, prompts: Sequence[AnyPrompt], options: Sequence[Sequence[str]]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and their options in tokens, cut where the tokenizer cuts.

    A text gets a space before the option, unless it ends in white space; a chat gets the option as the beginning of the
    assistant's answer. Prompt and option are tokenized together. The context is what the prompt alone and with each of
    its options start with, so a token that an option changes at the end of the prompt belongs to the options.

    prompts: [B] texts or chats; options: [B] lists of texts
    Returns (contexts: [B] lists of ids; continuations: [B] lists of lists of ids, none of them empty).
    Raises ValueError for a prompt without options, an empty option, and a prompt without tokens.
    """
    texts, special = render(tokenizer, prompts)
    joined: list[str] = []
    for i, (text, some) in enumerate(zip(texts, options, strict=True)):
        if not len(some) or not all(isinstance(option, str) and option.strip() for option in some):
            raise InputError(f"the options of prompt {i} are {list(some)!r:.80}; wanted texts that are not empty")
        gap = " " if special and text[-1:].strip() else ""
        joined += [text, *(text + gap + option.strip() for option in some)]
    ids = tokenizer(joined, add_special_tokens=special)["input_ids"] if joined else []
    contexts, continuations, start = [], [], 0
    for i, some in enumerate(options):
        alone, *wholes = ids[start : start + 1 + len(some)]
        start += 1 + len(some)
        common = common_start([alone, *wholes], min(len(alone), *(len(whole) - 1 for whole in wholes)))
        if not common:
            raise InputError(f"prompt {i} is {texts[i]!r:.40}: wanted at least one token before its options")
        contexts.append(list(alone[:common]))
        continuations.append([list(whole[common:]) for whole in wholes])
    return contexts, continuations


def normalised(sums: Tensor, options: Sequence[str], norm: str) -> Tensor:
    """Log-likelihoods of options in the form in which they are compared.

    sums: [L] log p(option | prompt), nats; options: L texts
    norm: "sum": as they are; "length": divided by the characters of the option, as lm-eval's acc_norm
    Returns [L]. Raises ValueError for another norm.
    """
    if norm not in NORMS:
        raise InputError(f"norm={norm!r}; wanted {' or '.join(map(repr, NORMS))}")
    return sums if norm == "sum" else sums / torch.tensor([len(o) for o in options], dtype=sums.dtype).to(sums.device)


def likeliest(sums: Tensor, options: Sequence[str], norm: str) -> str:
    """The option of the largest log-likelihood, as `normalised` compares them; of equals the first.

    Arguments and errors as of `normalised`.
    """
    return options[int(normalised(sums, options, norm).argmax())]


def equally_sharp(scores: Tensor, share: float = 0.5) -> Tensor:
    """softmax(scores / T) for each of several readers, T so that all are equally sure of their choices.

    T: the mean entropy over the prompts is `share` of its largest value, that of equal probabilities. T changes no
    choice, and a reader gains nothing by being bolder or more timid. No answer is used.

    scores: [P, K, L], of P readers, K prompts and L options, -inf where a prompt has fewer
    Returns [P, K, L] fp32.
    """
    scores = scores.float()
    there = scores.isfinite()
    wanted = share * there.sum(-1).float().log().mean(-1)
    low, high = torch.full_like(wanted, -12.0), torch.full_like(wanted, 12.0)  # log T
    for _ in range(40):
        middle = (low + high) / 2
        p = (scores / middle.exp()[:, None, None]).softmax(-1)
        sure = -torch.special.xlogy(p, p).sum(-1).mean(-1) < wanted
        low, high = torch.where(sure, middle, low), torch.where(sure, high, middle)
    return (scores / high.exp()[:, None, None]).softmax(-1)


def option_log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[AnyPrompt],
    options: Sequence[Sequence[str]],
    expert_ids: Tensor | None = None,
    memory: float = MEMORY,
) -> list[Tensor]:
    """log p(option | prompt) of every option of every prompt, in nats.

    prompts: [B]; options: [B] lists of texts, which may be of different lengths
    expert_ids: [B] int32, the table row that reads each prompt; None: the model as it is, which need not be patched
    memory: bytes of the logits of a batch
    Returns B tensors [L_i], fp32 or wider, on the CPU. Raises as `encode_options`.

    A batch costs one forward over its contexts and one short forward over the options on the same cache, if one of them
    has more than one token. A common prefix of the contexts is read once for each expert.
    """
    contexts, continuations = encode_options(tokenizer, prompts, options)
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    out: list[Tensor] = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (max(map(len, continuations[i])), len(contexts[i])))
    while order:
        # The last are the longest: as many as fit beside the longest of them.
        count, rows, longest = 0, 0, max(map(len, continuations[order[-1]]))
        while count < len(order):
            rows += len(continuations[order[-1 - count]])
            if count and rows * longest * vocabulary * 4 > memory:
                break
            count += 1
        part, order = order[-count:], order[:-count]
        ids, mask = left_padded([contexts[i] for i in part], device)
        routed = None if expert_ids is None else expert_ids[part]
        for i, found in zip(part, _score(model, ids, mask, [continuations[i] for i in part], routed), strict=True):
            out[i] = found.cpu()
    return out


def label_log_likelihoods(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Sequence[Sequence[int]], row: Tensor
) -> Tensor:
    """log p(label | prompt), without the log-likelihood of the tokens that all labels start with.

    ids: [B, S] int64, prompts, left-padded; mask: [B, S] int64, 1 for a token
    labels: L lists of token ids; row: 0-dim int32, the table row of the expert that reads
    Returns [B, L] fp32.

    Costs one forward over the prompts, plus one over their common prefix if they have one, plus one short forward over
    the same cache if a label has more than one token of its own.
    """
    shared, rest = split_labels(labels)
    common = torch.tensor(shared, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    ids, mask = torch.cat([ids, common], 1), torch.cat([mask, mask.new_ones(common.shape)], 1)
    return torch.stack(_score(model, ids, mask, [rest] * len(ids), row.expand(len(ids))))


@torch.no_grad()
def _score(
    model: nn.Module, ids: Tensor, mask: Tensor, options: Sequence[Sequence[Sequence[int]]], expert_ids: Tensor | None
) -> list[Tensor]:
    """The summed log-probability of each option of each row. ids, mask: [B, S], left-padded; options: [B] lists."""
    counts = torch.tensor([len(some) for some in options])
    flat = [option for some in options for option in some]
    longest = max(map(len, flat))
    prefix, ids, mask = hoist(ids, mask, window_of(model) - longest)
    owner = torch.arange(len(options)).repeat_interleave(counts)  # [sum L], the row of each option
    first = torch.tensor([option[0] for option in flat]).to(ids.device)
    at = owner.to(ids.device)
    with model.t2_bank.routing.hold(None) if expert_ids is not None else contextlib.nullcontext():
        readers, reader = None, torch.zeros_like(ids[:, 0])
        route: dict[str, Tensor] = {}
        each: dict[str, Tensor] = {}
        if expert_ids is not None:
            readers, reader = expert_ids.unique(return_inverse=True)
            route, each = {"expert_ids": expert_ids}, {"expert_ids": expert_ids[at]}
        cache = prefill(model, prefix, readers, 1)
        if cache is not None:
            cache.batch_select_indices(reader)
        logits, cache = forward(model, ids, mask, cache, keep=1, **route)
        sums = log_probs(logits[:, -1])[at, first]
        if longest > 1:
            tokens = torch.zeros(len(flat), longest, dtype=ids.dtype)
            for i, option in enumerate(flat):
                tokens[i, : len(option)] = torch.tensor(option)
            there = (torch.arange(longest) < torch.tensor([[len(option)] for option in flat])).to(ids.device)
            tokens = tokens.to(ids.device)
            cache.batch_select_indices(at)
            mask = torch.cat([mask[at], there[:, :-1].to(mask)], 1)
            logits, _ = forward(model, torch.cat([ids[at], tokens[:, :-1]], 1), mask, cache, **each)
            more = log_probs(logits).gather(-1, tokens[:, 1:, None])[..., 0]
            sums = sums + torch.where(there[:, 1:], more, 0).sum(1)
    return list(sums.split(counts.tolist()))
