"""What does `generate` give for 1, 8 and 64 experts in one batch: tokens a second, time to the first token, and beside
which peers?

    python benchmarks/generation.py                             the built-in model and a random Llama, on this machine
    python benchmarks/generation.py --subject llama-3-8b        on a GPU, in bf16

Arms: the dense model with no expert; t2kernels in delta form (R/16, R) and factored (model's dtype, int8); dense
    weights rebuilt for each expert as the authors' release does it, and the same without the rebuilding, which is what
    one dense copy an expert would take; PEFT LoRA of rank 16 with `adapter_names`. All arms answer the same prompts in
    turn. Before anything is timed, logits are compared with those of materialised weights. Rows are appended to
    benchmarks/results/generation.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import subjects
import torch
from measure import RESULTS, able, append, machine, require, show, wait
from rich.table import Table
from torch import nn
from transformers import LogitsProcessor

import t2kernels as t2

OURS = {
    "delta R/16": ("delta", 1 / 16, None),
    "delta R": ("delta", None, None),
    "factored": ("factored", None, None),
    "factored int8": ("factored", None, "int8"),
}
PEERS = ("rebuilt for each expert", "PEFT LoRA r=16")
ARMS = ("dense, no expert", *OURS, *PEERS)


class Timed(NamedTuple):
    """One batch answered: seconds to the first token, seconds for each later step, all seconds, of which rebuilding;
    tokens [B, S]."""

    first: float
    step: float
    total: float
    rebuilding: float
    tokens: torch.Tensor


class Clock(LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def __call__(self, input_ids, scores):
        wait(scores.device)
        self.times.append(time.perf_counter() - self.start)
        return scores


def timed(model: nn.Module, ids, mask, new: int, **routing) -> Timed:
    clock = Clock()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            logits_processor=[clock],
            pad_token_id=0,
            **routing,
        )
    wait(out.device)
    total = time.perf_counter() - clock.start
    steps = (clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1)
    return Timed(clock.times[0], steps, total, 0.0, out[:, ids.shape[1] :])


class Field:
    """One subject with every arm that was asked for, each able to answer the same batch with E experts."""

    def __init__(self, name: str, batch: int, length: int, new: int, arms: list[str], most: int, dtype, device):
        self.subject = subjects.load(name, batch, length, None, dtype, device)
        self.ids, self.mask, self.new, self.batch = self.subject.ids, self.subject.mask, new, batch
        self.dense = self.subject.model
        self.spare = copy.deepcopy(self.dense) if PEERS[0] in arms else None
        self.ours, self.banks = {}, {}
        for arm in arms:
            if arm in OURS:
                form, rank, format = OURS[arm]
                model = sharing(self.dense)
                factors = format if format else self.subject.factors if rank is None else self.subject.factors.cut(rank)
                bank = t2.patch_model(model, rank=rank, form=form, rows=most + 8, factors=factors)
                self.ours[arm], self.banks[arm] = model, bank
                subjects.add_experts(bank, most)
        self.lora = self._lora(most) if PEERS[1] in arms else None

    def _lora(self, count: int) -> nn.Module:
        """Like every adapter that has been trained, these change something: B is not left at zero."""
        import peft

        config = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        model = peft.get_peft_model(sharing(self.dense), config, adapter_name="expert0")
        for i in range(1, count):
            model.add_adapter(f"expert{i}", config)
        return model.eval()

    def named(self, experts: int) -> list[str]:
        return [f"expert{i % experts}" for i in range(self.batch)]

    def run(self, arm: str, experts: int) -> Timed:
        if arm == ARMS[0]:
            return timed(self.dense, self.ids, self.mask, self.new)
        if arm in self.ours:
            return timed(self.ours[arm], self.ids, self.mask, self.new, experts=self.named(experts))
        if arm == PEERS[1]:
            return timed(self.lora, self.ids, self.mask, self.new, adapter_names=self.named(experts))
        return self._rebuilt(experts)

    def _rebuilt(self, experts: int) -> Timed:
        """One expert after the other. The first token is there when the last expert's requests have theirs."""
        bank = next(iter(self.banks.values()))
        start, rebuilding, steps = time.perf_counter(), 0.0, 0.0
        first, tokens = 0.0, [None] * self.batch
        for e in range(experts):
            before = time.perf_counter()
            rebuild(self.spare, self.subject.factors, bank[f"expert{e}"])
            wait(self.ids.device)
            rebuilding += time.perf_counter() - before
            mine = list(range(e, self.batch, experts))
            first = time.perf_counter() - start
            found = timed(self.spare, self.ids[mine], self.mask[mine], self.new)
            first, steps = first + found.first, steps + found.step
            for i, row in zip(mine, found.tokens, strict=True):
                tokens[i] = row
        return Timed(first, steps, time.perf_counter() - start, rebuilding, torch.stack(tokens))

    def check(self, arm: str) -> float:
        """Largest relative error of a row's last logits against dense weights of that row's expert. Raises if it is not
        rounding."""
        rows = min(self.batch, 4)
        ids, mask = self.ids[:rows], self.mask[:rows]
        worst = 0.0
        with torch.no_grad():
            if arm == ARMS[0]:
                return worst
            names = self.named(rows)[:rows]
            if arm == PEERS[1]:
                mixed = self.lora(input_ids=ids, attention_mask=mask, adapter_names=names).logits[:, -1].double()
                for i, name in enumerate(names):
                    self.lora.set_adapter(name)
                    alone = self.lora(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0, -1].double()
                    worst = max(worst, ((mixed[i] - alone).norm() / alone.norm()).item())
                return require(f"{self.subject.name}, {arm}", worst, allowed(self.ids, self.dense.dtype))
            bank = self.banks[arm] if arm in self.banks else next(iter(self.banks.values()))
            mixed = (
                self.ours[arm](input_ids=ids, attention_mask=mask, experts=names).logits[:, -1].double()
                if arm in self.ours
                else None
            )
            for i, name in enumerate(names):
                truth = copy.deepcopy(self.dense)
                subjects.materialise(truth, self.subject.factors, bank[name])
                exact = truth(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0, -1].double()
                if mixed is None:
                    rebuild(self.spare, self.subject.factors, bank[name])
                    got = self.spare(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0, -1].double()
                else:
                    got = mixed[i]
                worst = max(worst, ((got - exact).norm() / exact.norm()).item())
        room = INT8_ROOM if arm.endswith("int8") else allowed(self.ids, self.dense.dtype)
        return require(f"{self.subject.name}, {arm}", worst, room)


# fp32: a few hundred roundings of 6e-8 through the layers. bf16: two models that round W' and W + dW differently are
# about this far apart in their logits.
def allowed(ids, dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 0.1


# int8 factors are another model, as int8 weights are: benchmarks/formats.py measures how far. Here only that nothing is
# broken.
INT8_ROOM = 0.2


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that has the same weights, not copies of them: no arm changes a weight in place, except
    that which rebuilds them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rebuild(model: nn.Module, factors, expert: t2.Expert) -> None:
    """W' = U diag(sigma z) Vᵀ into every weight, from all components, as the release does it."""
    with torch.no_grad():
        for name, factor in factors.items():
            scale = factor.sigma.clone()
            if name in expert.z:
                scale[: len(expert.z[name])] *= expert.z[name].to(scale)
            torch.mm(factor.U * scale.to(factor.U.dtype), factor.V.t(), out=model.get_submodule(name).weight)


def measure(field: Field, arms: list[str], counts: list[int], repeats: int, slow_repeats: int) -> Iterator[dict]:
    """Rows of all arms and numbers of experts, taken in turn. slow_repeats: how often weights are rebuilt, which needs
    no warming up."""
    errors = {arm: field.check(arm) for arm in arms}
    cells = [(arm, experts) for experts in counts for arm in arms if arm != ARMS[0]]
    cells = [(ARMS[0], 0), *cells] if ARMS[0] in arms else cells
    found: dict[tuple[str, int], list[Timed]] = {cell: [] for cell in cells}
    for i in range(repeats + 1):
        for arm, experts in cells:
            if arm == PEERS[0] and not 0 < i <= slow_repeats:
                continue
            run = field.run(arm, experts)
            if i:
                found[arm, experts].append(run)
    for (arm, experts), runs in found.items():
        if runs:
            yield row(field, arm, experts, runs, errors[arm], found.get((ARMS[0], 0)), found.get((arm, 1)))


def row(
    field: Field,
    arm: str,
    experts: int,
    runs: list[Timed],
    error: float,
    base: list[Timed] | None,
    one: list[Timed] | None,
) -> dict:
    """Medians, and medians of the ratios run by run to the dense model and to the same arm with one expert."""
    mid = lambda key: statistics.median(getattr(r, key) for r in runs)  # noqa: E731
    out = {
        "subject": field.subject.name,
        "dtype": str(field.dense.dtype).removeprefix("torch."),
        "arm": arm,
        "batch": field.batch,
        "prompt": field.ids.shape[1],
        "new": field.new,
        "experts": experts,
        "first_token_s": mid("first"),
        "step_s": mid("step"),
        "seconds": mid("total"),
        "spread": [min(r.total for r in runs), max(r.total for r in runs)],
        "runs": len(runs),
        "tokens_per_s": field.batch * field.new / mid("total"),
        "error": error,
    }
    if arm == PEERS[0]:
        out |= {"rebuilding_s": mid("rebuilding"), "copies_s": statistics.median(r.total - r.rebuilding for r in runs)}
    for name, peer in (("dense", base), ("one", one)):
        if peer:
            for key, word in (("total", ""), ("first", "first_"), ("step", "step_")):
                out[f"{word}over_{name}"] = statistics.median(
                    getattr(r, key) / getattr(p, key) for r, p in zip(runs, peer, strict=False)
                )
    return out


def table(rows: list[dict]) -> Table:
    out = Table("model", "batch", "experts", "arm", "first token", "a step", "tokens/s", "over dense", title="generate")
    for r in rows:
        over = f"{r['over_dense']:.2f}x" if "over_dense" in r else ""
        name = r["arm"] + (
            f" (copies: {r['batch'] * r['new'] / r['copies_s']:.0f} tokens/s)" if "copies_s" in r else ""
        )
        figures = f"{1e3 * r['first_token_s']:.1f} ms", f"{1e3 * r['step_s']:.1f} ms", f"{r['tokens_per_s']:.0f}", over
        out.add_row(f"{r['subject']} {r['dtype']}", str(r["batch"]), str(r["experts"]), name, *figures)
    return out


def questions(device: torch.device, quick: bool) -> list[tuple[dict, list[str], list[int], int, int]]:
    """(how to make a Field, arms, numbers of experts, repeats, repeats of rebuilding) of a whole run."""
    if device.type == "cuda":
        big = dict(name="llama-3-8b", length=128, new=32, dtype=torch.bfloat16, device=device)
        return [
            (big | dict(batch=64), [ARMS[0], "delta R/16", *PEERS], [1, 8, 64], 3, 1),
            (big | dict(batch=1), [ARMS[0], "delta R/16"], [1], 5, 0),
        ]
    tiny, mid = (dict(dtype=torch.float32, device=device, name=name, length=16) for name in ("tiny", "mid"))
    few = 3 if quick else 7
    return [
        (tiny | dict(batch=64, new=24), list(ARMS), [1, 8, 64], few, 2),
        (mid | dict(batch=64, new=4), [ARMS[0], "delta R/16", *PEERS], [8] if quick else [1, 8, 64], few - 2, 1),
        (mid | dict(batch=8, new=8), [ARMS[0], "delta R/16", "factored", PEERS[1]], [1, 8], few + 2, 0),
        (
            mid | dict(batch=1, length=64, new=8),
            [ARMS[0], "delta R/16", "factored", "factored int8", PEERS[1]],
            [1],
            few + 2,
            0,
        ),
    ]


def run(
    device: torch.device, quick: bool = False, only: list[str] | None = None, report: Callable[[str], None] = print
) -> Iterator[dict]:
    for what, arms, counts, repeats, slow in questions(device, quick):
        if only and what["name"] not in only:
            continue
        report(f"generate: {what['name']}, batch {what['batch']}")
        arms = able(arms, report)
        yield from measure(Field(**what, arms=arms, most=max(counts)), arms, counts, repeats, slow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=subjects.NAMES)
    parser.add_argument("--quick", action="store_true", help="what `make bench` runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "generation.jsonl")
    arguments = parser.parse_args()
    facts, rows = machine(("torch", "transformers", "peft")), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for found in run(device, arguments.quick, arguments.subjects):
        append(arguments.out, found | facts)
        rows.append(found)
    show(table(rows))


if __name__ == "__main__":
    main()
