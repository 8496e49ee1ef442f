"""Draw the figures and write the tables of docs/explanation/benchmarks.md from committed rows; nothing in them is
written by hand.

    python benchmarks/plot.py            docs/figures/*.svg, and docs/explanation/benchmarks.md from
    benchmarks/benchmarks.md.in

Of each benchmark the rows of its last run are taken: those with the command and the commit of the last row. A figure
    without rows is left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from measure import RESULTS

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "explanation"
FIGURES_DIR = HERE.parent / "docs" / "figures"
# Okabe and Ito's colours, which people who see fewer colours can tell apart; one for each arm.
COLOURS = {
    "dense": "#4d4d4d",
    "delta R/16": "#0072b2",
    "delta R": "#56b4e9",
    "factored": "#009e73",
    "factored int8": "#f0e442",
    "rebuilt": "#d55e00",
    "PEFT": "#aa4499",
    "t2 auto": "#0072b2",
    "two matmuls": "#e69f00",
    "base model": "#4d4d4d",
    "SVF, R/16": "#5aa9d6",
    "SVF, R/8": "#3b8fc4",
    "SVF, R/4": "#1c78b0",
    "SVF, all R": "#00578a",
    "SVF, sigmoid": "#009e73",
}


def last_run(name: str) -> list[dict]:
    """The rows of the last run of a benchmark; all of rl's, whose cells are run one by one."""
    path = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if name == "cpp":  # its calls and its decoding are two runs
        rows = [r for r in rows if "torch_tokens_s" in r]
    if name == "real_decode":  # a command a model: the last row of each cell
        cell = lambda r: tuple(r.get(k) for k in ("model", "dtype", "rank", "tokens", "length", "arm"))  # noqa: E731
        return list({cell({"length": 1} | r): r for r in rows if not r["inference_mode"]}.values())
    if name == "vllm_decode":  # a command for some of the ranks: the last row of each cell
        return list({(r["streams"], r["arm"]): r for r in rows if not r["arm"].startswith("before")}.values())
    if name == "training_turns":  # a command a model: the last row of each cell
        return list({(r["model"], r["dtype"], r["checkpointing"], r["arm"]): r for r in rows}.values())
    if name == "training":  # a run of a single model has no place among the others
        rows = [r for r in rows if "--subjects" not in r["command"]]
    if name == "rl" or not rows:
        return rows
    same = lambda r: (r["command"], r["commit"]) == (rows[-1]["command"], rows[-1]["commit"])  # noqa: E731
    return [r for r in rows if same(r)]


def colour(arm: str) -> str:
    """The colour of the longest name that the arm starts with."""
    return next((COLOURS[name] for name in sorted(COLOURS, key=len, reverse=True) if arm.startswith(name)), "#888888")


def figure(title: str, x: str, y: str, panels: int = 1):
    fig, axes = plt.subplots(1, panels, figsize=(8, 4), sharey=True, squeeze=False)
    fig.suptitle(title, fontsize=11)
    for ax in axes[0]:
        ax.set_xlabel(x)
        ax.grid(axis="x" if panels > 1 else "y", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(y)
    return fig, axes[0]


def save(fig, name: str) -> Path:
    """As SVG, the same bytes for the same rows."""
    path = FIGURES_DIR / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def bars(ax, groups: list[int], arms: dict[str, dict[int, float]], names: dict[str, str]) -> None:
    """For each group of the x axis one bar an arm, side by side. arms: {arm: {group: height}}."""
    width = 0.8 / len(arms)
    for i, (arm, heights) in enumerate(arms.items()):
        places = [g + (i - (len(arms) - 1) / 2) * width for g, group in enumerate(groups) if group in heights]
        ax.bar(
            places,
            [heights[g] for g in groups if g in heights],
            width,
            color=colour(arm),
            edgecolor="#333333",
            linewidth=0.4,
            label=names.get(arm, arm),
        )
    ax.set_xticks(range(len(groups)), [str(g) for g in groups])


def generation(rows: list[dict]) -> Path:
    mine = [r for r in rows if r["subject"] == "tiny"] or rows
    fig, (ax,) = figure(
        f"generate() on the built-in model: {mine[0]['batch']} requests in one batch",
        "different experts in the batch",
        "tokens a second",
    )
    dense = next(r["tokens_per_s"] for r in mine if r["experts"] == 0)
    arms: dict[str, dict[int, float]] = {}
    for r in mine:
        if r["experts"]:
            arms.setdefault(r["arm"], {})[r["experts"]] = r["tokens_per_s"]
    names = {
        "delta R/16": "delta form, 1/16 of the components",
        "delta R": "delta form, every component",
        "factored": "factored form",
        "factored int8": "factored form, int8 factors",
        "rebuilt for each expert": "weights rebuilt for each expert",
        "PEFT LoRA r=16": "PEFT LoRA, rank 16",
    }
    bars(ax, sorted({r["experts"] for r in mine} - {0}), arms, names)
    ax.axhline(dense, color=COLOURS["dense"], linestyle="--", label="dense model, no expert")
    ax.set_ylim(0, 1.42 * dense)
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    return save(fig, "generation")


def ops(rows: list[dict]) -> Path:
    forward = [
        r
        for r in rows
        if not r.get("backward") and r["group"] == "gate+up" and r["form"] == "delta" and r["mix"] == "all distinct"
    ]
    mine = [
        r
        for r in forward
        if r["model"] == forward[0]["model"] and r["factors"] == r["dtype"] and r["k"] == forward[0]["k"]
    ]
    shown = {
        "t2 auto": "t2kernels",
        "two matmuls, eager": "two products in torch",
        "PEFT LoRA r=16": "PEFT LoRA, rank 16",
    }
    arms: dict[str, dict[int, float]] = {arm: {} for arm in shown}
    other: dict[str, list[float]] = {}
    for r in mine:
        if r["arm"] in arms:
            arms[r["arm"]][r["T"]] = r["over_dense"]
        elif r["arm"].startswith("W'"):
            other.setdefault(r["arm"], []).append(r["over_dense"])
    fig, (ax,) = figure(
        f"The first two matrices of an MLP, delta form with {mine[0]['k']} components, each token another expert",
        "tokens",
        "time, of the dense layer's",
    )
    groups = sorted({r["T"] for r in mine})
    bars(ax, groups, {arm: heights for arm, heights in arms.items() if heights}, shown)
    ax.axhline(1, color=COLOURS["dense"], linestyle="--", label="dense layer, no expert")
    ax.set_ylim(0, 2.2)
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    words = {
        "W' rebuilt an expert": "weights rebuilt for each expert",
        "W' kept an expert": "weights kept for each expert",
    }
    left_out = [f"{words.get(arm, arm)} {min(v):.1f} to {max(v):.1f}" for arm, v in other.items()]
    if left_out:
        ax.set_xlabel("tokens\n(not drawn: " + ", ".join(left_out) + ")", fontsize=9)
    return save(fig, "ops")


def quality(rows: list[dict]) -> Path:
    tasks = ("math", "code", "reason")
    fig, axes = figure("Accuracy after 100 steps of RL on the built-in model", "accuracy", "", len(tasks))
    arms = {  # from top to bottom
        "base model, untrained": None,
        "SVF, R/16": "svf R/16",
        "SVF, R/8": "svf R/8",
        "SVF, R/4": "svf R/4",
        "SVF, all R": "svf R",
        "SVF, sigmoid": "svf sigmoid R",
        "PEFT LoRA r=16": "lora r=16",
    }
    labels = []
    for i, (name, arm) in enumerate(arms.items()):
        mine = [r for r in rows if r["arm"] == (arm or "svf R")]
        labels.append(f"{name}\n{mine[0]['numbers'] if arm else 0:,} numbers")
        for task, ax in zip(tasks, axes, strict=True):
            values = [r["accuracy" if arm else "base_accuracy"] for r in mine if r["task"] == task]
            mid = statistics.mean(values)
            ax.barh(i, mid, 0.7, color=colour(name), xerr=[[mid - min(values)], [max(values) - mid]], capsize=2)
            ax.text(mid - 0.03, i, f"{mid:.3f}".replace("0.", "."), va="center", ha="right", fontsize=8, color="white")
    for task, ax in zip(tasks, axes, strict=True):
        ax.set_title(task, fontsize=10)
        ax.set_xlim(0, 1.02)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    return save(fig, "quality")


def markdown(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    head = list(head)
    rows = ["| " + " | ".join(str(c) for c in line) + " |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


def of_generation(rows: list[dict]) -> str:
    def line(r):
        name = r["arm"] + (f"; copies: {r['batch'] * r['new'] / r['copies_s']:.0f} tokens/s" if "copies_s" in r else "")
        over = [f"{r[k]:.2f}" if k in r else "" for k in ("first_over_dense", "step_over_dense", "over_one")]
        return (
            r["subject"],
            r["batch"],
            r["experts"] or "none",
            name,
            f"{1e3 * r['first_token_s']:.0f}",
            f"{1e3 * r['step_s']:.1f}",
            f"{r['tokens_per_s']:.0f}",
            *over,
        )

    timed = "first token, ms|a step, ms|tokens/s|first token over dense|step over dense|over one expert"
    head = f"model|batch|experts|arm|{timed}".split("|")
    return markdown(head, map(line, rows))


def of_ops(rows: list[dict]) -> str:
    """Of the mixes only that which is hardest, and not what auto chose once more under its own name; the rows hold
    all."""
    rows = [r for r in rows if r["mix"] == "all distinct" and r["arm"] != "t2 cpp"]
    Ts = sorted({r["T"] for r in rows})
    cells: dict[tuple, dict[int, str]] = {}
    for r in rows:
        other = f" {r['factors']}" if r.get("factors", r["dtype"]) != r["dtype"] else ""
        form = (
            r["form"]
            + ("" if r["k"] is None else f" k={r['k']}")
            + other
            + (", with backward" if r.get("backward") else "")
        )
        shown = f"{r['us']:.0f} ({r['over_dense']:.2f})"
        cells.setdefault((r["model"], r["group"], form, r["mix"], r["arm"]), {})[r["T"]] = shown
    return markdown(
        ["model", "matrices", "form", "experts", "arm", *(f"T={T}" for T in Ts)],
        ([*k, *(v.get(T, "") for T in Ts)] for k, v in cells.items()),
    )


def of_population(rows: list[dict]) -> str:
    lines = (
        [r["dtype"], r["mode"], arm, f"{s:.3f}", f"{s / r['seconds']['batch']:.2f}"]
        for r in rows
        for arm, s in r["seconds"].items()
    )
    return markdown(["dtype", "scored by", "arm", "seconds", "over one batch"], lines)


def of_experts(rows: list[dict]) -> str:
    switch = [r for r in rows if r["question"] == "switch"]
    lines = [
        [
            r["subject"],
            r["arm"],
            f"{r['ms']:.3f}",
            f"{r['over_rebuilding']:.4f}",
            f"{r['numbers']:,}" if r["numbers"] else "",
            f"{r['file_bytes'] / 1e6:.2f}" if r["numbers"] else "",
        ]
        for r in switch
    ]
    many = [
        f"{r['experts']:,} experts of {r['numbers']:,} numbers on {r['subject']} ({r['rows']} rows): "
        f"{r['add_s']:.1f} s to read and add, "
        f"{r['host_bytes_an_expert'] / 1e3:.1f} kB of host memory each, {r['device_bytes_a_row'] / 1e3:.1f} kB a "
        "row; one that has no row gets it in "
        f"{r['swap_ms']:.3f} ms (95 % in {r['swap_high_ms']:.3f} ms)."
        for r in rows
        if r["question"] == "many"
    ]
    return (
        markdown(["model", "way", "ms", "over rebuilding", "numbers", "file, MB"], lines)
        + "\n\n"
        + "\n".join(f"- {m}" for m in many)
    )


def of_real_decode(rows: list[dict]) -> str:
    lines = [
        [r["model"].rpartition("/")[2], r["dtype"], r["rank"] if r["rank"] >= 1 else f"R/{1 / r['rank']:.0f}",
         f"{r['tokens']} x {r.get('length', 1)}", r["arm"], f"{1e3 * r['seconds']:.1f}", f"{r['ratio']:.2f}",
         f"{r['over_one']:.2f}" if "over_one" in r else "", f"{r['bytes']:.2f}",
         r["machine"].rpartition(", load ")[2], r["commit"]]
        for r in rows
        if r["arm"] != "dense"
    ]  # fmt: skip
    head = "model|dtype|k|tokens|arm|CPU ms|over dense|over one expert|bytes over dense|load|commit"
    return markdown(head.split("|"), lines)


def of_training_turns(rows: list[dict]) -> str:
    lines = [
        [r["model"].rpartition("/")[2], r["dtype"], " x ".join(map(str, r["batch"])), r["arm"],
         f"{1e3 * r['step_s']:.0f}", f"{r['ratio']:.2f}",
         *(f"{1e3 * r[part]:.0f}" for part in ("forward_s", "backward_s", "optimiser_s")),
         f"{r['peak_over_before_bytes'] / 1e6:.0f}", r["machine"].rpartition(", load ")[2], r["commit"]]
        for r in rows
    ]  # fmt: skip
    head = (
        "model|dtype|batch|arm|a step, ms|over LoRA|forward|backward|optimiser|memory beyond the model, MB|load|commit"
    )
    return markdown(head.split("|"), lines)


def of_shared_prefix(rows: list[dict]) -> str:
    lines = [
        [r["batch"], r["rows"], r["tokens"], r["tokens_read"], f"{r['whole_s']:.1f}", f"{r['shared_s']:.1f}",
         f"{r['ratio']:.2f}"]
        for r in rows
    ]  # fmt: skip
    head = "batch|rows|tokens|tokens read with shared prefixes|whole rows, s|shared, s|ratio"
    return markdown(head.split("|"), lines)


def of_training(rows: list[dict]) -> str:
    peer = {r["subject"]: r["step_s"] for r in rows if r["arm"].startswith("PEFT")}
    lines = (
        [r["subject"], f"{r['batch']} x {r['length']}", r["arm"], f"{r['numbers']:,}", f"{1e3 * r['step_s']:.0f}",
         f"{r['step_s'] / peer[r['subject']]:.2f}",
         f"{r['optimiser_bytes'] / 1e6:.3f}", f"{r['peak_over_before_bytes'] / 1e6:.0f}"]
        for r in rows
    )  # fmt: skip
    return markdown(
        "model|batch|arm|numbers|a step, ms|over LoRA|optimiser, MB|memory beyond the model, MB".split("|"), lines
    )


def of_decomposition(rows: list[dict]) -> str:
    lines = (
        [
            r["subject"],
            r["rank"] or "all",
            r["device"],
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['seconds']:.1f}",
            f"{r['s_per_billion']:.0f}",
            f"{r['peak_over_before_bytes'] / 1e9:.2f}",
        ]
        for r in rows
    )
    return markdown(
        "model|components|on|parameters|seconds|seconds a billion|memory beyond the weights, GB".split("|"), lines
    )


def of_rl(rows: list[dict]) -> str:
    tasks, lines = ("math", "code", "reason"), []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        mine = {t: [r["accuracy"] for r in rows if (r["arm"], r["task"]) == (arm, t)] for t in tasks}
        if not all(mine.values()):
            continue
        one = next(r for r in rows if r["arm"] == arm)
        cells = [
            f"{statistics.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" if len(v) > 1 else f"{v[0]:.3f}"
            for v in mine.values()
        ]
        seconds = statistics.mean(r["cpu_seconds"] for r in rows if r["arm"] == arm)
        lines.append([arm, f"{one['numbers']:,}", *cells, min(len(v) for v in mine.values()), f"{seconds:.0f}"])
    error = max(r["standard_error"] for r in rows)
    return (
        markdown(["arm", "numbers", *tasks, "seeds", "CPU s"], lines)
        + f"\n\nN = 2000 for each figure, binomial standard error at most {error:.3f}; means and ranges over seeds."
    )


def of_cpp(rows: list[dict]) -> str:
    lines = [
        [
            r["model"],
            r["form"],
            r["factors"],
            r["batch"],
            f"{r['torch_tokens_s']:.0f}",
            f"{r['cpp_tokens_s']:.0f}",
            f"{r['ratio']:.2f}",
        ]
        for r in rows
        if "torch_tokens_s" in r
    ]
    return markdown(["model", "form", "factors", "batch", "torch, tokens/s", "C++, tokens/s", "C++ over torch"], lines)


def of_vllm_decode(rows: list[dict]) -> str:
    """Tokens a CPU second of each arm, and in brackets the ratio to the arm without experts."""
    streams = sorted({r["streams"] for r in rows})
    cells: dict[str, dict[int, str]] = {}
    first = lambda r: [int(n) for n in r["arm"].split() if n.isdigit()]  # noqa: E731
    for r in sorted(rows, key=lambda r: ("LoRA" in r["arm"], first(r))):
        cells.setdefault(r["arm"], {})[r["streams"]] = f"{r['rate']:.0f} ({r['of_no_experts']:.2f})"
    head = ["arm", *(f"{n} streams" for n in streams)]
    return markdown(head, ([arm, *(found.get(n, "") for n in streams)] for arm, found in cells.items()))


def of_serve_decode(rows: list[dict]) -> str:
    """Tokens a CPU second of each arm, and in brackets the ratio to transformers' own batching."""
    streams = sorted({r["streams"] for r in rows})
    cells: dict[str, dict[int, str]] = {}
    for r in rows:
        cells.setdefault(r["arm"], {})[r["streams"]] = f"{r['rate']:.0f} ({r['of_plain']:.2f})"
    predicted = {r["arm"]: f"{1 / r['bytes']:.2f}" for r in rows}
    head = ["arm", *(f"{n} streams" for n in streams), "bytes alone"]
    return markdown(head, ([arm, *(found.get(n, "") for n in streams), predicted[arm]] for arm, found in cells.items()))


TABLES = {
    "cpp": of_cpp,
    "serve_decode": of_serve_decode,
    "vllm_decode": of_vllm_decode,
    "generation": of_generation,
    "real_decode": of_real_decode,
    "ops": of_ops,
    "population": of_population,
    "experts": of_experts,
    "training": of_training,
    "training_turns": of_training_turns,
    "shared_prefix": of_shared_prefix,
    "decomposition": of_decomposition,
    "rl": of_rl,
}
FIGURES = {"generation": generation, "ops": ops, "rl": quality}


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "t2kernels"
    matplotlib.rcParams["svg.fonttype"] = "none"
    text = (HERE / "benchmarks.md.in").read_text()
    for name, table in TABLES.items():
        rows = last_run(name)
        if rows and name in FIGURES:
            print(f"wrote {FIGURES[name](rows).name}")
        text = text.replace("{{" + name + "}}", table(rows) if rows else "Not measured yet.")
        facts = f"{rows[-1]['machine']}; commit {rows[-1]['commit']}; `{rows[-1]['command']}`" if rows else ""
        text = text.replace("{{" + name + " facts}}", facts)
    (DOCS / "benchmarks.md").write_text(text)
    print("wrote docs/explanation/benchmarks.md")


if __name__ == "__main__":
    main()
