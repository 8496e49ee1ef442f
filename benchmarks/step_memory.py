"""How much memory does a training step take, and how much would it take for another model?

    python benchmarks/step_memory.py MODEL FACTORS

MODEL: a checkpoint's directory; FACTORS: written by `t2 decompose MODEL`. The loss of a rollout of 32 rows and 256
tokens with the KL to the base model, forward and backward, in a process of its own for each arm. The peak is compared
with a count:

    weights + factors + 2 x a layer's activations + logits, and with checkpointing the input of every layer,
    without it what every layer keeps, in pieces of `loss_memory`

A layer's activations are counted on one layer without data, and once more for its gradients. The same count is printed
for Llama-3-8B. Rows are appended to benchmarks/results/step_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, append, machine, peak, reset_peak, show
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import t2kernels as t2
from t2kernels.rollout.generation import Rollout
from t2kernels.train import SVFConfig, SVFTrainer

ROWS, TOKENS, PROMPT = 32, 256, 64
LOGITS = 2**28
ARMS = {"checkpointing": (True, 2**40), "pieces of 1 GiB": (False, 2**30)}
"""{arm: (gradient checkpointing, loss_memory)}."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc gives large blocks back at once. By default the limit grows to 32 MB, and freed tensors below are kept."""
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


def kept_by_a_layer(config: Any, dtype: torch.dtype) -> float:
    """Bytes that a layer keeps of a token for its backward pass, with frozen weights; experts are not among them."""
    one, T = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1, "_attn_implementation": "sdpa"}), 64
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one, dtype=dtype).requires_grad_(False)
        x = torch.empty(1, T, config.hidden_size, dtype=dtype, requires_grad=True)
        places = model.model.rotary_emb(x, torch.arange(T)[None])
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model.layers[0](x, position_embeddings=places)
    return sum(s.nbytes() for s in kept.values()) / T


def count(config: Any, dtype: torch.dtype, checkpointing: bool, loss_memory: int, factors: int) -> dict[str, int]:
    """{part: bytes} of a step. factors: bytes"""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layer, tokens, layers = kept_by_a_layer(config, dtype), ROWS * TOKENS, config.num_hidden_layers
    inputs = tokens * config.hidden_size * dtype.itemsize * layers
    if not checkpointing:
        tokens = min(tokens, int(loss_memory / (layer * layers)))  # of a piece
    return {
        "weights": sum(p.numel() for p in model.parameters()) * dtype.itemsize,
        "factors": factors,
        "inputs of layers" if checkpointing else "all layers": inputs
        if checkpointing
        else int(tokens * layer * layers),
        "a layer, twice": int(2 * tokens * layer),
        "logits": LOGITS,
    }


def low_rank(config: Any, itemsize: int, share: int = 16) -> int:
    """Bytes of the leading R / share components of all matrices."""
    d, ff, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = d // heads * config.num_key_value_heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (d, ff)]
    return sum((a + b) * (min(a, b) // share) for a, b in shapes) * config.num_hidden_layers * itemsize


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process."""
    checkpointing, loss_memory = ARMS[args.one]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    start = reset_peak(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    t2.patch_model(model, form="delta", factors=args.factors, rank=args.rank)
    config = SVFConfig(
        tempfile.mkdtemp(), use_cpu=True, gradient_checkpointing=checkpointing, loss_memory=loss_memory,
        logits_memory=LOGITS, kl_coef=0.1,
    )  # fmt: skip
    trainer: Any = SVFTrainer(
        model, config, [{"prompt": "a"}], None, lambda prompts, completions, **_: [0.0] * len(prompts), "mine",
        processing_class=tokenizer,
    )  # fmt: skip
    model.requires_grad_(False)
    parameters = trainer.bank.start_training("mine")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (ROWS, TOKENS), generator=g).tolist()
    rollout = Rollout.of([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids], tokenizer.pad_token_id)
    rollout.advantages = torch.randn(ROWS, generator=g)
    rollout.weights, rollout.experts = torch.full((ROWS,), 1 / ROWS), ["mine"] * ROWS
    trainer._seen.add("mine")  # what drawing notes
    trainer.rollout = lambda rows: rollout
    trainer.current_gradient_accumulation_steps = 1
    held = reset_peak(torch.device("cpu")) - start  # loading has its own peak
    begun = time.perf_counter()
    loss = trainer.training_step(model, {"rows": []})
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert loss.isfinite()
    assert norm > 0
    return {
        "held": held, "peak": peak(torch.device("cpu")) - start, "seconds": time.perf_counter() - begun,
        "loss": loss.item(), "norm": norm.item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("factors")
    parser.add_argument("--rank", type=int, default=36)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_memory.jsonl")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    config, facts = AutoConfig.from_pretrained(args.model), machine()
    table = Table("model", "arm", "counted", "peak", "of the count", title=f"a step of {ROWS} x {TOKENS} tokens, GB")
    found = {}
    for arm, (checkpointing, loss_memory) in ARMS.items():
        command = [sys.executable, __file__, args.model, args.factors, "--rank", str(args.rank), "--one", arm]
        done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{arm} failed: {done.stderr[-2000:]}")
        found[arm] = row = json.loads(done.stdout.splitlines()[-1])
        factors = sum(f.stat().st_size for f in Path(args.factors).iterdir())
        parts = count(config, torch.float32, checkpointing, loss_memory, factors)
        row |= {"model": Path(args.model).name, "dtype": "float32", "arm": arm, "parts": parts}
        row |= {"counted": sum(parts.values()), "ratio": row["peak"] / sum(parts.values())}
        append(args.out, row | facts)
        table.add_row(
            row["model"], arm, f"{row['counted'] / 1e9:.2f}", f"{row['peak'] / 1e9:.2f}", f"{row['ratio']:.2f}"
        )
    losses = [row["loss"] for row in found.values()]
    assert max(losses) - min(losses) < 1e-4 * abs(losses[0]) + 1e-5, "the arms compute different losses"
    for arm, (checkpointing, loss_memory) in ARMS.items():
        parts = count(LLAMA_8B, torch.bfloat16, checkpointing, loss_memory, low_rank(LLAMA_8B, 2))
        row = {"model": "Llama-3-8B", "dtype": "bfloat16", "arm": arm, "parts": parts, "counted": sum(parts.values())}
        append(args.out, row | facts)
        table.add_row("Llama-3-8B, bf16", arm, f"{row['counted'] / 1e9:.2f}", "not run", "")
    show(table)


if __name__ == "__main__":
    main()
