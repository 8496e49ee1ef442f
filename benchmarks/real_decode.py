"""What does a decode step, or the prefill, of a real model cost in delta form, over the dense model?

    python benchmarks/real_decode.py HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/real_decode.py FOLDER --dtype bfloat16 --tokens 1 8 --rank 0.0625 --threads 1
    python benchmarks/real_decode.py FOLDER --length 512 --tokens 1
    python benchmarks/real_decode.py qwen2.5-0.5b --rank 64     # the shapes of a model, with random weights

Arms: the dense model; delta form with the base model's row, with one expert, and with as many experts as sequences.
Each arm decodes one token a sequence, in turn, behind the same prompt; with --length it reads so many. A number is
the median of run-by-run ratios of CPU time to the dense arm, with the middle half beside it. Before anything is
timed, logits are compared with those of the merged expert. `bytes` is what the numbers of weights and factors alone
predict. Rows are appended to benchmarks/results/real_decode.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import subjects
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
        given = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        logits = self.model(self.token, **given, **self.route).logits
        self.cache.crop(-self.token.shape[1])
        return logits

    def time(self, steps: int) -> None:
        start = time.process_time()
        for _ in range(steps):
            self.step()
        self.seconds.append((time.process_time() - start) / steps)


def experts(bank: t2.ExpertBank, count: int, spread: float = 0.1) -> list[str]:
    """Experts with random z around 1, by name. spread: standard deviation of z"""
    names = [f"expert{i}" for i in range(count)]
    for name in names:
        z = {m: 1 + spread * torch.randn(layer.support) for layer, matrices in bank.layers for m in matrices}
        bank.add(name, bank.expert(z))
    return names


def arms(dense: nn.Module, delta: nn.Module, names: list[str], B: int, length: int = 1) -> dict[str, Arm]:
    bank, most = delta.t2_bank, min(1000, delta.config.vocab_size)
    prompt, token = torch.randint(10, most, (B, 32)), torch.randint(10, most, (B, length))
    mixed = bank.ids([names[i % len(names)] for i in range(B)])
    routes = {"base row": bank.ids(None), "one expert": bank.ids(names[0]), "mixed": mixed}
    return {
        "dense": Arm(dense, prompt, token),
        **{arm: Arm(delta, prompt, token, expert_ids=ids) for arm, ids in routes.items() if B > 1 or arm != "mixed"},
    }


def check(dense: nn.Module, delta: nn.Module, name: str) -> float:
    """The relative error of an expert's logits against the merged model's, in the model's own dtype."""
    device, most = next(delta.parameters()).device, min(1000, delta.config.vocab_size)
    ids, merged = torch.randint(10, most, (2, 16), device=device), copy.deepcopy(delta)
    t2.unpatch_model(merged, expert=name)
    want, got = merged(ids).logits.double(), delta(ids, experts=name).logits.double()
    return require("one expert", ((got - want).norm() / want.norm()).item(), ALLOWED[dense.dtype])


def predicted(delta: nn.Module) -> float:
    """Bytes of weights and factors over bytes of weights: what a step at T = 1 reads, the table of embeddings aside."""
    table, head = delta.get_input_embeddings().weight, delta.get_output_embeddings().weight
    dense = sum(p.numel() * p.element_size() for p in delta.parameters() if p is head or p is not table)
    factors = sum(t.numel() * t.element_size() for layer, _ in delta.t2_bank.layers for t in (layer.Vt, layer.U))
    return (dense + factors) / dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder, or a name of `subjects.SIZES`")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=float, default=1 / 16, help="below 1: a share of min(M, N)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="sequences, one token each a step")
    parser.add_argument("--length", type=int, default=1, help="tokens of each sequence: more than 1 is prefill")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--inference-mode", action="store_true", help="instead of no_grad")
    # at 0.1 and 256 components the merged SmolLM2 in bf16 is 0.11 off itself in fp32, over 0.01 without an expert
    parser.add_argument("--spread", type=float, default=0.1, help="standard deviation of the experts' z")
    parser.add_argument("--factors", help="folder of `t2 decompose`; default: computed now")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_decode.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rank, dtype, factors = args.rank if args.rank < 1 else int(args.rank), getattr(torch, args.dtype), args.factors
    if args.model in subjects.SIZES:
        _, dense, factors, *_ = subjects.load(args.model, 1, rank=rank, dtype=dtype)
    else:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    delta = sharing(dense)
    bank = t2.patch_model(delta, form="delta", rank=rank, factors=factors)
    columns = "tokens", "arm", "ms", "x dense", "x one expert", "middle half", "x bytes"
    table = Table(*columns, title=f"{args.model}, {args.dtype}")
    with torch.inference_mode() if args.inference_mode else torch.no_grad():
        names = experts(bank, 8, args.spread)
        error = check(dense, delta, names[0])
        for B in args.tokens:
            found = arms(dense, delta, names, B, args.length)
            for i in range(args.repeats + 2):
                for arm in found.values():
                    arm.time(args.steps)
                    if i < 2:
                        arm.seconds.clear()
            times = timing({n: a.seconds for n, a in found.items()})
            one = timing({n: found[n].seconds for n in ("one expert", *found)})
            for name, t in times.items():
                quarter = f"{t.low * 1e3:.2f} to {t.high * 1e3:.2f}"
                bytes_, over = predicted(delta) if name != "dense" else 1.0, one[name].ratio
                table.add_row(
                    str(B), name, f"{t.median * 1e3:.2f}", f"{t.ratio:.3f}", f"{over:.3f}", quarter, f"{bytes_:.3f}"
                )
                row = {"model": args.model, "dtype": args.dtype, "rank": args.rank, "tokens": B, "length": args.length}
                row |= {"arm": name, "seconds": t.median, "ratio": t.ratio, "over_one": over, "bytes": bytes_}
                append(args.out, {**row, "error": error, "inference_mode": args.inference_mode, **machine()})
    show(table)


if __name__ == "__main__":
    main()
