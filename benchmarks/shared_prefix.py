"""What does it save to read once what the rows of a training step start with? Seconds of a step, in turn.

    python benchmarks/shared_prefix.py

SmolLM2-135M-Instruct and one expert in training. A step is the log-probabilities of a batch and their backward pass,
with `share_prefix` and without, in turn; a ratio is the median of run-by-run ratios. Batches:

- tickets: 32 of the package's support tickets, whose four labels are compared; their instruction is common
- group: 4 random prompts of 128 tokens with 8 completions of 32 tokens each; the completions of a prompt share it

Before anything is timed, log-probabilities and gradients of both ways are compared. Rows are appended to
benchmarks/results/shared_prefix.jsonl.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from measure import RESULTS, append, interleaved, machine, require
from rich.console import Console
from rich.table import Table
from torch import nn

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.cli import models
from t2kernels.rollout.chat import prompt_form
from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.labels import encode_options
from t2kernels.train.policy.scores import TokenScorer
from t2kernels.train.policy.shared import divide

ALLOWED = 1e-3  # of both, in fp32


def tickets(loaded: models.Loaded) -> Rollout:
    """Prompts with the first option as their completion: a batch as `SVFTrainer` makes it of single tokens."""
    task = prompt_form(loaded.tokenizer, task=(made := tasks.classification(tiny.tickets()))).of_task(made)
    rows = task.split("train", 32)
    prompts, options = encode_options(loaded.tokenizer, [r["prompt"] for r in rows], [task.options(r) for r in rows])
    return Rollout.of(prompts, [some[0][:1] for some in options], 0)


def group(prompts: int = 4, each: int = 8, length: int = 128, answer: int = 32, vocabulary: int = 40000) -> Rollout:
    """Random prompts of `length` tokens, each with so many completions of `answer` tokens."""
    starts = torch.randint(3, vocabulary, (prompts, length)).tolist()
    completions = torch.randint(3, vocabulary, (prompts * each, answer)).tolist()
    return Rollout.of([start for start in starts for _ in range(each)], completions, 0)


def step(model: nn.Module, scorer: TokenScorer, batch: Rollout, parameters: list) -> torch.Tensor:
    """Log-probabilities and gradients, as one vector."""
    found = scorer.score(model, batch, {"expert_ids": model.t2_bank.ids("new")}).log_probs
    gradients = torch.autograd.grad(found.mean(), parameters)
    return torch.cat([found.detach().flatten(), *(g.flatten() for g in gradients)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "shared_prefix.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    loaded = models.load("smollm2")
    model = loaded.model.requires_grad_(False)
    parameters = t2.patch_model(model).start_training("new")
    scorers = {way: TokenScorer(2**28, 1.0, "reverse", share=way == "shared") for way in ("whole", "shared")}
    facts, shown = machine(("torch", "transformers")), Table("batch", "tokens", "read", "s", "s, shared", "ratio")
    for name, batch in (("tickets", tickets(loaded)), ("group", group())):
        run = {way: functools.partial(step, model, scorer, batch, parameters) for way, scorer in scorers.items()}
        whole, shared = (once() for once in run.values())
        error = require(f"{name}: numbers and gradients", ((shared - whole).norm() / whole.norm()).item(), ALLOWED)
        times = interleaved(run, args.repeats, warmup=0)
        divided = divide(batch, [0] * len(batch))
        assert divided is not None
        row = {
            "batch": name,
            "rows": len(batch),
            "tokens": batch.mask[:, :-1].numel(),
            "tokens_read": divided.prefixes.numel() + divided.whole.ids[:, divided.prefixes.shape[1] : -1].numel(),
            "whole_s": round(times["whole"].median, 3),
            "shared_s": round(times["shared"].median, 3),
            "ratio": round(times["shared"].ratio, 3),
            "repeats": args.repeats,
            "error": error,
        }
        append(args.out, row | facts)
        shown.add_row(name, *(str(row[key]) for key in ("tokens", "tokens_read", "whole_s", "shared_s", "ratio")))
    Console().print(shown)


if __name__ == "__main__":
    main()
