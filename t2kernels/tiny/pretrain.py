"""Pre-train the tiny model from random weights: `python -m t2kernels.tiny.pretrain --out DIR`.

Seeds and step counts are fixed and no clock is read, so the result is the same wherever torch computes the same.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from t2kernels import tasks

from . import accuracy, corpus
from .tokenizer import BOS, EOS, PAD, VOCABULARY, build, encode

SEED = 0
STEPS = 5400
LESSONS = 0.74
"""The share of the steps on lessons; the others are on the web."""
ROWS, LENGTH = 24, 96
"""The size of a batch. Rows are packed with whole documents, and attention stays within a document."""
LR_MATRICES, LR_REST, WEIGHT_DECAY = 5e-3, 2.5e-3, 0.05
WARM_UP, FLAT = 100, 0.75
"""Steps of warm-up, and the share of the run after which the learning rate falls to 2 % in a straight line."""


def config() -> LlamaConfig:
    """A Llama of 1.06 M parameters: 4 layers of 128, heads of 32, MLP of 512, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Draw normal weights. Standard deviations: 0.02 for the embedding, 0.049 for the matrices of the blocks.

    Matrices that write to the residual stream are smaller by sqrt(2 layers).
    """
    generator = torch.Generator().manual_seed(seed)
    width = 0.04 * math.sqrt(192 / 128)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = (
                0.02
                if "embed" in name
                else width / math.sqrt(8)
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else width
            )
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)


def batches(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Pack documents into batches (ids, labels, mask, number of documents).

    ids: [ROWS, LENGTH] int64. labels: [ROWS, LENGTH] int64, the next token; -100 inside prompts and padding.
    mask: [ROWS, 1, LENGTH, LENGTH] bool, causal within a document.
    """
    waiting = next(documents)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    while True:
        ids, labels, owner, count = [], [], [], 0
        for _ in range(ROWS):
            row, label, own = [], [], []
            while len(row) + len(waiting[0]) + len(waiting[1]) + 2 <= LENGTH:
                prompt, completion = [BOS, *encode(waiting[0])], [*encode(waiting[1]), EOS]
                row += prompt + completion
                label += [-100] * (len(prompt) - 1) + completion + [-100]
                count += 1
                own += [count] * (len(prompt) + len(completion))
                waiting = next(documents)
            rest = LENGTH - len(row)
            ids.append(row + [PAD] * rest)
            labels.append(label + [-100] * rest)
            owner.append(own + [0] * rest)
        owner = torch.tensor(owner)
        mask = (owner[:, :, None] == owner[:, None, :]) & causal
        yield torch.tensor(ids), torch.tensor(labels), mask[:, None], count


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rates."""
    done = step / steps
    return min(1, (step + 1) / WARM_UP) * (1 if done < FLAT else max(0.02, 1 - (done - FLAT) / (1 - FLAT)))


def train(steps: int = STEPS, seed: int = SEED, console: Console | None = None) -> LlamaForCausalLM:
    """Train a model for `steps` steps on the corpus. The loss counts completions only.

    Muon trains the matrices of the blocks: after 400 steps it reached the loss that AdamW alone reached after 1000.
    """
    model = LlamaForCausalLM(config())
    initialise(model, seed)
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimisers = {
        torch.optim.Muon(
            blocks, lr=LR_MATRICES, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ): LR_MATRICES,
        torch.optim.AdamW(rest, lr=LR_REST, betas=(0.9, 0.98), weight_decay=0): LR_REST,
    }
    lessons, web = batches(corpus.lessons(1000 + seed)), batches(corpus.web(2000 + seed))
    text = TextColumn("loss {task.fields[loss]:.3f} · {task.fields[documents]:,} documents")
    columns = (
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        text,
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, loss=float("nan"), documents=0)
        documents, mean = 0, None
        for step in range(steps):
            for optimiser, lr in optimisers.items():
                optimiser.param_groups[0]["lr"] = lr * schedule(step, steps)
                optimiser.zero_grad()
            ids, labels, mask, count = next(lessons if step < LESSONS * steps else web)
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            counted = labels != -100
            loss = F.cross_entropy(model.lm_head(hidden[counted]), labels[counted])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            documents += count
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            progress.update(bar, advance=1, loss=mean, documents=documents)
            if (step + 1) % 500 == 0:
                progress.console.print(f"step {step + 1}: loss {mean:.4f}, {documents:,} documents")
    return model


def save(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Write model and tokenizer in bf16. Returns the model with the rounded weights in fp32."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
    )
    model.save_pretrained(out)
    build().save_pretrained(out)
    return model.float()


def main() -> None:
    """Pre-train, save and measure, as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m t2kernels.tiny.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=STEPS, help="for a quick look; the shipped model took the default")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--threads", type=int, default=2, help="another number changes rounding, and with it the weights"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    start = time.perf_counter()
    model = save(train(arguments.steps, arguments.seed, console), arguments.out)
    console.print(f"{arguments.steps} steps in {time.perf_counter() - start:.0f} s")
    table = Table(
        "task",
        "problems",
        "greedy",
        "sampled at T=1",
        "working forced",
        "standard error",
        title="accuracy on the frozen test files",
    )
    stated = {name: accuracy.report(model, build(), name) for name in tasks.names()}
    for name, row in stated.items():
        table.add_row(
            name,
            str(row["n"]),
            *(f"{row[column]:.3f}" for column in ("greedy", "sampled", "working", "greedy_standard_error")),
        )
    console.print(table)
    (arguments.out / "accuracy.json").write_text(json.dumps(stated, indent=1) + "\n")


if __name__ == "__main__":
    main()
