"""What do the rows of a step cost the host, beside a plain loop over its tokens?

    python benchmarks/host_work.py

Before each step an engine writes the row of every token into a buffer of the model: `ExpertIds.fill` does it in
`t2 serve`, `ExpertManager.set_active_adapters` in the vLLM plugin. The plain loop reads the row of each token, makes a
tensor of the list, and copies it into a buffer of its own. Both run in turn in this process, after their buffers were
compared: a wrong result gets no time. Rows are appended to benchmarks/results/host_work.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import RESULTS, append, interleaved, machine, require, show
from rich.table import Table

import t2kernels as t2
from t2kernels import tiny
from t2kernels.integrations.vllm.engine.manager import ExpertManager
from t2kernels.serve.engine.batching import ROW, ExpertIds

EXPERTS = 8
STEPS = ((512, 512), (512, 64), (8192, 8192), (8192, 512))
"""(tokens, requests) of a step; every request has the same number of tokens."""
CALLS = 20
"""Steps of one timed run."""


def run(steps: Sequence[tuple[int, int]] = STEPS, repeats: int = 31) -> Iterator[dict]:
    """A row for each engine and step."""
    with tempfile.TemporaryDirectory() as folder:
        for engine, make in (("t2 serve", serve_step), ("vllm", _vllm(Path(folder), max(steps)[0]))):
            for tokens, requests in steps:
                yield {"engine": engine, "tokens": tokens, "requests": requests} | time(
                    *make(tokens, requests), repeats
                )


def time(ours: Callable[[], torch.Tensor], loop: Callable[[], torch.Tensor], repeats: int) -> dict:
    """Microseconds of a step for both, and the median of the ratios of runs one after the other."""
    for _ in range(2):  # both steps that they alternate between
        require("the rows of a step", float((ours() != loop()).sum()), 0.0)
    found = interleaved({"loop": _often(loop), "ours": _often(ours)}, repeats)
    per_step = 1e6 / CALLS
    return {
        "us": found["ours"].median * per_step,
        "loop_us": found["loop"].median * per_step,
        "ratio": found["ours"].ratio,
    }


def _often(f: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            f()

    return run


def _looped(buffer: torch.Tensor, rows: Iterator[Iterator[int]]) -> Callable[[], torch.Tensor]:
    """The plain loop. rows: of each token, a step after the other."""

    def loop() -> torch.Tensor:
        found = [row for row in next(rows)]  # noqa: C416 (the loop is what is timed)
        buffer[: len(found)].copy_(torch.tensor(found, dtype=torch.int32))
        return buffer

    return loop


def serve_step(tokens: int, requests: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """`ExpertIds.fill` and the plain loop, for steps of `t2 serve`."""
    length = tokens // requests
    rows = np.arange(requests) % (EXPERTS + 1)
    steps = [
        [
            SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs={ROW: int(r)}), query_length=length)
            for r in step
        ]
        for step in (rows, np.roll(rows, 1))
    ]
    ids, ours = ExpertIds(tokens, torch.device("cpu")), itertools.cycle(steps)

    def fill() -> torch.Tensor:
        ids.fill(next(ours), tokens)
        return ids.ids

    def plain() -> Iterator[Iterator[int]]:
        for step in itertools.cycle(steps):
            yield (r.state.logit_processor_kwargs[ROW] for r in step for _ in range(r.query_length))

    return fill, _looped(torch.zeros(tokens, dtype=torch.int32), plain())


def _vllm(
    folder: Path, most: int
) -> Callable[[int, int], tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """`ExpertManager.set_active_adapters` and the plain loop, for steps of at most so many tokens of vLLM."""
    model, _ = tiny.load()
    bank = t2.patch_model(model, targets="attention", rank=8, form="delta", rows=EXPERTS + 1)
    wanted = []
    for i in range(1, EXPERTS + 1):
        z = {name: 1 + torch.randn(k) for name, k in bank.matrices.items()}
        path = bank.expert(z).save(folder / f"e{i}")
        wanted.append(SimpleNamespace(lora_int_id=i, lora_name=f"e{i}", lora_path=str(path), load_inplace=False))

    manager = ExpertManager(bank, torch.zeros(most, dtype=torch.int32), host=EXPERTS)

    def step(tokens: int, requests: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        ids = np.repeat(np.arange(requests) % (EXPERTS + 1), tokens // requests)
        steps = [tuple(ids.tolist()), tuple(np.roll(ids, tokens // requests).tolist())]
        ours = itertools.cycle([SimpleNamespace(index_mapping=s) for s in steps])

        def activate() -> torch.Tensor:
            manager.set_active_adapters(wanted, next(ours))
            return manager.token_rows[:tokens]

        def plain() -> Iterator[Iterator[int]]:
            names = [w.lora_int_id for w in wanted]
            pinned = bank.pin([str(i) for i in names])  # where they are: `activate` has put them there
            row = {0: 0, **dict(zip(names, pinned, strict=True))}
            bank.unpin(pinned)
            for s in itertools.cycle(steps):
                yield (row[i] for i in s)

        return activate, _looped(torch.zeros(tokens, dtype=torch.int32), plain())

    return step


def table(rows: Sequence[dict]) -> Table:
    """The rows, as they are printed."""
    out = Table("engine", "tokens", "requests", "us a step", "plain loop, us", "ratio", title="host work of a step")
    for r in rows:
        times = f"{r['us']:.0f}", f"{r['loop_us']:.0f}", f"{r['ratio']:.2f}x"
        out.add_row(r["engine"], str(r["tokens"]), str(r["requests"]), *times)
    return out


def main() -> None:
    """Measure, append the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "host_work.jsonl")
    a = parser.parse_args()
    facts, rows = machine(), []
    for found in run():
        append(a.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
