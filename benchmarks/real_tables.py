"""Write docs/explanation/real-models.md from the committed rows of real.py and real_adapt.py:
`python benchmarks/real_tables.py`. Measures nothing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from paper_tables import read, table

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "explanation" / "real-models.md"
NAMES = {
    "trec": "TREC, 5 classes",
    "sst2": "SST-2",
    "subj": "Subj",
    "tickets": "the package's tickets, 4 classes",
    "arc_easy": "ARC-Easy, by likelihood",
}


def rate(values: list[float]) -> str:
    """As `spread`, in percent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def trained(rows: list[dict]) -> str:
    """Each task and arm, over seeds."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["task"], row["arm"], row["learning_rate"], row["steps"] * row["batch"]].append(row)
    lines = []
    for (task, arm, lr, seen), found in sorted(
        cells.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1:])
    ):
        base = found[0]["base_accuracy"]
        gain = 100 * (statistics.mean(r["accuracy"] for r in found) - base)
        lines.append(
            [
                NAMES[task],
                arm,
                f"{found[0]['numbers']:,}",
                lr,
                seen,
                len(found),
                found[0]["N"],
                f"{100 * base:.1f}",
                rate([r["accuracy"] for r in found]),
                f"{100 * max(r['standard_error'] for r in found):.1f}",
                f"{gain:+.1f}",
                f"{statistics.mean(r['written'][1] for r in found):.2f}",
            ]
        )
    head = [
        "task",
        "arm",
        "numbers",
        "rate",
        "rows seen",
        "seeds",
        "N",
        "base",
        "expert",
        "SE of one",
        "gain",
        "written",
    ]
    return table(head, lines)


def gains(rows: list[dict]) -> str:
    """The gain of SVF experts over the base model, task by task, in points."""
    found = defaultdict(list)
    for row in rows:
        if row["arm"].startswith("svf"):
            found[row["task"]].append(100 * (row["accuracy"] - row["base_accuracy"]))
    return ", ".join(
        f"{NAMES[task].partition(',')[0]} {statistics.mean(values):+.0f}" for task, values in found.items()
    )


def routed(rows: list[dict]) -> str:
    """Each arm on mixed traffic, over seeds."""
    cells = defaultdict(list)
    for row in rows:
        if row["part"] == "routing":
            cells[row["arm"]].append(row)
    names = {"base": "base model", "own": "the expert of the row's task (oracle)", "nearest": "`Nearest`"}
    lines = [
        [names.get(arm, f"`{arm}` on everything"), found[0]["N"], rate([r["accuracy"] for r in found])]
        for arm, found in cells.items()
    ]
    return table(["", "N", "accuracy"], lines)


def few_shot(rows: list[dict]) -> str:
    """Each arm on each unseen task, over seeds."""
    cells: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["part"] == "few-shot":
            cells[row["task"]][row["arm"]].append(row["accuracy"])
    arms = {
        "base": "base model",
        "single": "the expert that the examples choose",
        "found": "the mixture that the search finds",
        "cautious": "what `FewShot` keeps by default",
    }
    lines = [[label, *(rate(cells[task][arm]) for task in cells)] for arm, label in arms.items()]
    return table(["", *(NAMES[task] for task in cells)], lines)


def main() -> None:
    real, adapt = read("real.jsonl"), read("real_adapt.jsonl")
    blocks = {
        "trained": trained(real),
        "gains": gains(real) + " points",
        "routed": routed(adapt),
        "few-shot": few_shot(adapt),
        "machine": ", ".join(dict.fromkeys(r["machine"].split(",")[0] for r in real + adapt)),
        "seconds": f"{statistics.mean(r['cpu_seconds'] for r in real if r['arm'].startswith('svf')):.0f}",
    }
    text = (HERE / "real-models.md.in").read_text()
    for key, block in blocks.items():
        text = text.replace("{{" + key + "}}", block.rstrip("\n"))
    OUT.write_text(text)


if __name__ == "__main__":
    main()
