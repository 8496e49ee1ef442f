"""A part of paper.py: what a generation of the search takes, in one batch and in the ways that are not."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from paper_setup import Bench, Setup, mean

from t2kernels.adapt import Examples
from t2kernels.adapt.between_models import factors_of
from t2kernels.adapt.mixing import Mixer
from t2kernels.cli import models
from t2kernels.evaluation import answers, rebuild
from t2kernels.rollout.generation import Rollout, completion_logits

DTYPES = ("float32", "bfloat16")
"""What the built-in model is run in; its checkpoint is bfloat16."""


def speeds(setup: Setup, task: str, threads: int) -> dict:
    """`speed` in each dtype."""
    found = {
        dtype: speed(replace(setup, dtype=dtype), task, threads)
        for dtype in (DTYPES if setup.is_tiny else (setup.dtype,))
    }
    shared = next(iter(found.values()))
    return {**shared, "modes": {str(dtype): row["modes"] for dtype, row in found.items()}}


def speed(setup: Setup, task: str, threads: int, repeats: int = 5) -> dict:
    """A CEM generation of 32 candidates over 10 examples: in one batch, a candidate at a time, and as the release does
    it, with dense weights rebuilt for each. Then the same candidates made of five experts instead of three. CPU seconds
    where there is one thread, else wall.
    """
    bench = Bench(replace(setup, shots=10))
    torch.set_num_threads(threads or 1)
    examples = bench.examples(task, 0)
    alpha = 1 / 3 + 0.5 * torch.randn(32, len(bench.names), 1, generator=torch.Generator().manual_seed(0))
    mixer = Mixer(bench.bank, bench.names)
    # Two more experts, whose alphas are 0: answers, and so the decoding, stay the same.
    five = Mixer(bench.bank, {f"{n}{i}": bench.bank[n] for i in range(2) for n in bench.names[: 3 if i == 0 else 2]})
    wide = torch.cat([alpha, torch.zeros(32, five.shape[0] - len(bench.names), 1)], 1)
    dense = models.load(setup.model, setup.dtype, setup.device).model
    factors = factors_of(bench.bank)
    exact = dense.dtype == torch.float32  # in 16 bits a product of 320 rows rounds otherwise than one of 10
    now = time.process_time if torch.get_num_threads() == 1 and dense.device.type == "cpu" else time.perf_counter
    modes = {"reward": {"likelihood": False}, "both": {}}
    out: dict[str, dict] = {}
    with bench.bank.scratch(32) as rows:
        for mode, what in modes.items():
            work = {
                "batch": lambda what=what: examples.score(rows.write(mixer(alpha)), **what).answers,
                "batch of five experts": lambda what=what: examples.score(rows.write(five(wide)), **what).answers,
                "one at a time": lambda what=what: [
                    examples.score(rows.write(mixer(a)), **what).answers[0] for a in alpha.split(1)
                ],
                "rebuilt": lambda mode=mode: [rebuilt(dense, factors, mixer.expert(a), examples, mode) for a in alpha],
                "mixing": lambda: rows.write(five(wide)),
            }
            found = {name: do() for name, do in work.items()}
            if found["batch"] != found["batch of five experts"] or (exact and found["batch"] != found["one at a time"]):
                raise AssertionError(
                    "the same candidates answered differently in a batch and alone: their times cannot be compared"
                )
            times: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(repeats):  # interleaved: a busy moment falls on all of them
                for name, do in work.items():
                    start = now()
                    do()
                    times[name].append(now() - start)
            seconds = {name: round(statistics.median(t), 4) for name, t in times.items()}
            added = statistics.median(
                b / a for a, b in zip(times["batch"], times["batch of five experts"], strict=True)
            )
            out[mode] = {
                "seconds": seconds,
                "one_at_a_time_over_batch": round(seconds["one at a time"] / seconds["batch"], 2),
                "rebuilt_over_batch": round(seconds["rebuilt"] / seconds["batch"], 2),
                "five_over_three_experts": round(added, 4),
                **{
                    f"{arm}_answers_equal": mean(
                        [
                            a == b
                            for x, y in zip(found["batch"], found[arm.replace("_", " ")], strict=True)
                            for a, b in zip(x, y, strict=True)
                        ]
                    )
                    for arm in ("one_at_a_time", "rebuilt")
                },
            }
    return {"population": 32, "examples": 10, "threads": torch.get_num_threads(), "modes": out}


def rebuilt(dense, factors: dict, expert, examples: Examples, mode: str) -> list[str]:
    """One candidate as the release scores it: W' = U diag(sigma z) Vᵀ in every dense weight, then the answers (and
    likelihoods)."""
    rebuild(dense, factors, expert.z)
    tokenizer = examples.sampler.tokenizer
    written = answers(dense, tokenizer, examples.prompts, None, examples.sampler.max_new_tokens)
    if mode == "both":
        tokens, there = examples.gold
        with torch.no_grad():
            completion_logits(
                dense, Rollout(torch.cat([examples.ids, tokens], 1), torch.cat([examples.mask, there.long()], 1), there)
            )
    return written
