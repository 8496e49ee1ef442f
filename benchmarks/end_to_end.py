"""What does a token cost, decoded in a CUDA graph, and a prompt, with experts, beside the dense model and PEFT LoRA?

    python benchmarks/end_to_end.py                       on a GPU: a random Llama-3-8B in bf16
    python benchmarks/end_to_end.py --subject nano        anywhere: a loop takes the place of the graph on a CPU

A step decodes one token a sequence behind a prompt, with transformers' static cache. On a GPU each arm is captured, and
replayed in turn with the others; an arm that cannot be captured is timed as it runs, and the table says so. First an
expert's logits are compared with those of merged weights, and the logits of every replay with those of the step that
was not captured: a wrong result gets no time. Rows are appended to benchmarks/results/end_to_end.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import subjects
import torch
from measure import RESULTS, able, append, machine, require, reset_peak, show, timing, wait
from real_decode import check, experts, predicted, sharing
from rich.table import Table
from torch import Tensor, nn
from transformers import StaticCache

import t2kernels as t2

DENSE, PEFT = "dense, no expert", "PEFT LoRA r=16"
GRAPH_ROOM = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Step:
    """One token of each sequence, behind a prompt, in buffers that stay where they are.

    length: of the prompt; room: tokens that fit behind it; more: arguments of the forward
    """

    def __init__(self, model: nn.Module, B: int, length: int, room: int, **more: Any) -> None:
        self.model, self.length, self.room, self.more = model, length, room, more
        self.device = next(model.parameters()).device
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(2, vocabulary, (B, length), device=self.device)
        self.token = torch.randint(2, vocabulary, (B, 1), device=self.device)
        self.at = torch.full((B, 1), length, device=self.device)
        self.cache = StaticCache(config=model.config, max_cache_len=length + room)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why = "this is a CPU"
        self.prefill()

    def prefill(self) -> Tensor:
        self.cache.reset()
        return self.model(
            self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **self.more
        ).logits[:, -1]

    def run(self) -> Tensor:
        return self._logits(self.token, position_ids=self.at)

    def _logits(self, ids: Tensor, **more: Any) -> Tensor:
        more |= self.more
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **more).logits[:, -1]

    def rewind(self) -> None:
        """Forget what was decoded, in the same memory."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def capture(self) -> float:
        """Record the step; returns how far the logits of a replay are from those of the step as it was."""
        self.rewind()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate
            for _ in range(2):
                self.rewind()
                want = self.run().double()
        torch.cuda.current_stream().wait_stream(side)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.run()
        except RuntimeError as e:
            torch.cuda.synchronize()
            self.why = f"not captured: {str(e).splitlines()[0][:80]}"
            return 0.0
        self.graph, self.why = graph, ""
        self.rewind()
        graph.replay()
        return ((self.logits.double() - want).norm() / want.norm()).item()

    def seconds(self, count: int) -> float:
        """Of one step, over `count` of them."""
        self.rewind()
        wait(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.graph.replay() if self.graph else self.run()
        wait(self.device)
        return (time.perf_counter() - start) / count

    def prefill_seconds(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        self.prefill()
        wait(self.device)
        return time.perf_counter() - start


def lora(dense: nn.Module) -> nn.Module:
    """One adapter of PEFT whose B is not zero, over the same weights."""
    import peft

    config = peft.LoraConfig(
        r=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(sharing(dense), config).eval()


def models(dense: nn.Module, delta: nn.Module, report: Callable[[str], object]) -> dict[str, nn.Module]:
    found = {DENSE: dense, "delta, one expert": delta, "delta, an expert a sequence": delta}
    return found | ({PEFT: lora(dense)} if able([PEFT], report) else {})


@torch.no_grad()
def run(
    device: torch.device,
    name: str,
    dtype: torch.dtype,
    rank: int,
    batches: list[int],
    length: int,
    seconds: float,
    report: Callable[[str], object] = print,
) -> Iterator[dict]:
    """Rows of decoding and of prefill for each batch. seconds: about how long each arm of a batch is timed."""
    s = subjects.load(name, 1, 8, rank, dtype, device)
    dense, delta = s.model, sharing(s.model)
    bank = t2.patch_model(delta, form="delta", rank=rank, factors=s.factors, rows=80)
    names = experts(bank, 64)
    error = check(dense, delta, names[0])
    every = models(dense, delta, report)
    facts = {"subject": name, "dtype": str(dtype).removeprefix("torch."), "rank": rank, "length": length}
    for B in batches:
        ids = {"delta, one expert": bank.ids(names[0]), "delta, an expert a sequence": bank.ids(names[:B])}
        before = reset_peak(device)
        steps = {}
        for arm, model in every.items():
            if B == 1 and arm == "delta, an expert a sequence":
                continue
            step = Step(model, B, length, 512, **({"expert_ids": ids[arm]} if arm in ids else {}))
            if device.type == "cuda":
                require(f"{arm}, replayed", step.capture(), GRAPH_ROOM[dtype])
                if step.why:
                    report(f"{arm}, batch {B}: {step.why}; timed as it runs")
            steps[arm] = step
        once = max(step.seconds(2) for step in steps.values())
        count = max(1, min(64, int(seconds / 8 / once)))
        found: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
        for _ in range(7):
            for arm, step in steps.items():
                found["decode"].setdefault(arm, []).append(step.seconds(count))
        for _ in range(4):
            for arm, step in steps.items():
                found["prefill"].setdefault(arm, []).append(step.prefill_seconds())
        for what, times in found.items():
            for arm, t in timing({a: ts[what == "prefill" :] for a, ts in times.items()}).items():
                yield facts | {
                    "what": what,
                    "arm": arm,
                    "batch": B,
                    "seconds": t.median,
                    "low_s": t.low,
                    "high_s": t.high,
                    "over_dense": t.ratio,
                    "tokens_per_s": (B if what == "decode" else B * length) / t.median,
                    "graph": what == "decode" and steps[arm].graph is not None,
                    "bytes_predict": predicted(delta) if arm.startswith("delta") else 1.0,
                    "error": error if arm.startswith("delta") else None,
                    "beyond_before_bytes": torch.cuda.memory_allocated() - before if device.type == "cuda" else None,
                }


def table(rows: list[dict]) -> Table:
    out = Table("what", "batch", "arm", "ms", "tokens/s", "over dense", "bytes alone", "", title="end to end")
    for r in rows:
        how = "" if r["what"] == "prefill" else "graph" if r["graph"] else "no graph"
        figures = f"{1e3 * r['seconds']:.2f}", f"{r['tokens_per_s']:.0f}", f"{r['over_dense']:.3f}x"
        out.add_row(r["what"], str(r["batch"]), r["arm"], *figures, f"{r['bytes_predict']:.3f}x", how)
    return out


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=list(subjects.SIZES), default="llama-3-8b" if gpu else "mid")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.jsonl")
    a = parser.parse_args()
    device, facts, rows = torch.device("cuda" if gpu else "cpu"), machine(("torch", "transformers", "peft")), []
    for row in run(device, a.subject, getattr(torch, a.dtype), a.rank, a.batches, a.length, a.seconds):
        append(a.out, row | facts)
        rows.append(row)
    show(table(rows))


if __name__ == "__main__":
    main()
