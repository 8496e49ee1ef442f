"""What does a training step cost, beside PEFT LoRA at the same batch: seconds, peak memory, and what the optimiser
keeps?

    python benchmarks/training.py

One step is forward, backward and AdamW on the cross-entropy of the same tokens. Arms: z of every component and of the
first R/16, in delta form, and LoRA of rank 16 on the same layers. z's gradient is compared with a finite difference of
the loss in fp64 first; each arm runs in a process of its own, so that the peak of memory is its own. Rows are appended
to benchmarks/results/training.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import subjects
import torch
from measure import RESULTS, able, append, machine, peak, require, reset_peak, show, wait
from rich.table import Table

import t2kernels as t2

ARMS = {
    "SVF, every component": ("delta", None),
    "SVF, R/16": ("delta", 1 / 16),
    "SVF factored": ("factored", None),
    "PEFT LoRA r=16": None,
}
BATCH = {"nano": (2, 8), "tiny": (32, 64), "mid": (4, 128), "llama-3-8b": (4, 1024)}


def loss_of(model, ids, **routing) -> torch.Tensor:
    logits = model(input_ids=ids, **routing).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def one(name: str, arm: str, dtype, device, seconds: float) -> dict:
    torch.manual_seed(0)
    batch, length = BATCH[name]
    s = subjects.load(name, batch, length, ARMS[arm][1] if ARMS[arm] else 1, dtype, device)
    ids = torch.randint(2, s.model.config.vocab_size, (batch, length), device=device)
    model, routing, error = s.model, {}, None
    if ARMS[arm]:
        form, rank = ARMS[arm]
        bank = t2.patch_model(model, form=form, rank=rank, rows=4, factors=s.factors)
        parameters, routing = bank.start_training("new"), {"experts": "new"}
        if dtype == torch.float32:
            error = gradient_error(bank, model, parameters, ids)
    else:
        import peft

        config = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        optimiser.zero_grad()
        loss = loss_of(model, ids, **routing)
        loss.backward()
        optimiser.step()
        return loss.item()

    before = reset_peak(device)
    losses, times, begun = [step()], [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        losses.append(step())
        wait(device)
        times.append(time.perf_counter() - start)
    after = peak(device)
    return {
        "subject": name,
        "arm": arm,
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "numbers": sum(p.numel() for p in parameters),
        "step_s": statistics.median(times),
        "low_s": min(times),
        "steps": len(times),
        "optimiser_bytes": sum(
            t.nbytes for state in optimiser.state.values() for t in state.values() if torch.is_tensor(t)
        ),
        "peak_over_before_bytes": after - before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "error": error,
    }


def gradient_error(bank, model, parameters, ids) -> float:
    """dloss along a random direction of z, against a central difference; both in the model's fp32, so a part in a
    thousand is rounding."""
    ids = ids[:1]
    direction = [torch.randn_like(p) for p in parameters]
    grads = torch.autograd.grad(loss_of(model, ids, experts="new"), parameters)
    slope = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
    losses = []
    step = 2e-3
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * step * d)
            losses.append(loss_of(model, ids, experts="new").double().item())
        for p, d in zip(parameters, direction, strict=True):
            p.add_(step * d)
    found = (losses[0] - losses[1]) / (2 * step)
    return require("gradient of z against a finite difference", abs(slope - found) / max(abs(found), 1e-2), 0.05)


def run(
    device: torch.device, quick: bool = False, only: list[str] | None = None, report: Callable[[str], None] = print
) -> Iterator[dict]:
    for name in only or (["llama-3-8b"] if device.type == "cuda" else ["tiny", "mid"]):
        for arm in [a for a in able(list(ARMS), report) if not quick or a != "SVF factored"]:
            report(f"training: {name}, {arm}")
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, arm, "--seconds", "3" if quick else "10"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"training, {name}, {arm} failed: {done.stderr[-2000:]}")
            yield json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> Table:
    out = Table(
        "model",
        "arm",
        "numbers",
        "a step",
        "over LoRA",
        "optimiser",
        "memory beyond the model",
        title="a training step",
    )
    for r in rows:
        peer = next((p for p in rows if p["subject"] == r["subject"] and p["arm"].startswith("PEFT")), r)
        size = f"{r['optimiser_bytes'] / 1e6:.2f} MB", f"{r['peak_over_before_bytes'] / 1e6:.0f} MB"
        out.add_row(
            r["subject"],
            r["arm"],
            f"{r['numbers']:,}",
            f"{1e3 * r['step_s']:.0f} ms",
            f"{r['step_s'] / peer['step_s']:.2f}x",
            *size,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(BATCH))
    parser.add_argument("--one", nargs=2, metavar=("SUBJECT", "ARM"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="what `make bench` runs")
    parser.add_argument("--seconds", type=float, default=10.0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "training.jsonl")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.one:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        print(json.dumps(one(*a.one, dtype, device, a.seconds)))
        return
    facts, rows = machine(("torch", "transformers", "peft")), []
    for found in run(device, a.quick, a.subjects):
        append(a.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
