"""Write docs/explanation/paper.md from the committed rows of paper.py and rl.py: `python benchmarks/paper_tables.py`.
Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from math import sqrt
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "explanation" / "paper.md"
PAPER = {
    "trained": "Llama3-8B, GSM8K / MBPP-Pro / ARC-Easy: base 75.89 / 64.65 / 88.59, LoRA 77.18 / 67.68 / 88.97, SVF "
    "79.15 / 66.67 / 89.56. "
    "Mistral-7B: 42.83 / 49.50 / 81.65, 44.66 / 51.52 / 81.19, 49.74 / 51.52 / 85.14.",
    "unseen": "Llama3-8B, MATH / HumanEval / ARC-Challenge: base 24.54 / 60.98 / 80.63, LoRA 24.12 / 52.44 / 81.06, "
    "few-shot 25.47 / 62.99 / 82.61.",
    "parameters": "Llama3-8B: LoRA 6.82 M (q, v) and 35.13 M (with the MLP), SVF 0.16 M and 0.58 M.",
    "cost": "first pass, in shares of the second: 13 % (MATH), 19 % (HumanEval), 47 % (ARC-Challenge).",
    "transfer": "z of Llama3-8B helps Mistral-7B in two tasks of three; shuffled it hurts.",
}


def read(name: str) -> list[dict]:
    path = HERE / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean ± standard error over seeds; one value as it is."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / sqrt(len(values)):.3f}"


def trained(rl: list[dict], names: tuple[str, ...] = ("math", "code", "reason")) -> str:
    cells = defaultdict(list)
    for row in rl:
        cells[row["arm"], row["task"]].append(row)
    wanted = {"base model": None, "LoRA r=16, the same RL": "lora r=16", "SVF": "svf R", "SVF, first R/8": "svf R/8"}
    rows = []
    for label, arm in wanted.items():
        of = [cells[arm or "svf R", task] for task in names]
        if not all(of):
            continue
        values = [[r["accuracy" if arm else "base_accuracy"] for r in cell] for cell in of]
        rows.append(
            [label, f"{of[0][0]['numbers']:,}" if arm else 0, *(spread(v) if arm else f"{v[0]:.3f}" for v in values)]
        )
    return table(["", "numbers", *names], rows)


def modules(rl: list[dict]) -> str:
    cells = defaultdict(list)
    for row in rl:
        if row["task"] == "code" and row["arm"] in ("svf R", "svf mlp", "svf attention"):
            cells[row["arm"]].append(row)
    label = {"svf R": "all", "svf mlp": "MLP (the release)", "svf attention": "attention"}
    rows = [
        [label[arm], f"{of[0]['numbers']:,}", spread([r["accuracy"] for r in of]), len(of)] for arm, of in cells.items()
    ]
    return table(["matrices", "numbers", "code", "seeds"], rows)


class Unseen:
    """The unseen tasks: rows of `routes` (one a task) and of `few` (one a task and seed)."""

    def __init__(self, rows: list[dict]):
        self.routes = {r["task"]: r for r in rows if r["part"] == "routes"}
        self.few = defaultdict(list)
        for r in sorted((r for r in rows if r["part"] == "few"), key=lambda r: r["seed"]):
            self.few[r["task"]].append(r)
        self.mixings = {r["task"]: r for r in rows if r["part"] == "mixings"}
        self.tasks = [
            t
            for t in ("sub", "digits", "lookadd", "lookops", "add6", "ops5", "hop5", "revadd")
            if t in self.routes and self.few[t]
        ]

    def arm(self, task: str, name: str) -> list[float]:
        """Accuracies of an arm, one a seed where it depends on the examples."""
        fixed, few = self.routes[task]["accuracy"], self.few[task]
        if name == "best single":
            return [fixed[r["facts"]["best_single"] or "base"] for r in few]
        if name.startswith("cautious "):
            of = name.removeprefix("cautious ")
            return [r["accuracy"][of] if self._worth(r["facts"][of]) else fixed["base"] for r in few]
        if name.startswith("seed 0 "):
            return self.arm(task, name.removeprefix("seed 0 "))[:1]
        if name in fixed:
            return fixed[name] if isinstance(fixed[name], list) else [fixed[name]]
        if name in self.mixings.get(task, {}).get("accuracy", {}):
            return [self.mixings[task]["accuracy"][name]]
        # Where the search saw no right answer there is nothing to learn from, and its mixture stays.
        return [r["accuracy"].get(name, r["accuracy"]["cem"]) for r in few]

    @staticmethod
    def _worth(fact: dict, caution: float = 2.0) -> bool:
        return fact["gain"] > caution * fact["error"]

    def line(self, label: str, name: str) -> list:
        values = [self.arm(t, name) for t in self.tasks]
        means = [statistics.mean(v) if v else float("nan") for v in values]
        return [label, *(spread(v) for v in values), f"{statistics.mean(means):.3f}"]

    def mean(self, name: str) -> float:
        return statistics.mean(statistics.mean(self.arm(t, name)) for t in self.tasks)


ROUTES = {
    "base model": "base",
    "LoRA of the related trained task": "lora",
    "prompt": "prompt",
    "prompt, margin by validation": "prompt, margin",
    "classification expert": "classifier",
    "classification expert, margin by the 16 shots": "classifier, margin by shots",
    "zero-shot, confidence": "zero-shot confidence",
    "zero-shot, likelihood of the prompt": "zero-shot likelihood",
    "router: mixture by probability": "router",
}
SHOTS = {
    "few-shot CEM": "cem",
    "few-shot CEM, cautious (the default)": "cautious cem",
    "the same search over shuffled experts": "shuffled",
    "shuffled experts, cautious": "cautious shuffled",
    "best single expert by the same shots": "best single",
    "LoRA fine-tuned on the same shots": "lora on the shots",
    "CEM, then 15 gradient steps on z": "cem + gradient",
}
MIXINGS = {
    "deltas, an alpha an expert": "seed 0 cem",
    "deltas, an alpha an expert and layer": "per layer",
    "z": "z",
    "z, normalised": "normalised",
    "logits, the release's settings": "release",
}


def mixed(rows: list[dict]) -> str:
    found = next((r for r in rows if r["part"] == "mixed"), None)
    if found is None:
        return "not measured\n"
    out = []
    for name, accuracy in found["accuracy"].items():
        cost = [
            f"{found[k][name]:.1%}" if name in found[k] else ""
            for k in ("first_pass", "first_pass_of_long", "first_pass_of_one_long")
        ]
        right = found["routed_right"].get(name)
        out.append([name, f"{accuracy:.3f}", "" if right is None else f"{right:.3f}", *cost])
    head = [
        "",
        f"accuracy (N = {found['N']})",
        "sent to the right expert",
        "cost, of these answers",
        "of 96 tokens, 96 at once",
        "of 96 tokens, one",
    ]
    return table(head, out)


def transfers(rows: list[dict]) -> str:
    parts = []
    for r in (r for r in rows if r["part"] == "transfer"):
        a = r["alignment"]
        of = "a sibling (trained on for 120 steps)" if r["task"] == "web" else f"another model ({r['task']})"
        parts.append(
            f"To {of}: mean |cos| of matching singular vectors {a['all']:.3f}, of the first 16 {a['leading']:.3f}; "
            f"chance {a['chance']:.3f}. N = {r['N']}.\n"
        )
        lines = []
        for name, v in r["accuracy"].items():
            controls = [v[k] for k in v if k.startswith("shuffled")]
            lines.append(
                [
                    name,
                    *(f"{v[k]:.3f}" for k in ("source", "base", "expert", "half")),
                    spread(controls),
                    f"{v['half shuffled']:.3f}",
                ]
            )
        parts.append(
            table(
                [
                    "expert",
                    "on its own model",
                    "target base",
                    "target with z",
                    "half z",
                    "shuffled z (3)",
                    "half shuffled z",
                ],
                lines,
            )
        )
    return "\n".join(parts) or "not measured\n"


def speeds(rows: list[dict]) -> str:
    out = []
    newest = {
        (r["task"], r["threads"]): r for r in rows if r["part"] == "speed"
    }  # on free cores, where it was measured again
    for r in newest.values():
        for dtype, mode, m in ((d, mode, m) for d, modes in r["modes"].items() for mode, m in modes.items()):
            s = m["seconds"]
            out.append(
                [
                    r["task"],
                    r["threads"],
                    dtype,
                    mode,
                    f"{s['batch']:.2f} s",
                    f"{m['one_at_a_time_over_batch']:.1f}x",
                    f"{m['rebuilt_over_batch']:.1f}x",
                    f"{m['five_over_three_experts'] - 1:+.1%}",
                    f"{s['mixing'] / s['batch']:.2%}",
                ]
            )
    head = [
        "task",
        "threads",
        "dtype",
        "score",
        "one batch",
        "one at a time takes",
        "weights rebuilt for each",
        "five experts, not three",
        "mixing and writing 32 rows",
    ]
    return table(head, out) if out else "not measured\n"


def main() -> None:
    rows = [r for r in read("paper.jsonl") if r["model"] == "tiny"]
    rl = read("rl.jsonl") + [r for r in rows if r["part"] == "trained"]
    unseen = Unseen(rows)
    head = ["", *unseen.tasks, "mean"]
    text = (HERE / "paper.md.in").read_text()
    blocks = {
        "trained": trained(rl),
        "modules": modules(rl),
        "routes": table(head, [unseen.line(label, name) for label, name in ROUTES.items()])
        if unseen.tasks
        else "not measured\n",
        "shots": table(head, [unseen.line(label, name) for label, name in {"base model": "base", **SHOTS}.items()])
        if unseen.tasks
        else "not measured\n",
        "mixings": table(head, [unseen.line(label, name) for label, name in MIXINGS.items()])
        if unseen.mixings
        else "not measured\n",
        "mixed": mixed(rows),
        "transfer": transfers(rows),
        "speed": speeds(rows),
        "machine": ", ".join(dict.fromkeys(r["machine"].split(",")[0] for r in rows)),
        "commits": ", ".join(dict.fromkeys(r["commit"] for r in rows)),
        **{f"paper {k}": v for k, v in PAPER.items()},
    }
    for key, block in blocks.items():
        text = text.replace("{{" + key + "}}", block.rstrip("\n"))
    OUT.write_text(text)


if __name__ == "__main__":
    main()
