"""What does a training step of a real model cost, in turn with a step of PEFT LoRA: seconds, and peak memory?

    python benchmarks/training_turns.py HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/training_turns.py FOLDER --dtype bfloat16 --threads 1
    python benchmarks/training_turns.py mid                          # a random Llama of `subjects.SIZES`

A step is forward, backward and AdamW on the cross-entropy of the same tokens. z of the first R/16 in delta form and
LoRA of rank 16 train on the same frozen weights, in the model's own dtype. A ratio is the median of run-by-run ratios,
with the middle half beside it. Before anything is timed, dz of a row is compared with that of the model in fp64. The
peak of memory is that of a process of its own for each arm. Rows are appended to
benchmarks/results/training_turns.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import subjects
import torch
from measure import RESULTS, append, machine, peak, require, reset_peak, show, timing
from real_decode import sharing
from rich.table import Table
from torch import Tensor, nn
from training import loss_of
from transformers import AutoModelForCausalLM

import t2kernels as t2

ARMS = {"lora": "PEFT LoRA r=16", "svf": "SVF, R/16"}
ALLOWED = {"float32": 1e-3, "bfloat16": 0.2}


class Arm:
    """A model in training. seconds: forward, backward and optimiser of each step."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, **routing: str) -> None:
        self.model, self.parameters, self.ids, self.routing = model.train(), parameters, ids, routing
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-4)
        self.seconds: list[tuple[float, ...]] = []

    def step(self) -> float:
        self.optimiser.zero_grad()
        at = [time.perf_counter()]
        loss = loss_of(self.model, self.ids, **self.routing)
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        self.optimiser.step()
        at.append(time.perf_counter())
        self.seconds.append(tuple(b - a for a, b in itertools.pairwise(at)))
        return loss.item()


def build(args: argparse.Namespace, names: list[str]) -> dict[str, Arm]:
    """The arms, on the same weights."""
    torch.manual_seed(0)
    dtype, factors = getattr(torch, args.dtype), args.factors
    if args.model in subjects.SIZES:
        _, dense, factors, *_ = subjects.load(args.model, 1, rank=1 / 16, dtype=dtype)
    else:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).requires_grad_(False)
    ids, found = torch.randint(2, dense.config.vocab_size, tuple(args.batch)), {}
    for name in names:
        model = sharing(dense)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if name == "svf":
            bank = t2.patch_model(model, form="delta", rank=1 / 16, rows=4, factors=factors)
            found[name] = Arm(model, bank.start_training("new"), ids, experts="new")
            continue
        config = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        lora = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        if args.checkpointing:
            model.enable_input_require_grads()
        found[name] = Arm(lora, [p for p in lora.parameters() if p.requires_grad], ids)
    return found


def check(arm: Arm, dtype: str) -> float:
    """The relative error of dz of one row of tokens against the same model in fp64."""
    ids, grads = arm.ids[:1, :32], []
    for model in (arm.model, copy.deepcopy(arm.model).double()):
        parameters = list(model.t2_bank.trained_parameters("new").values())
        grads.append(
            torch.cat([g.double() for g in torch.autograd.grad(loss_of(model, ids, **arm.routing), parameters)])
        )
    return require("dz", ((grads[0] - grads[1]).norm() / grads[1].norm()).item(), ALLOWED[dtype])


def memory(args: argparse.Namespace) -> dict[str, int]:
    """The peak of a step beyond the model, for the one arm of this process."""
    (arm,) = build(args, [args.one]).values()
    before = reset_peak(torch.device("cpu"))
    for _ in range(2):
        arm.step()
    return {"peak_over_before_bytes": peak(torch.device("cpu")) - before}


def memory_apart(args: argparse.Namespace, name: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, *sys.argv, "--one", name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder, or a name of `subjects.SIZES`")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs=2, default=[4, 128], help="rows, tokens")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--factors", help="folder of `t2 decompose`; default: computed now")
    parser.add_argument("--one", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_turns.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(memory(args)))
        return
    peaks = {name: memory_apart(args, name) for name in ARMS}
    arms = build(args, list(ARMS))
    error = check(arms["svf"], args.dtype)
    losses: dict[str, float] = {}
    for i in range(args.repeats + 1):
        for name, arm in arms.items():
            losses[name] = arm.step()
            if i == 0:
                arm.seconds.clear()
    times = timing({name: [sum(s) for s in arm.seconds] for name, arm in arms.items()})
    columns = "arm", "a step", "over LoRA", "forward", "backward", "optimiser", "memory beyond the model"
    table = Table(*columns, title=f"{args.model}, {args.dtype}")
    facts: dict[str, Any] = machine(("torch", "transformers", "peft"))
    for name, arm in arms.items():
        parts = [sorted(p)[len(p) // 2] for p in zip(*arm.seconds, strict=True)]
        row = {"model": args.model, "dtype": args.dtype, "batch": args.batch, "checkpointing": args.checkpointing}
        row |= {"arm": ARMS[name], "step_s": times[name].median, "ratio": times[name].ratio}
        row |= dict(zip(("forward_s", "backward_s", "optimiser_s"), parts, strict=True)) | peaks[name]
        row |= {"numbers": sum(p.numel() for p in arm.parameters), "loss": losses[name], "error": error}
        append(args.out, row | facts)
        table.add_row(
            ARMS[name], f"{1e3 * row['step_s']:.0f} ms", f"{row['ratio']:.3f}", *(f"{1e3 * p:.0f} ms" for p in parts),
            f"{row['peak_over_before_bytes'] / 1e6:.0f} MB",
        )  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
