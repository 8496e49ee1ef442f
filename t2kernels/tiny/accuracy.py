"""Accuracy of a model on problems of a built-in task."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from t2kernels import tasks
from t2kernels.tasks import tiny
from t2kernels.tasks.records import Row


@torch.no_grad()
def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    batch: int = 256,
) -> list[str]:
    """Generate a completion for each prompt: greedily at temperature 0, else sampled with torch's global generator."""
    written = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: less padding
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in picked], padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[:, inputs.input_ids.shape[1] :]
        for i, text in zip(picked, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            written[i] = text
    return written


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: Sequence[Row],
    temperature: float = 0.0,
    seed: int = 0,
    begun: str = "",
) -> float:
    """The share of `rows` that the model answers right. Sampling starts from `seed`; torch's generator keeps its state.

    begun: text that is put after every prompt, as the start of its completion
    """
    task = tasks.load(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        written = completions(
            model, tokenizer, [row["prompt"] + begun for row in rows], task.max_new_tokens, temperature
        )
    rewards = task.reward([row["prompt"] for row in rows], written, answer=[row["answer"] for row in rows])
    return sum(reward > 0 for reward in rewards) / len(rewards)


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, float]:
    """The entry of a task in `accuracy.json`.

    n, greedy, sampled, greedy_standard_error (binomial): of its frozen test file. working: greedy accuracy on the first
    1000 rows with the separator after the prompt, which forces the model to write its working.
    """
    rows, separator = tasks.load(name).split("test"), next(tiny.problems(name, "test", 0)).separator
    greedy, sampled = (accuracy(model, tokenizer, name, rows, temperature) for temperature in (0.0, 1.0))
    working = accuracy(model, tokenizer, name, rows[:1000], begun=separator)
    error = math.sqrt(greedy * (1 - greedy) / len(rows))
    found = {"greedy": greedy, "sampled": sampled, "working": working, "greedy_standard_error": error}
    return {"n": len(rows), **{name: round(value, 4) for name, value in found.items()}}
