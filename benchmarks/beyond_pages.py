"""Write docs/explanation/beyond-z.md and continual.md, with their figures, from the committed rows of beyond_z.py,
beyond_real.py and continual.py: `python benchmarks/beyond_pages.py`. Measures nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import beyond_real
import plot
from beyond_z import BASE, KINDS, OTHERS, TASKS, best_rates
from continual import SEQUENCE, WAYS
from measure import RESULTS
from paper import read
from paper_tables import spread as mean_and_error
from paper_tables import table

from t2kernels.train import SVFConfig

PEERS = {kind: "z 16" if kind in ("core 4", "tied 13", "tied 448") else "z 128" for kind in KINDS if kind[0] != "z"}
"""{kind: the z that it is compared with}: the one of as many numbers, or the largest that there is."""
REAL_PEERS = {
    "output 32": "z 32",
    "core 6": "z 32",
    "band 11": "z 32",
    "core 2": "z 4",
    "tied 840": "z 4",
    "core 22": "z 576",
    "tied 13": "z 4",
    "z 4": "z 32",
    "z 576": "z 32",
}
"""The same for SmolLM2; the other sizes of z are compared with the size that an expert has by default."""
REAL_NAMES = {"trec": "TREC", "subj": "Subj"}
COLOURS = {
    "z": "#0072b2",
    "band": "#56b4e9",
    "core": "#009e73",
    "tied": "#e69f00",
    "output": "#cc79a7",
    "lora": "#4d4d4d",
}
WAY_COLOURS = dict(zip(WAYS, ("#0072b2", "#e69f00", "#4d4d4d"), strict=True))


class Cells:
    """The test rows of beyond_z.py by task and kind, in the order of the seeds."""

    def __init__(self, rows: Sequence[dict]) -> None:
        tests = sorted((r for r in rows if r["split"] == "test"), key=lambda r: r["seed"])
        tuned = best_rates(rows) | {BASE: 0.0}
        self.rows = [r for r in tests if r["learning_rate"] == tuned[r["kind"]]]
        self.at_default = [r for r in tests if (r["kind"], r["learning_rate"]) == ("z 128", SVFConfig.learning_rate)]

    def values(self, task: str, kind: str, key: str = "accuracy") -> list[float]:
        return [r[key] for r in self.rows if (r["task"], r["kind"]) == (task, kind)]

    def others(self, task: str, kind: str) -> list[float]:
        """The mean accuracy on the other trained tasks, for each seed."""
        return [statistics.mean(o.values()) for o in self.values(task, kind, "others")]

    def over(self, task: str, kind: str, peer: str, key: str = "accuracy") -> list[float]:
        """The difference to a peer, seed by seed."""
        of, to = ({r["seed"]: r[key] for r in self.rows if (r["task"], r["kind"]) == (task, k)} for k in (kind, peer))
        return [of[seed] - to[seed] for seed in of if seed in to]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds; how many there are, if there are several, but not three."""
    return mean_and_error(list(values)) + (f" ({len(values)} seeds)" if len(values) not in (0, 1, 3) else "")


def signed(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    error = statistics.stdev(values) / sqrt(len(values))
    return f"{statistics.mean(values):+.3f} ± {error:.3f}" + (f" ({len(values)} seeds)" if len(values) != 3 else "")


def gains(cells: Cells) -> str:
    """Accuracy on the task that a kind was trained on."""
    numbers = {r["kind"]: r["numbers"] for r in cells.rows}
    lines = [["base model", 0, *(spread(cells.values(task, BASE)) for task in TASKS)]]
    lines += [[k, f"{numbers[k]:,}", *(spread(cells.values(task, k)) for task in TASKS)] for k in KINDS if k in numbers]
    if cells.at_default:
        name = f"z 128 at the library's rate, {SVFConfig.learning_rate}"
        lines.append([name, f"{numbers['z 128']:,}", spread([r["accuracy"] for r in cells.at_default]), "-", "-", "-"])
    return table(["kind", "numbers", *TASKS], lines)


def against(cells: Cells) -> str:
    """The gain over z, seed by seed."""
    lines = [
        [kind, peer, *(signed(cells.over(task, kind, peer)) for task in TASKS)]
        for kind, peer in PEERS.items()
        if cells.values("code", kind)
    ]
    return table(["kind", "over", *TASKS], lines)


def forgotten(cells: Cells) -> str:
    """What is left of the other tasks, for an expert of code and for one of an absent task."""
    lines = [["base model", *(spread(cells.others(task, BASE)) for task in TASKS)]]
    lines += [[k, *(spread(cells.others(task, k)) for task in TASKS)] for k in KINDS if cells.values("code", k)]
    return table(["kind", *(f"after {task}" for task in TASKS)], lines)


def tuning(rows: Sequence[dict], kinds: Mapping[str, Sequence[float]], collapsed: Callable[[dict], bool]) -> str:
    """Accuracy by learning rate, on validation problems, and how many of these runs collapsed."""
    chosen, lines = best_rates(rows), []
    for kind in kinds:
        found = [r for r in rows if (r["kind"], r["split"]) == (kind, "validation")]
        shown = {r["learning_rate"]: f"{r['learning_rate']:g}: {r['accuracy']:.3f}" for r in found}
        if found:
            best = shown[chosen[kind]]
            shown[chosen[kind]] = best.replace(" ", " **") + "**"
            lines.append(
                [kind, ", ".join(shown[rate] for rate in kinds[kind] if rate in shown), sum(map(collapsed, found))]
            )
    return table(["kind", "rate: accuracy", "runs that collapsed"], lines)


def real_tasks(cells: Cells) -> list[str]:
    """The tasks of SmolLM2 that some kind was trained on."""
    return [t for t in beyond_real.TASKS if any(r["task"] == t and r["kind"] != BASE for r in cells.rows)]


def real_gains(cells: Cells) -> str:
    """What each kind buys on SmolLM2, and what is left of the other task."""
    numbers = {r["kind"]: r["numbers"] for r in cells.rows}
    tasks = real_tasks(cells)
    lines = []
    for kind in (BASE, *sorted(set(numbers) - {BASE}, key=lambda k: (numbers[k], k))):
        row = ["base model" if kind == BASE else kind, f"{numbers[kind]:,}"]
        row += [spread(cells.values(t, kind)) for t in tasks] + [spread(cells.values(t, kind, "other")) for t in tasks]
        shares = [r["most_common"] for t in tasks for r in cells.rows if (r["task"], r["kind"]) == (t, kind)]
        seconds = [s for t in tasks for s in cells.values(t, kind, "train_cpu_seconds")]
        lines.append([*row, f"{max(shares):.2f}", "-" if kind == BASE else f"{statistics.mean(seconds):.0f}"])
    others = [f"SST-2 after {REAL_NAMES[t]}" for t in tasks]
    return table(
        ["kind", "numbers", *(REAL_NAMES[t] for t in tasks), *others, "most common answer", "CPU s to train"], lines
    )


def real_against(cells: Cells) -> str:
    """The gain over z on SmolLM2, seed by seed."""
    tasks = real_tasks(cells)
    lines = [
        [kind, peer] + [signed(cells.over(task, kind, peer, key)) for key in ("accuracy", "other") for task in tasks]
        for kind, peer in REAL_PEERS.items()
        if cells.values("trec", kind) and cells.values("trec", peer)
    ]
    if not lines:
        return "No other kind has three seeds yet."
    others = [f"SST-2 after {REAL_NAMES[t]}" for t in tasks]
    return table(["kind", "over", *(REAL_NAMES[t] for t in tasks), *others], lines)


def draw_kinds(cells: Cells) -> None:
    """A point for each kind and task, with its standard error; the kinds from the fewest numbers to the most."""
    shown = ("code", "ops5", "hop5")
    numbers = {r["kind"]: r["numbers"] for r in cells.rows}
    kinds = sorted((k for k in KINDS if k in numbers), key=lambda k: numbers[k])
    fig, axes = plot.figure("The same RL for every kind of expert: mean and standard error", "accuracy", "", len(shown))
    for task, ax in zip(shown, axes, strict=True):
        ax.set_title(task, fontsize=10)
        ax.axvline(cells.values(task, BASE)[0], color="#4d4d4d", linestyle="--", linewidth=1)
        for i, kind in enumerate(kinds):
            values = cells.values(task, kind)
            if values:
                error = statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0
                colour = COLOURS[kind.split()[0]]
                ax.errorbar(statistics.mean(values), i, xerr=error, fmt="o", capsize=3, markersize=6, color=colour)
    axes[0].set_yticks(range(len(kinds)), [f"{k}: {numbers[k]:,} numbers" for k in kinds], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0.25, 0.9)
    for ax in axes[1:]:
        ax.set_xlim(0, 0.65)
    axes[0].plot([], [], "--", color="#4d4d4d", label="base model")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    plot.save(fig, "beyond-z")


def stages(rows: Sequence[dict], way: str) -> str:
    """Accuracy on each task after each stage."""
    lines = []
    for stage in range(len(SEQUENCE) + 1):
        mine = [r for r in rows if (r["way"], r["stage"]) == (way, stage)]
        name = f"+ {SEQUENCE[stage - 1]}" if stage else "base model"
        lines.append([name, *(spread([r["accuracy"][task] for r in mine] if stage else [mine[0]["accuracy"][task]])
                              for task in SEQUENCE)])  # fmt: skip
    return table(["after", *SEQUENCE], lines)


def kept(rows: Sequence[dict]) -> str:
    """How many answers are token for token those that were given when a task had just been learned."""
    lines = []
    for way in WAYS:
        last = [r for r in rows if r["way"] == way and r["stage"] == len(SEQUENCE)]
        if last:
            total = sum(r["N"] for r in last)
            same = [f"{sum(r['unchanged'][t] for r in last):,} of {total:,}" for t in SEQUENCE[:-1]]
            lines.append([way, f"{last[0]['numbers']:,}", len(last), *same])
    return table(["way", "numbers", "seeds", *(f"{t}, the same" for t in SEQUENCE[:-1])], lines)


def router(rows: Sequence[dict]) -> str:
    """Accuracy where the classifier, learned last, sends each prompt of mixed traffic to an expert."""
    found = [r for r in rows if "routed" in r]
    lines = [
        ["by name", *(spread([r["accuracy"][t] for r in found]) for t in SEQUENCE[:3]), ""],
        [
            "by the router",
            *(spread([r["routed"]["accuracy"][t] for r in found]) for t in SEQUENCE[:3]),
            spread([r["routed"]["sent_right"] for r in found]),
        ],
    ]
    return table(["experts are chosen", *SEQUENCE[:3], "sent to the right one"], lines)


def draw_stages(rows: Sequence[dict]) -> None:
    """Accuracy on each task over the stages, one line a way."""
    fig, axes = plot.figure("Four tasks learned in sequence: accuracy on each, three seeds", "", "", len(SEQUENCE))
    for task, ax in zip(SEQUENCE, axes, strict=True):
        ax.set_title(task, fontsize=10)
        ax.grid(axis="y", alpha=0.3)
        ax.axvline(SEQUENCE.index(task) + 1, color="#999999", linewidth=1, linestyle=":")
        for way in WAYS:
            points = [[r["accuracy"][task] for r in rows if (r["way"], r["stage"]) == (way, s)] for s in range(5)]
            if all(points):
                means = [statistics.mean(p) for p in points]
                errors = [statistics.stdev(p) / sqrt(len(p)) if len(p) > 1 else 0 for p in points]
                ax.errorbar(
                    range(5), means, errors, marker="o", markersize=4, capsize=2, color=WAY_COLOURS[way], label=way
                )
        ax.set_xticks(range(5), ["base", *SEQUENCE], rotation=60, fontsize=8)
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(0, 1.04)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    plot.save(fig, "continual")


def facts(rows: Sequence[dict]) -> dict[str, str]:
    return {
        "machine": ", ".join(dict.fromkeys(r["machine"].split(",")[0] for r in rows)),
        "commits": ", ".join(dict.fromkeys(r["commit"].partition("+")[0] for r in rows)),
        "minutes": f"{sum(r['cpu_seconds'] for r in rows) / 60:.0f}",
    }


def real_blocks(rows: Sequence[dict]) -> dict[str, str]:
    """What the page says of SmolLM2: of what has three seeds."""
    cells = Cells(rows)
    counts = Counter((r["task"], r["kind"]) for r in cells.rows)
    cells.rows = [r for r in cells.rows if r["kind"] == BASE or counts[r["task"], r["kind"]] >= 3]
    blocks = {
        "gains": real_gains(cells),
        "against": real_against(cells),
        "tuning": tuning(rows, beyond_real.KINDS, lambda row: row["most_common"] > 0.9),
    }
    return {f"real_{name}": text for name, text in (blocks | facts(rows)).items()}


def main() -> None:
    plot.matplotlib.rcParams["svg.hashsalt"] = "t2kernels"
    plot.matplotlib.rcParams["svg.fonttype"] = "none"
    rows, sequence = read(RESULTS / "beyond_z.jsonl"), read(RESULTS / "continual.jsonl")
    cells = Cells(rows)
    others = ", ".join(OTHERS)
    last = [r for r in sequence if r["stage"] == len(SEQUENCE)]
    blocks = {
        "gains": gains(cells),
        "against": against(cells),
        "forgotten": forgotten(cells),
        "tuning": tuning(rows, KINDS, lambda row: row["accuracy"] < 0.1),
    }
    page("beyond-z", blocks | {"others": others} | facts(rows) | real_blocks(read(RESULTS / "beyond_real.jsonl")))
    ways = {way: stages(sequence, way) for way in WAYS if any(r["way"] == way for r in sequence)}
    page("continual", ways | {"kept": kept(sequence), "router": router(sequence)} | facts(last))
    draw_kinds(cells)
    draw_stages(sequence)


def page(name: str, blocks: dict[str, str]) -> None:
    """A page of docs/explanation from the text of the same name here."""
    text = (plot.HERE / f"{name}.md.in").read_text()
    for key, block in blocks.items():
        text = text.replace("{{" + key + "}}", block.rstrip("\n"))
    (plot.DOCS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
