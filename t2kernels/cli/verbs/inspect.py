"""`t2 inspect`: show the content of an expert, of factors or of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from t2kernels import MissingFileError
from t2kernels.cli.console import is_missing, out, show, table
from t2kernels.cli.model_files import GGUF, TINY, locate, reading


def inspect(
    path: str = typer.Argument(
        help="The file of an expert, a directory of factors or of a checkpoint, a .gguf file, 'tiny', or the id of a "
        "model on the hub."
    ),
    rows: int = typer.Option(0, min=0, help="Show only so many matrices; 0 shows all."),
) -> None:
    """Show the content of an expert, of a directory of factors or of a model.

    [dim]$[/] t2 inspect experts/math                 [dim]an expert: its training, and z of each matrix[/]

    [dim]$[/] t2 inspect factors/llama                [dim]factors: rank, error and energy of each matrix[/]

    [dim]$[/] t2 inspect meta-llama/Llama-3.1-8B      [dim]a model, by its config: the numbers an expert trains[/]
    """
    from t2kernels.experts.files import find_file

    place = Path(path).expanduser()
    if path == TINY or place.suffix == GGUF:
        _model(path)
    elif find_file(place) is not None:
        _expert(place, rows)
    elif path and (place / "manifest.json").is_file():
        _factors(place, rows)
    elif is_missing(path):
        raise MissingFileError(f"no expert, no factors and no checkpoint at {path}")
    else:
        _model(path)


def _expert(path: Path, rows: int) -> None:
    import t2kernels as t2

    expert = t2.Expert.load(path)
    _facts({k: v for k, v in expert.manifest.items() if k != "fingerprints"}, f"expert {path}")
    title = f"z: {expert.numel:,} numbers in {len(expert.z)} matrices; 1 is the base model"
    head, short = _shorten(expert.z)
    shown = table(head, "z", "mean", "std", "min", "max", "|z-1|", "at")
    for name, z in _first(expert.z, rows):
        change = (z - 1).abs()
        stats = z.mean(), z.std(correction=0), z.min(), z.max(), change.max()
        shown.add_row(short(name), str(len(z)), *(f"{s:.3f}" for s in stats), str(int(change.argmax())))
    show(title, shown, "z: how many · |z-1|: the largest, and the component it is at")
    known = len(expert.manifest.get("fingerprints", {})), len(expert.sketch)
    if any(known):
        out.print(
            f"It has {known[0]} fingerprints and {known[1]} sketches of its factors: a model with other singular "
            "vectors refuses it."
        )
    else:
        out.print("It has no fingerprint and no sketch: any model with matrices of these names and sizes accepts it.")


def _factors(path: Path, rows: int) -> None:
    import t2kernels as t2

    factors = t2.Factors.load(path)
    _facts({k: v for k, v in factors.manifest.items() if k not in ("matrices", "order")}, f"factors {path}")
    title = f"{len(factors)} matrices, {sum(factors.ranks.values()):,} components"
    head, short = _shorten(factors.ranks)
    matrices = factors.manifest["matrices"]
    int8 = any(matrices[name].get("dtype") == "int8" for name in factors)
    shown = table(
        head, "M x N", "rank", "error", *(("columns", "int8", "W int8") if int8 else ("energy", "sigma_1", "last"))
    )
    for name, rank in _first(factors.ranks, rows):
        (m, n), sigma = factors.shape(name), factors.sigmas[name]
        record = matrices[name]
        error = record.get("error")
        facts = [
            str(record.get("columns", "")),
            *(f"{record[k]:.1e}" if k in record else "" for k in ("format_error", "dense_int8_error")),
        ]
        shown.add_row(
            short(name),
            f"{m}x{n}",
            f"{rank}/{min(m, n)}",
            "?" if error is None else f"{error:.1e}",
            # The error is relative to ||W||, Frobenius.
            *(
                facts
                if int8
                else ("?" if error is None else f"{1 - error**2:.1%}", f"{sigma[0]:.3g}", f"{sigma[-1]:.3g}")
            ),
        )
    note = "error: ||W - U diag(sigma) Vᵀ|| / ||W||, Frobenius"
    if int8:
        measured = next(matrices[name]["measured"] for name in factors if "columns" in matrices[name])
        note += f" · int8: {measured} · W int8: that of W in int8, one step a row"
    else:
        note += " · energy: the share of ||W||² that the components hold"
    show(title, shown, note)


def _model(path: str) -> None:
    from transformers import AutoConfig

    import t2kernels as t2
    from t2kernels.factors.checkpoint import meta_model

    files = locate(path)
    with reading(path):
        config = AutoConfig.from_pretrained(files.source, **files.arguments)
    model = meta_model(config)
    total = sum(p.numel() for p in model.parameters())
    title = f"{escape(path)}: {type(model).__name__}, {total:,} parameters"
    shown = table("targets", "matrices", "numbers in them", "SVF expert", "LoRA r=16", "LoRA / SVF")
    for targets in ("attention", "mlp", "all"):
        try:
            count = t2.count_parameters(model, targets)
        except ValueError as e:
            shown.add_row(targets, escape(str(e).partition(";")[0]))
            continue
        shown.add_row(
            targets,
            f"{count.matrices:,}",
            f"{count.dense:,}",
            f"{count.svf:,}",
            f"{count.lora:,}",
            f"{count.lora / count.svf:.0f}x",
        )
    show(title, shown, "SVF expert, LoRA r=16: how many numbers are trained for one task")


def _facts(facts: Mapping[str, Any], title: str) -> None:
    shown = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        if value is not None:
            shown.add_row(escape(str(name)), escape(str(value)))
    show(escape(title), shown)


def _shorten(names: Iterable[str]) -> tuple[str, Callable[[str], str]]:
    """(head of the column with the common start of all names, function name -> the rest of it)."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    prefix = "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    return f"matrix {prefix}".strip(), lambda name: name.removeprefix(prefix) or name


def _first(mapping: Mapping[str, Any], rows: int) -> list[tuple[str, Any]]:
    """The first `rows` items, or all for 0, in the order of layers, which files do not keep."""
    items = sorted(mapping.items(), key=lambda item: _parts(item[0]))
    return items[:rows] if rows else items


def _parts(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
