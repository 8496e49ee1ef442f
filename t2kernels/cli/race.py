"""The race of `t2 demo`: one mixed batch against the authors' way of serving experts, on the same requests.

Their release holds one expert at a time, in the dense weights: it rebuilds W' = U diag(sigma z) Vᵀ in every layer,
answers that expert's requests, and goes on to the next expert.
"""

from __future__ import annotations

import random
import time
from typing import Any

from t2kernels.evaluation import answers, rebuild
from t2kernels.experts.names import Name

from . import models
from .console import bar, show, table

REQUESTS = 32
"""Prompts of a race."""
LIMIT = 28
"""Tokens of an answer."""


def race(loaded: models.Loaded, bank: Any, served: dict[str, str], counts: tuple[int, ...], repeats: int) -> None:
    """Time the same requests both ways, for each number of experts in `counts`, and print a table.

    served: {expert in the bank: its task}; repeats: timed runs, of which the best counts
    """
    import t2kernels as t2

    dense = models.load(models.TINY).model
    factors = t2.decompose(dense)
    shown = table("experts", "one batch", "one by one", "rebuilding", "one batch is", "equal answers")
    with bar() as progress:
        running = progress.add_task("timing", total=len(counts) * (repeats + 1))
        for count in counts:
            prompts, experts = requests(served, count)
            ours, theirs = [], []
            for _ in range(repeats + 1):
                ours.append(mixed(loaded, prompts, experts))
                theirs.append(one_by_one(loaded, bank, dense, factors, prompts, experts))
                progress.advance(running)
            # The first run of each warms up. Of the others the best counts: other programs only ever add time.
            (fast, first), (slow, second, rebuilding) = min(ours[1:]), min(theirs[1:])
            equal = sum(a == b for a, b in zip(first, second, strict=True))
            shown.add_row(
                str(count),
                f"{1000 * fast:.0f} ms",
                f"{1000 * slow:.0f} ms",
                f"{1000 * rebuilding:.0f} ms",
                f"{slow / fast:.1f}x as fast",
                f"{equal} of {len(prompts)}",
            )
    show(
        f"{REQUESTS} requests in one mixed batch, and expert by expert with weights rebuilt in between",
        shown,
        f"rebuilding: its part of one by one · best of {repeats}, taken in turn · a tiny model on this machine: "
        "nothing follows for a large one",
    )


def mixed(loaded: models.Loaded, prompts: list[str], experts: list[Name]) -> tuple[float, list[str]]:
    """(seconds, answers) of one batch."""
    start = time.perf_counter()
    written = answers(loaded.model, loaded.tokenizer, prompts, experts, LIMIT)
    return time.perf_counter() - start, written


def one_by_one(
    loaded: models.Loaded, bank: Any, dense: Any, factors: Any, prompts: list[str], experts: list[Name]
) -> tuple[float, list[str], float]:
    """(seconds, answers, seconds for rebuilding) of one batch for each expert."""
    start, rebuilding = time.perf_counter(), 0.0
    written = [""] * len(prompts)
    for expert in [e for i, e in enumerate(experts) if e not in experts[:i]]:
        before = time.perf_counter()
        rebuild(dense, factors, z_of(bank, expert))
        rebuilding += time.perf_counter() - before
        mine = [i for i, e in enumerate(experts) if e == expert]
        for i, text in zip(
            mine, answers(dense, loaded.tokenizer, [prompts[i] for i in mine], None, LIMIT), strict=True
        ):
            written[i] = text
    return time.perf_counter() - start, written, rebuilding


def requests(served: dict[str, str], count: int) -> tuple[list[str], list[Name]]:
    """REQUESTS prompts of all tasks in turn, and an expert for each.

    The `count` experts are those that are served, then the base model, then mixtures.
    """
    from t2kernels import tasks

    problems = [tasks.load(task).split("test", REQUESTS) for task in served.values()]
    prompts = [problems[i % len(problems)][i]["prompt"] for i in range(REQUESTS)]
    r = random.Random(0)
    made = [*served, None, *({name: r.uniform(0, 0.6) for name in served} for _ in range(REQUESTS))]
    return prompts, [made[i % count] for i in range(REQUESTS)]


def z_of(bank: Any, expert: Name) -> dict[str, Any]:
    """{matrix: z} of an expert or a mixture; empty for the base model, whose z are ones."""
    import t2kernels as t2

    if expert is None:
        return {}
    return (
        bank[expert] if isinstance(expert, str) else t2.Expert.mix([(bank[name], a) for name, a in expert.items()])
    ).z
