"""A picture of a run's history: accuracy, reward and KL by step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2kernels import InputError, PackageError

FORMATS: tuple[str, ...] = (".png", ".svg", ".pdf")
UPPER: dict[str, str] = {
    "accuracy": "accuracy, training",
    "eval_accuracy": "accuracy, held out",
    "reward": "reward, training",
}
"""{column: its name in the legend}."""


def check(path: str | os.PathLike[str]) -> Path:
    """The path of a picture. Raises InputError for another kind of file, PackageError without matplotlib."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"a curve is written to {' or '.join(FORMATS)}, not to {path.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise PackageError(f"a curve needs the package matplotlib: pip install matplotlib ({e})") from e
    return path


def plot(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw accuracy and reward by step, and the KL below them if the history has one.

    history: rows with "step" and the columns of logs, as `history.read` gives them
    Returns the path. Raises as `check`, and InputError for a history without training logs.
    """
    path = check(path)
    from matplotlib.figure import Figure

    if not any("accuracy" in row for row in history):
        raise InputError("there is no step in the history to draw")
    measured = any("kl" in row for row in history)
    figure = Figure(figsize=(7, 5 if measured else 3.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1)) if measured else [figure.subplots()]
    upper = panels[0]
    for column, label in UPPER.items():
        _line(upper, history, column, label, marker="o" if column.startswith("eval") else None)
    if any("eval_accuracy_se" in row for row in history):
        rows = [row for row in history if "eval_accuracy_se" in row]
        low, high = ([r["eval_accuracy"] + sign * r["eval_accuracy_se"] for r in rows] for sign in (-1, 1))
        upper.fill_between([r["step"] for r in rows], low, high, alpha=0.2, color="C1", linewidth=0)
    if measured:
        _line(panels[1], history, "kl", "KL to the base model, nats a completion")
    upper.set_title(title)
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _line(axes: Any, history: Sequence[Mapping[str, Any]], column: str, label: str, marker: str | None = None) -> None:
    rows = [row for row in history if column in row]
    color = f"C{list(UPPER).index(column)}" if column in UPPER else "C3"
    axes.plot([r["step"] for r in rows], [r[column] for r in rows], label=label, marker=marker, color=color)
