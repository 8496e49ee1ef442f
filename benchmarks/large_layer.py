"""One decoder layer of Llama-3-8B's, 70B's or Llama-3.1-405B's shape: decompose it, patch it, serve a mixed batch.

    python benchmarks/large_layer.py                                        70B's, rank as `t2 plan` says
    python benchmarks/large_layer.py --size 405b --targets q_proj k_proj    a part of 405B's

The weights are random in bf16: components of decaying size on a Gaussian bulk, as trained weights have. A batch of
three rows, the base model and two experts, runs in one call. Each row is compared with merged weights in fp32, and the
base model's with the layer before it was patched, bit for bit. A row is appended to
benchmarks/results/large_layer.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from measure import RESULTS, append, machine, peak, require, reset_peak
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import t2kernels as t2

SIZES = {  # hidden, intermediate, heads, key-value heads: the models' config.json
    "nano": (128, 384, 4, 2),
    "8b": (4096, 14336, 32, 8),
    "70b": (8192, 28672, 64, 8),
    "405b": (16384, 53248, 128, 8),
}
TOKENS = 5
ROWS = 4096  # of a weight that are in fp32 at a time
CPU = torch.device("cpu")


def fill(W: Tensor) -> None:
    """Make W a Gaussian bulk of spectral norm 1 and min(M, N)/8 components above it, of size 1 + 4 i^-0.5."""
    M, N = W.shape
    count = min(M, N) // 8
    sizes = 1 + 4 * torch.arange(1, count + 1).float() ** -0.5
    U, V = torch.randn(M, count) / M**0.5 * sizes, torch.randn(N, count) / N**0.5
    U, V = U.bfloat16(), V.bfloat16()  # a product of bf16 numbers is quicker, and W is rounded as much
    for rows, u in zip(W.split(ROWS), U.split(ROWS), strict=True):
        rows.copy_(torch.randn(rows.shape) / (M**0.5 + N**0.5) + u @ V.t())


def layer(size: str) -> LlamaForCausalLM:
    """A Llama of one layer of these sizes and 64 tokens, in bf16."""
    hidden, inner, heads, kv = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.model.rotary_emb.__init__(config)  # its frequencies are no weights
    for p in model.parameters():
        fill(p.data) if p.dim() == 2 and min(p.shape) > 64 else p.data.fill_(1.0 if p.dim() == 1 else 0.01)
    model.lm_head.weight.data.normal_().mul_(hidden**-0.5)
    return model


@contextmanager
def merged(model: nn.Module, factors: t2.Factors, expert: t2.Expert | None) -> Iterator[None]:
    """Linear layers give x W'ᵀ in fp32 of W' = W + U diag(sigma (z - 1)) Vᵀ, a part of the rows at a time."""

    def forward(linear: nn.Linear, name: str):
        change = None
        if expert is not None and name in factors:
            U, sigma, V = factors[name]
            change = U.float() * (sigma * (expert.z[name] - 1)), V.float()

        def run(x: Tensor) -> Tensor:
            parts = []
            for at in range(0, linear.weight.shape[0], ROWS):
                W = linear.weight[at : at + ROWS].float()
                if change is not None:
                    W += change[0][at : at + ROWS] @ change[1].t()
                parts.append(x.float() @ W.t())
            return torch.cat(parts, -1)

        return run

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        linear.forward = forward(linear, name)
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward


@torch.no_grad()
def one(size: str, rank: int | float, only: list[str]) -> dict:
    torch.manual_seed(0)
    targets = f"({'|'.join(map(re.escape, only))})$" if only else "all"
    model = layer(size)
    before = reset_peak(CPU)
    cpu, start = time.process_time(), time.perf_counter()
    factors = t2.decompose(model, rank=rank, targets=targets, dtype=torch.bfloat16)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    decomposing = peak(CPU) - before
    experts = {n: t2.Expert({m: 1 + 0.25 * torch.randn(r) for m, r in factors.ranks.items()}) for n in ("a", "b")}
    x = torch.randn(3, TOKENS, model.config.hidden_size).bfloat16()
    wanted = []
    for row, expert in zip(x, (None, experts["a"], experts["b"]), strict=True):
        with merged(model, factors, expert):
            wanted.append(model(inputs_embeds=row[None].float()).logits[0])
    plain = model(inputs_embeds=x).logits
    bank = t2.patch_model(model, targets=targets, form="delta", factors=factors)
    for name, expert in experts.items():
        bank.add(name, expert)
    mixed = model(inputs_embeds=x, expert_ids=bank.ids([None, "a", "b"])).logits
    off = [((y.float() - w).norm() / w.norm()).item() for y, w in zip(mixed, wanted, strict=True)]
    moved = min(((plain[i].float() - wanted[i]).norm() / wanted[i].norm()).item() for i in (1, 2))
    # bf16 rounds the base model's row as much; an expert that did nothing would be off by `moved`
    require("the base model", float(not torch.equal(mixed[0], plain[0])), 0)
    require("a mixed batch against merged weights", max(off[1:]), 1.5 * off[0])
    require("what experts change is seen", off[0], moved / 4)
    return {
        "size": size,
        "targets": only or "all",
        "ranks": sorted(set(factors.ranks.values())),
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": len(factors),
        "algorithms": factors.manifest["algorithm"],
        "worst_residual": max(m["residual"] for m in factors.manifest["matrices"].values()),
        "decompose_cpu_s": cpu,
        "decompose_s": seconds,
        "decompose_beyond_weights_bytes": decomposing,
        "factors_bytes": sum(t.nbytes for f in factors.values() for t in f),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "off_base": off[0],
        "off_experts": max(off[1:]),
        "experts_move": moved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="70b")
    parser.add_argument("--rank", type=float, default=1 / 16, help="a fraction, or a number of components")
    parser.add_argument("--targets", nargs="*", default=[], help="such as q_proj; none: every matrix")
    parser.add_argument("--out", type=Path, default=RESULTS / "large_layer.jsonl")
    a = parser.parse_args()
    found = one(a.size, a.rank if a.rank < 1 else int(a.rank), a.targets)
    append(a.out, found | machine())
    for name, value in found.items():
        print(f"{name:32} {value}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
