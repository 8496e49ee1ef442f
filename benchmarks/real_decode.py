"""What does a decode step of a real model cost in delta form, over the dense model?

    python benchmarks/real_decode.py HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/real_decode.py FOLDER --dtype bfloat16 --tokens 1 8 --rank 0.0625 --threads 1

Arms: the dense model; delta form with the base model's row, with one expert, and with as many experts as sequences.
Each arm decodes one token a sequence, in turn, behind the same prompt. A number is the median of run-by-run ratios of
CPU time to the dense arm, with the middle half beside it. Before anything is timed, logits are compared with those of
the merged expert. `bytes` is what the numbers of weights and factors alone predict. Rows are appended to
benchmarks/results/real_decode.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from measure import RESULTS, append, machine, require, show, timing
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import t2kernels as t2

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model that holds the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Arm:
    """One model behind a prompt: `step` decodes one token a sequence and forgets it again."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, token: torch.Tensor, **route: torch.Tensor):
        self.model, self.token, self.route, self.cache = model, token, route, DynamicCache()
        self.seconds: list[float] = []
        model(prompt, past_key_values=self.cache, use_cache=True, **route)

    def step(self) -> torch.Tensor:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True, **self.route).logits
        self.cache.crop(-1)
        return logits

    def time(self, steps: int) -> None:
        start = time.process_time()
        for _ in range(steps):
            self.step()
        self.seconds.append((time.process_time() - start) / steps)


def experts(bank: t2.ExpertBank, count: int) -> list[str]:
    """Experts with random z around 1, by name."""
    names = [f"expert{i}" for i in range(count)]
    for name in names:
        z = {m: 1 + 0.1 * torch.randn(layer.support) for layer, matrices in bank.layers for m in matrices}
        bank.add(name, bank.expert(z))
    return names


def arms(dense: nn.Module, delta: nn.Module, names: list[str], B: int) -> dict[str, Arm]:
    bank = delta.t2_bank
    prompt, token = torch.randint(10, 1000, (B, 32)), torch.randint(10, 1000, (B, 1))
    mixed = bank.ids([names[i % len(names)] for i in range(B)])
    routes = {"base row": bank.ids(None), "one expert": bank.ids(names[0]), "mixed": mixed}
    return {
        "dense": Arm(dense, prompt, token),
        **{arm: Arm(delta, prompt, token, expert_ids=ids) for arm, ids in routes.items() if B > 1 or arm != "mixed"},
    }


def check(dense: nn.Module, delta: nn.Module, name: str) -> float:
    """The relative error of an expert's logits against the merged model's, in the model's own dtype."""
    ids, merged = torch.randint(10, 1000, (2, 16)), copy.deepcopy(delta)
    t2.unpatch_model(merged, expert=name)
    want, got = merged(ids).logits.double(), delta(ids, experts=name).logits.double()
    return require("one expert", ((got - want).norm() / want.norm()).item(), ALLOWED[dense.dtype])


def predicted(delta: nn.Module) -> float:
    """Bytes of weights and factors over bytes of weights: what a step at T = 1 reads, the table of embeddings aside."""
    dense = sum(p.numel() * p.element_size() for p in delta.parameters())
    factors = sum(t.numel() * t.element_size() for layer, _ in delta.t2_bank.layers for t in (layer.Vt, layer.U))
    return (dense + factors) / dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=float, default=1 / 16, help="below 1: a share of min(M, N)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="sequences, one token each a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--inference-mode", action="store_true", help="instead of no_grad")
    parser.add_argument("--factors", help="folder of `t2 decompose`; default: computed now")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_decode.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    delta = sharing(dense)
    rank = args.rank if args.rank < 1 else int(args.rank)
    bank = t2.patch_model(delta, form="delta", rank=rank, factors=args.factors)
    table = Table("tokens", "arm", "ms", "x dense", "middle half", "x bytes", title=f"{args.model}, {args.dtype}")
    with torch.inference_mode() if args.inference_mode else torch.no_grad():
        names = experts(bank, 8)
        error = check(dense, delta, names[0])
        for B in args.tokens:
            found = arms(dense, delta, names, B)
            for i in range(args.repeats + 2):
                for arm in found.values():
                    arm.time(args.steps)
                    if i < 2:
                        arm.seconds.clear()
            for name, t in timing({n: a.seconds for n, a in found.items()}).items():
                quarter = f"{t.low * 1e3:.2f} to {t.high * 1e3:.2f}"
                bytes_ = predicted(delta) if name != "dense" else 1.0
                table.add_row(str(B), name, f"{t.median * 1e3:.2f}", f"{t.ratio:.3f}", quarter, f"{bytes_:.3f}")
                row = {"model": args.model, "dtype": args.dtype, "rank": args.rank, "tokens": B, "arm": name}
                times = {"seconds": t.median, "ratio": t.ratio, "bytes": bytes_, "error": error}
                append(args.out, {**row, **times, "inference_mode": args.inference_mode, **machine()})
    show(table)


if __name__ == "__main__":
    main()
