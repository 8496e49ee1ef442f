"""How long does it take to decompose a whole checkpoint of Llama-3-8B's shape, read from disk?

    python benchmarks/whole_model.py DIR                    needs 17 GB there, and 24 GB of memory
    python benchmarks/whole_model.py DIR --size nano        tries the script

DIR gets a checkpoint of bf16 files, one for each layer, if it has none. The weights are random: components of decaying
size on a Gaussian bulk, as in `large_layer.py`. Each layer's are others. Then `t2kernels.decompose` writes the leading
components to DIR/factors, on all cores. Some matrices are drawn, and the change of a random expert is compared with
that of the exact components in fp64. A row is appended to benchmarks/results/whole_model.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from large_layer import CPU, SIZES, layer
from measure import RESULTS, append, machine, peak, require, reset_peak
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

import t2kernels as t2

LAYERS, VOCABULARY = {"nano": 2, "8b": 32}, {"nano": 64, "8b": 128_256}
DRAWN = 3  # matrices that are compared with the exact path


def write(folder: Path, size: str) -> None:
    """A checkpoint of this size: config.json, a file for each layer, one for the head, and the index of all."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, heads, kv = SIZES[size]
    place: dict[str, str] = {}

    def save(tensors: dict[str, Tensor], name: str) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        place.update(dict.fromkeys(tensors, name))

    for i in range(LAYERS[size]):
        torch.manual_seed(i)
        own = layer(size).model.layers[0].state_dict()
        save({f"model.layers.{i}.{name}": t for name, t in own.items()}, f"layer-{i}.safetensors")
    head = torch.empty(VOCABULARY[size], hidden, dtype=torch.bfloat16)
    head.uniform_(-0.02, 0.02)
    ends = {"model.embed_tokens.weight": head, "lm_head.weight": head.clone()}
    save(ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}, "ends.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=LAYERS[size],
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=VOCABULARY[size],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)


def off(folder: Path, factors: t2.Factors, name: str, rank: int) -> float:
    """How far the change of a random expert is from that of the exact components, relative to it, in fp64.

    W has the exact components V of WᵀW, and U diag(sigma) = W V, so an expert adds W V diag(z - 1) Vᵀ. A wide W is
    taken as Wᵀ, whose eigenproblem is smaller.
    """
    change = 0.25 * torch.randn(rank, dtype=torch.float64)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[f"{name}.weight"], framework="pt") as f:
        W = f.get_tensor(f"{name}.weight").double()
    U, sigma, V = (t.double() for t in factors[name])
    if W.shape[0] < W.shape[1]:
        W, U, V = W.t(), V, U
    found = (U * (sigma * change)) @ V.t()
    V = torch.linalg.eigh(W.t() @ W).eigenvectors[:, -rank:].flip(1)
    wanted = (W @ V * change) @ V.t()
    return ((found - wanted).norm() / wanted.norm()).item()


def one(folder: Path, size: str, rank: int) -> dict:
    """Decompose the checkpoint in `folder`, which is written if it is not there. Returns what was measured."""
    if not (folder / "config.json").is_file():
        write(folder, size)
    into = folder / "factors"
    shutil.rmtree(into, ignore_errors=True)
    before = reset_peak(CPU)
    cpu, start = time.process_time(), time.perf_counter()
    factors = t2.decompose(folder, into, rank=rank)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    used = peak(CPU) - before
    drawn = random.Random(0).sample(sorted(factors), DRAWN)
    worst = max(off(folder, factors, name, rank) for name in drawn)
    records = factors.manifest["matrices"].values()
    return {
        "size": size,
        "rank": rank,
        "matrices": len(records),
        "parameters": sum(M * N for M, N in (record["shape"] for record in records)),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "memory_bytes": used,
        "factors_bytes": sum(file.stat().st_size for file in into.iterdir()),
        "worst_residual": max(record["residual"] for record in records),
        "drawn": drawn,
        "off": require("experts of the drawn matrices, against the exact components", worst, 1e-6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", choices=LAYERS, default="8b")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS / "whole_model.jsonl")
    a = parser.parse_args()
    row = one(a.folder, a.size, a.rank)
    append(a.out, row | machine())
    for name, value in row.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
