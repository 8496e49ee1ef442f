"""Does a decode step cost more than it did in an older commit?

    python benchmarks/repairs.py --against 72453b4

A process for each of the two trees loads the same models with the same experts, and runs decode steps of them when it
is told to. The two take turns, so that what disturbs the machine disturbs both alike. A wrong result gets no time: the
logits of both trees are compared first. Other programs only ever add time, so of each block of runs the fastest of each
tree counts; the ratio is the median over the blocks, with their middle half. On a CPU the time is that of the
processor, on one thread; on a GPU it is that of the clock. Rows are appended to benchmarks/results/repairs.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from measure import RESULTS, append, machine, require, show, wait
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import t2kernels as t2

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = 1.01
"""The largest ratio of a decode step to that of the older commit."""
BATCH, PROMPT = 8, 16
MODELS = {"built-in": ("factored", None, 4), "8 blocks, 50k words": ("delta", 64, 1)}
"""{model: (form, rank, decode steps of a run)}"""
ARMS = ("base", "one", "mixed")
BLOCKS = 12


# --- one tree


def make(name: str) -> torch.nn.Module:
    """A model with random weights, or the built-in one."""
    if name == "built-in":
        return t2.tiny.load()[0]
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, vocab_size=50_000)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def steps(name: str) -> dict[str, Callable[[int], torch.Tensor]]:
    """{arm: run so many decode steps and return the last logits} of a patched model."""
    form, rank, _ = MODELS[name]
    model = make(name)
    bank = t2.patch_model(model, form=form, rank=rank, rows=16)
    torch.manual_seed(1)
    for i in range(BATCH):
        bank.add(f"e{i}", bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
    tokens = torch.randint(3, 60, (BATCH, PROMPT + 1))

    def arm(**routing: torch.Tensor) -> Callable[[int], torch.Tensor]:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=tokens[:, :PROMPT], past_key_values=cache, use_cache=True, **routing)

        @torch.no_grad()
        def run(count: int) -> torch.Tensor:
            for _ in range(count):
                out = model(input_ids=tokens[:, PROMPT:], past_key_values=cache, use_cache=True, **routing)
                cache.crop(-1)
            return out.logits

        return run

    base, mixed = arm(), arm(expert_ids=bank.ids([*(f"e{i}" for i in range(BATCH - 1)), None]))

    def one(count: int) -> torch.Tensor:
        with bank.use("e0"):
            return base(count)

    return {"base": base, "one": one, "mixed": mixed}


def serve() -> None:
    """Answer questions from stdin: [model, arm, steps, whether to return logits]. Answers are seconds, or numbers."""
    answers = os.fdopen(os.dup(1), "w")  # warnings go elsewhere
    os.dup2(2, 1)
    torch.set_num_threads(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    known: dict[str, dict[str, Callable[[int], torch.Tensor]]] = {}
    for line in sys.stdin:
        name, arm, count, logits = json.loads(line)
        known[name] = known.get(name) or steps(name)
        run = known[name][arm]
        wait()
        start = clock()
        out = run(count)
        wait()
        answers.write(json.dumps(out[:, -1, :50].flatten().tolist() if logits else clock() - start) + "\n")
        answers.flush()


# --- two trees


class Tree:
    """A process that runs decode steps with the package in a folder."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    def ask(self, *question: object) -> object:
        """The answer to [model, arm, steps, whether to return logits]."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "null")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def checkout(commit: str, extension: Path | None = None) -> Iterator[Path]:
    """A folder with the package of a commit.

    extension: its compiled extension; None: it is built, if this tree has one
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", place, commit], cwd=ROOT, check=True, capture_output=True)
        try:
            if extension is not None:
                shutil.copy(extension, place / "t2kernels")
            elif any((ROOT / "t2kernels").glob("_C*.so")):
                build = [sys.executable, "setup.py", "build_ext", "--inplace"]
                subprocess.run(build, cwd=place, check=True, capture_output=True)
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True, capture_output=True)


def run(
    before: Path, models: Sequence[str] = tuple(MODELS), arms: Sequence[str] = ARMS, repeats: int = 50
) -> Iterator[dict]:
    """A row for each model and arm. before: a folder with the older package; repeats: runs of a block."""
    trees = {"before": Tree(before), "now": Tree(ROOT)}
    try:
        for name in models:
            count = MODELS[name][2]
            for arm in arms:
                logits = [torch.tensor(tree.ask(name, arm, 1, True)) for tree in trees.values()]
                require(f"{name}, {arm}", float((logits[1] - logits[0]).norm() / logits[0].norm()), 1e-4)
                found: dict[str, list[float]] = {key: [] for key in trees}
                for i in range(BLOCKS):
                    block: dict[str, list[float]] = {key: [] for key in trees}
                    for j in range(repeats):
                        for key in ("before", "now") if (i + j) % 2 else ("now", "before"):
                            block[key].append(float(str(trees[key].ask(name, arm, count, False))) / count)
                    for key, seconds in block.items():
                        found[key].append(min(seconds))
                ratios = [a / b for a, b in zip(found["now"], found["before"], strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                us = {key: 1e6 * statistics.median(seconds) for key, seconds in found.items()}
                times = {"us": us["now"], "before_us": us["before"], "ratio": ratio, "low": low, "high": high}
                yield {"model": name, "arm": arm, "batch": BATCH, **times}
    finally:
        for tree in trees.values():
            tree.close()


def table(rows: Sequence[dict]) -> Table:
    """The rows, as they are printed."""
    out = Table("model", "experts", "us a step", "before", "ratio", "middle half", "", title="decode step")
    for r in rows:
        verdict = "holds" if r["ratio"] <= ALLOWED else f"more than {ALLOWED - 1:.0%}"
        spread = f"{r['low']:.3f} to {r['high']:.3f}"
        out.add_row(
            r["model"], r["arm"], f"{r['us']:.0f}", f"{r['before_us']:.0f}", f"{r['ratio']:.3f}", spread, verdict
        )
    return out


def main() -> None:
    """Measure, append the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="72453b4", help="the older commit")
    parser.add_argument("--extension", type=Path, help="its compiled extension; without it, it is built")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=50, help="pairs of runs in a block")
    parser.add_argument("--out", type=Path, default=RESULTS / "repairs.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve()
        return
    facts, rows = machine(), []
    with checkout(a.against, a.extension) as before:
        for found in run(before, a.models, repeats=a.repeats):
            append(a.out, found | {"against": a.against} | facts)
            rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
