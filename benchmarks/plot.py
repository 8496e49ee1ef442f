"""Draw the figures and write the tables of docs/benchmarks.md from committed rows; nothing in them is written by hand.

    python benchmarks/plot.py            docs/figures/*.svg, and docs/benchmarks.md from benchmarks/benchmarks.md.in

Of each benchmark the rows of its last run are taken: those with the command and the commit of the last row. A figure without rows is left out.
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
DOCS = HERE.parent / "docs"
COLOURS = {
    "dense": "#444444",
    "delta R/16": "#0b6e4f",
    "delta R": "#52b788",
    "factored": "#1d4e89",
    "factored int8": "#7fb3e6",
    "rebuilt": "#b5651d",
    "PEFT": "#a4243b",
}


def last_run(name: str) -> list[dict]:
    """The rows of the last run of a benchmark; all of rl's, whose cells are run one by one."""
    path = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if name == "cpp":  # its calls and its decoding are two runs
        rows = [r for r in rows if "torch_tokens_s" in r]
    if name == "rl" or not rows:
        return rows
    same = lambda r: (r["command"], r["commit"]) == (rows[-1]["command"], rows[-1]["commit"])  # noqa: E731
    return [r for r in rows if same(r)]


def colour(arm: str) -> str:
    return next((c for start, c in reversed(COLOURS.items()) if arm.startswith(start)), "#888888")


def figure(title: str, x: str, y: str):
    fig, axes = plt.subplots(figsize=(7, 4))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save(fig, name: str) -> Path:
    """As SVG, the same bytes for the same rows."""
    path = DOCS / "figures" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def generation(rows: list[dict]) -> Path:
    mine = [r for r in rows if r["subject"] == "tiny"] or rows
    fig, axes = figure(
        f"generate, {mine[0]['subject']} model, {mine[0]['batch']} requests in a batch",
        "experts among them",
        "tokens a second",
    )
    for arm in dict.fromkeys(r["arm"] for r in mine):
        points = sorted((r["experts"], r["tokens_per_s"]) for r in mine if r["arm"] == arm)
        if points[0][0] == 0:
            axes.axhline(points[0][1], color=colour(arm), linestyle="--", label=arm)
        else:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour(arm), label=arm)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({r["experts"] for r in mine} - {0}), [str(t) for t in ticks])
    axes.legend(fontsize=8, frameon=False)
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
    fig, axes = figure(
        f"gate and up of {mine[0]['model']}, delta form, k = {mine[0]['k']}, {mine[0]['dtype']}; every token its own expert",
        "tokens",
        "time over the dense layer",
    )
    for arm in dict.fromkeys(r["arm"] for r in mine):
        points = sorted((r["T"], r["over_dense"]) for r in mine if r["arm"] == arm)
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    return save(fig, "ops")


def quality(rows: list[dict]) -> Path:
    tasks = ("math", "code", "reason")
    fig, axes = figure(
        "100 steps of RL on the built-in model, N = 2000; ranges over seeds", "numbers trained", "accuracy"
    )
    markers = dict(zip(tasks, "osD", strict=True))
    for arm in dict.fromkeys(r["arm"] for r in rows):
        for task in tasks:
            mine = [r for r in rows if (r["arm"], r["task"]) == (arm, task)]
            if mine and "supervised" not in arm and arm not in ("svf mlp", "svf attention"):
                values = [r["accuracy"] for r in mine]
                mid = statistics.mean(values)
                # The sigmoid form trains as many numbers as "svf R"; a little to the right of it, so that both can be seen.
                x = mine[0]["numbers"] * (1.25 if "sigmoid" in arm else 1)
                c = (
                    COLOURS["PEFT"]
                    if arm.startswith("lora")
                    else COLOURS["factored"]
                    if "sigmoid" in arm
                    else COLOURS["delta R/16"]
                )
                axes.errorbar(
                    x, mid, [[mid - min(values)], [max(values) - mid]], marker=markers[task], color=c, capsize=3
                )
    for task in tasks:
        axes.plot([], [], marker=markers[task], linestyle="", color="#444444", label=task)
    for name, c in (
        ("SVF: R/16, R/8, R/4, R", "delta R/16"),
        ("SVF, sigmoid form", "factored"),
        ("PEFT LoRA r=16", "PEFT"),
    ):
        axes.plot([], [], linestyle="-", color=COLOURS[c], label=name)
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
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

    head = "model|batch|experts|arm|first token, ms|a step, ms|tokens/s|first token over dense|step over dense|over one expert".split(
        "|"
    )
    return markdown(head, map(line, rows))


def of_ops(rows: list[dict]) -> str:
    """Of the mixes only that which is hardest, and not what auto chose once more under its own name; the rows hold all."""
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
        f"{r['experts']:,} experts of {r['numbers']:,} numbers on {r['subject']} ({r['rows']} rows): {r['add_s']:.1f} s to read and add, "
        f"{r['host_bytes_an_expert'] / 1e3:.1f} kB of host memory each, {r['device_bytes_a_row'] / 1e3:.1f} kB a row; one that has no row gets it in "
        f"{r['swap_ms']:.3f} ms (95 % in {r['swap_high_ms']:.3f} ms)."
        for r in rows
        if r["question"] == "many"
    ]
    return (
        markdown(["model", "way", "ms", "over rebuilding", "numbers", "file, MB"], lines)
        + "\n\n"
        + "\n".join(f"- {m}" for m in many)
    )


def of_training(rows: list[dict]) -> str:
    peer = {r["subject"]: r["step_s"] for r in rows if r["arm"].startswith("PEFT")}
    lines = (
        [r["subject"], f"{r['batch']} x {r['length']}", r["arm"], f"{r['numbers']:,}", f"{1e3 * r['step_s']:.0f}", f"{r['step_s'] / peer[r['subject']]:.2f}",
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


TABLES = {
    "cpp": of_cpp,
    "generation": of_generation,
    "ops": of_ops,
    "population": of_population,
    "experts": of_experts,
    "training": of_training,
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
            print(f"wrote {FIGURES[name](rows).relative_to(HERE.parent)}")
        text = text.replace("{{" + name + "}}", table(rows) if rows else "Not measured yet.")
        facts = f"{rows[-1]['machine']}; commit {rows[-1]['commit']}; `{rows[-1]['command']}`" if rows else ""
        text = text.replace("{{" + name + " facts}}", facts)
    (DOCS / "benchmarks.md").write_text(text)
    print("wrote docs/benchmarks.md")


if __name__ == "__main__":
    main()
