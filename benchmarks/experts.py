"""What does it cost to switch to another expert, to load 10,000 of them, and to let them take turns on a few rows?

    python benchmarks/experts.py
    python benchmarks/experts.py --subjects tiny --count 1000

Peers: dense weights rebuilt, as the authors' release switches; PEFT LoRA r=16: an adapter read from its file into the
    model, and one that is there made active. What the row holds is compared with the equation before anything is timed.
    Rows are appended to benchmarks/results/experts.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import subjects
import torch
from generation import rebuild
from measure import RESULTS, able, append, interleaved, machine, require, show, wait
from rich.table import Table

import t2kernels as t2

PEFT = "PEFT, adapter from a file"


def adapters(model):
    """A copy of a model with two adapters of PEFT."""
    import peft

    config = peft.LoraConfig(
        r=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights=False
    )
    lora = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="first").eval()
    lora.add_adapter("second", config)
    return lora


def switching(name: str, dtype, device, repeats: int = 9) -> Iterator[dict]:
    """Seconds until the model answers with another expert, by ways to switch."""
    s = subjects.load(name, 1, 8, None, dtype, device)
    spare = copy.deepcopy(s.model)
    lora = adapters(s.model) if able([PEFT]) else None
    bank = t2.patch_model(
        s.model, form="delta", rows=3, factors=s.factors
    )  # two rows for four experts: each use is a load
    names = subjects.add_experts(bank, 4)
    experts = [bank[n] for n in names]
    bank.ids(names[0])
    row_is_right(bank, names[0], s.factors)
    there = bank.ids(
        names[3]
    )  # alive, so that its row is kept, and the one row that is left goes to whichever of the others is used
    turn, other = itertools.cycle(names[1:3]), itertools.cycle(range(4))
    loads = bank.loads

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        ours = experts[0].save(where / "one")
        ways = {
            "rebuild dense weights": lambda: rebuild(spare, s.factors, experts[next(other)]),
            "row write, from memory": lambda: bank.ids(next(turn)),
            "row write, from a file": lambda: (bank.add(names[0], ours, replace=True), bank.ids(names[0])),
            "name a row that is there": lambda: bank.ids(names[3]),
        }
        if lora is not None:
            lora.save_pretrained(where / "lora", selected_adapters=["first"])
            ways[PEFT] = lambda: (
                lora.delete_adapter("first"),
                lora.load_adapter(str(where / "lora" / "first"), "first"),
                lora.set_adapter("first"),
            )
            ways["PEFT, adapter that is there"] = lambda: lora.set_adapter("second" if next(other) % 2 else "first")
        found = interleaved(ways, repeats)
        if bank.loads - loads < 2 * repeats or int(there) != int(bank.ids(names[3])):
            raise AssertionError("some uses loaded nothing: these are not the times of loads")
        size = (
            ours.stat().st_size,
            0 if lora is None else sum(f.stat().st_size for f in (where / "lora").rglob("*.safetensors")),
        )
    parameters = () if lora is None else lora.named_parameters()
    numbers = sum(bank.matrices.values()), sum(p.numel() for n, p in parameters if ".first." in n)
    for way, t in found.items():
        peer = way.startswith("PEFT")
        yield {
            "question": "switch",
            "subject": name,
            "arm": way,
            "ms": t.median * 1e3,
            "low_ms": t.low * 1e3,
            "high_ms": t.high * 1e3,
            "over_rebuilding": t.ratio,
            "numbers": None if way.startswith("rebuild") else numbers[peer],
            "file_bytes": None if way.startswith("rebuild") else size[peer],
        }


def row_is_right(bank, name: str, factors) -> None:
    """The loaded row is sigma (z - 1), in every layer."""
    row = int(bank.ids(name))
    for layer, matrices in bank.layers:
        z = bank[name].z[matrices[0]]
        sigma = factors[matrices[0]].sigma[: len(z)].double().cpu()
        got, wanted = layer.scale[row].double().cpu()[: len(z)], sigma * (z.double() - 1)
        require(f"row of {matrices[0]}", ((got - wanted).norm() / wanted.norm()).item(), 1e-6)


def many(name: str, count: int, rows: int, dtype, device) -> dict:
    """Add `count` experts from files, then use them in turn on `rows` rows: every use loads one and evicts one."""
    s = subjects.load(name, 1, 8, 1 / 16, dtype, device)
    bank = t2.patch_model(s.model, form="delta", rank=1 / 16, rows=rows, factors=s.factors)
    g = torch.Generator().manual_seed(0)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(16):
            z = {m: 1 + 0.5 * torch.rand(k, generator=g) for m, k in bank.matrices.items()}
            files.append(bank.expert(z, n=i).save(Path(folder) / f"{i}"))
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or what was freed before is used again, and seems to cost nothing
        before, start, spent = process.memory_info().rss, time.perf_counter(), []
        for i in range(count):
            t = time.perf_counter()
            bank.add(f"e{i}", files[i % len(files)])
            spent.append(time.perf_counter() - t)
        adding, held = time.perf_counter() - start, process.memory_info().rss - before
    row_is_right(bank, f"e{count - 1}", s.factors)
    swaps = []
    for i in range(min(count, 2000)):
        t = time.perf_counter()
        bank.ids(f"e{i * 7919 % count}")
        wait(s.device)
        swaps.append(time.perf_counter() - t)
    if bank.evictions < len(swaps) - rows:
        raise AssertionError(
            f"{len(swaps)} uses of {count} experts on {rows} rows evicted only {bank.evictions}: this is not the "
            "time of a swap"
        )
    width = sum(bank.matrices.values())
    return {
        "question": "many",
        "subject": name,
        "experts": count,
        "rows": rows,
        "numbers": width,
        "add_s": adding,
        "add_ms": statistics.median(spent) * 1e3,
        "swap_ms": statistics.median(swaps) * 1e3,
        "swap_high_ms": statistics.quantiles(swaps, n=20)[-1] * 1e3,
        "host_bytes_an_expert": held / count,
        "device_bytes_a_row": 4 * width,
    }


def run(
    device: torch.device,
    quick: bool = False,
    only: list[str] | None = None,
    count: int = 10_000,
    report: Callable = print,
) -> Iterator[dict]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in only or (["llama-3-8b"] if device.type == "cuda" else ["tiny", "mid"]):
        report(f"experts: switching, {name}")
        yield from switching(name, dtype, device, 5 if quick else 15)
        report(f"experts: {count} of them, {name}")
        yield many(name, count, 64, dtype, device)


def table(rows: list[dict]) -> Table:
    out = Table("model", "what", "ms", "over rebuilding", "numbers", "file", title="switching experts")
    for r in rows:
        if r["question"] == "switch":
            number, size = (f"{r['numbers']:,}", f"{r['file_bytes'] / 1e6:.2f} MB") if r["numbers"] else ("", "")
            out.add_row(r["subject"], r["arm"], f"{r['ms']:.3f}", f"{r['over_rebuilding']:.4f}x", number, size)
        else:
            what = f"{r['experts']} experts: {r['add_s']:.1f} s to add, {r['host_bytes_an_expert'] / 1e3:.1f} kB each; "
            what += f"a swap on {r['rows']} rows"
            out.add_row(r["subject"], what, f"{r['swap_ms']:.3f}", "", f"{r['numbers']:,}", "")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=subjects.NAMES)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.jsonl")
    a = parser.parse_args()
    facts, rows = machine(("torch", "transformers", "peft")), []
    for found in run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), False, a.subjects, a.count):
        append(a.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
