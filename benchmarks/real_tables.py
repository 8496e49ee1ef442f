"""Write docs/explanation/real-models.md from the committed rows of real.py and real_adapt.py:
`python benchmarks/real_tables.py`. Measures nothing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from paper_tables import read, table

from t2kernels.adapt.few_shot import CAUTION_OF_OPTIONS, is_better

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "explanation" / "real-models.md"
STEPS = 60
"""Steps of a run of full length; shorter ones compare learning rates."""
LOSSES = {"expected": "-E[r]", "log": "-log E[r]"}
NAMES = {
    "trec": "TREC, 5 classes",
    "sst2": "SST-2",
    "subj": "Subj",
    "tickets": "the package's tickets, 4 classes",
    "arc_easy": "ARC-Easy, by likelihood",
    "trec_reworded": "TREC in other words",
    "sst2_reworded": "SST-2 in other words",
}


def rate(values: list[float]) -> str:
    """As `spread`, in percent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def trained(rows: list[dict]) -> str:
    """Each task, arm and loss, over seeds, of the runs of full length."""
    cells = defaultdict(list)
    for row in whole_runs(rows):
        cells[row["task"], row["arm"], loss(row), row.get("written_coef", 0.02), row["learning_rate"]].append(row)
    lines = []
    for (task, arm, kind, written, lr), found in sorted(cells.items(), key=lambda item: by_task(item[0])):
        base = found[0]["base_accuracy"]
        gain = 100 * (statistics.mean(r["accuracy"] for r in found) - base)
        lines.append(
            [
                NAMES[task],
                arm,
                LOSSES[kind],
                written,
                f"{found[0]['numbers']:,}",
                lr,
                len(found),
                found[0]["N"],
                f"{100 * base:.1f}",
                rate([r["accuracy"] for r in found]),
                f"{100 * max(r['standard_error'] for r in found):.1f}",
                f"{gain:+.1f}",
                f"{statistics.mean(r['written'][1] for r in found):.2f}",
                sum(map(one_label, found)),
                f"{statistics.mean(r['cpu_seconds'] for r in found):.0f}",
            ]
        )
    head = [
        "task",
        "arm",
        "loss",
        "writing",
        "numbers",
        "rate",
        "seeds",
        "N",
        "base",
        "expert",
        "SE of one",
        "gain",
        "written",
        "in one label",
        "CPU s",
    ]
    return table(head, lines)


def rates(rows: list[dict]) -> str:
    """The short runs, of which the best gave LoRA its learning rate: accuracy of each rate."""
    cells: dict[tuple, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row["steps"] < STEPS:
            cells[row["task"], row["arm"], row["steps"], row["N"]][row["learning_rate"]] = row["accuracy"]
    tried = sorted({rate for found in cells.values() for rate in found})
    lines = [
        [NAMES[key[0]], *key[1:], *(f"{100 * found[r]:.1f}" if r in found else "" for r in tried)]
        for key, found in sorted(cells.items(), key=lambda item: by_task(item[0]))
    ]
    return table(["task", "arm", "steps", "N", *(f"rate {rate:g}" for rate in tried)], lines)


def whole_runs(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["steps"] >= STEPS]


def by_task(key: tuple) -> tuple:
    """The order of the lines of a table."""
    return (list(NAMES).index(key[0]), *key[1:])


def loss(row: dict) -> str:
    """The `policy_loss` of a run; rows from before it could be chosen do not have it."""
    return row.get("loss", "expected")


def one_label(row: dict) -> bool:
    """Whether a run ended in one label for nearly all texts."""
    return row["same_text"] > 0.95


def gains(rows: list[dict], kind: tuple[str, float]) -> str:
    """The gain of SVF experts of this loss and written_coef over the base model, task by task, in points."""
    found = defaultdict(list)
    for row in whole_runs(rows):
        if row["arm"].startswith("svf") and (loss(row), row.get("written_coef", 0.02)) == kind:
            found[row["task"]].append(100 * (row["accuracy"] - row["base_accuracy"]))
    return ", ".join(
        f"{NAMES[task].partition(',')[0]} {statistics.mean(values):+.0f}" for task, values in found.items()
    )


def collapsed(rows: list[dict]) -> str:
    """How many whole runs of each loss ended in one label, over both arms."""
    found = defaultdict(list)
    for row in whole_runs(rows):
        found[LOSSES[loss(row)]].append(one_label(row))
    return ", ".join(f"{sum(ends)} of {len(ends)} with {name}" for name, ends in found.items())


def latest(rows: list[dict], part: str) -> list[dict]:
    """The rows of a part over the most experts."""
    found = [r for r in rows if r["part"] == part]
    most = max(len(r["experts"]) for r in found)
    return [r for r in found if len(r["experts"]) == most]


def routed(rows: list[dict]) -> str:
    """Each arm on mixed traffic."""
    cells = defaultdict(list)
    measured = latest(rows, "routing")
    for row in measured:
        if row["commit"] == measured[-1]["commit"]:  # experts of another recipe came before
            cells[row["arm"]].append(row)
    names = {
        "base": "base model",
        "own": "the expert of the row's task (oracle)",
        "nearest": "`Nearest`",
        "prompt": "`Prompt`, by the likelihood of plain names, calibrated",
    }
    lines = []
    for arm, found in cells.items():
        routes, error = found[-1].get("right_routes"), max(r["standard_error"] for r in found)
        cost = found[-1].get("cpu_seconds_a_prompt")
        line = [names.get(arm, f"`{arm}` on everything"), found[0]["N"], rate([r["accuracy"] for r in found])]
        lines.append([*line, f"{100 * error:.1f}", "" if routes is None else f"{100 * routes:.1f}", cost or ""])
    return table(["", "N", "accuracy", "SE", "right routes", "CPU s a prompt"], lines)


ARMS = {
    "base": "base",
    "best": "best single, in hindsight",
    "single": "single, by the examples",
    "found": "mixture found",
    "cautious": "kept by default",
}


def searches(rows: list[dict]) -> dict[str, dict[int, dict[str, dict]]]:
    """{task: {seed: {arm: its row}}} of the few-shot rows, with the best single expert in hindsight, and
    with what today's caution keeps."""
    cells: dict[str, dict[int, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in latest(rows, "few-shot"):
        cells[row["task"]][row["seed"]][row["arm"]] = row
    for seeds in cells.values():
        for arms in seeds.values():
            kept = is_better(arms["cautious"]["gain"], arms["cautious"]["error"], CAUTION_OF_OPTIONS)
            arms["cautious"] = arms["found" if kept else "base"] | {"note": "found" if kept else "base"}
            arms["best"] = max((arms[name] for name in arms["base"]["unseen_for"]), key=lambda r: r["accuracy"])
    return dict(sorted(cells.items(), key=lambda cell: list(NAMES).index(cell[0])))


def few_shot(rows: list[dict]) -> str:
    """Each unseen task, over seeds of the examples."""
    lines = []
    for task, seeds in searches(rows).items():
        one = next(iter(seeds.values()))["base"]
        error = max(r["standard_error"] for arms in seeds.values() for r in arms.values())
        kept = sum(arms["cautious"]["note"] == "found" for arms in seeds.values())
        shown = [rate([arms[arm]["accuracy"] for arms in seeds.values()]) for arm in ARMS]
        note = f"{kept} of {len(seeds)}"
        lines.append([NAMES[task], ", ".join(one["unseen_for"]), one["N"], *shown, f"{100 * error:.1f}", note])
    return table(["task", "experts", "N", *ARMS.values(), "SE of one", "mixture kept"], lines)


def decisions(rows: list[dict]) -> str:
    """How often `FewShot` kept what was better on the test rows, and what its choices cost or gained."""
    every = [arms for seeds in searches(rows).values() for arms in seeds.values()]
    gains = [arms["found"]["accuracy"] - arms["base"]["accuracy"] for arms in every]
    kept = [arms["cautious"]["note"] == "found" for arms in every]
    good, bad = (sum(k for k, g in zip(kept, gains, strict=True) if (g > 0) == up) for up in (True, False))
    up = sum(g > 0 for g in gains)
    return (
        f"{good} of the {up} mixtures that are better than the base model on the test rows were kept, "
        f"and {bad} of the {len(gains) - up} that are not"
    )


def averages(rows: list[dict]) -> str:
    """The mean of each arm over the tasks, each task weighing the same."""
    tasks = searches(rows).values()
    means = {
        arm: statistics.mean(statistics.mean(arms[arm]["accuracy"] for arms in seeds.values()) for seeds in tasks)
        for arm in ARMS
    }
    return ", ".join(f"{ARMS[arm]} {100 * value:.1f}" for arm, value in means.items())


def main() -> None:
    real, adapt = read("real.jsonl"), read("real_adapt.jsonl")
    blocks = {
        "trained": trained(real),
        "rates": rates(real),
        "gains-expected": gains(real, ("expected", 0.02)),
        "gains-log": gains(real, ("log", 0.1)),
        "collapsed": collapsed(real),
        "routed": routed(adapt),
        "few-shot": few_shot(adapt),
        "decisions": decisions(adapt),
        "averages": averages(adapt),
        "machine": ", ".join(dict.fromkeys(r["machine"].split(",")[0] for r in real + adapt)),
    }
    text = (HERE / "real-models.md.in").read_text()
    for key, block in blocks.items():
        text = text.replace("{{" + key + "}}", block.rstrip("\n"))
    OUT.write_text(text)


if __name__ == "__main__":
    main()
