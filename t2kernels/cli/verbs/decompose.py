"""`t2 decompose`: a model's factors, once, on disk."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from t2kernels.cli.console import bar, is_missing, out


def decompose(
    model: str = typer.Argument(
        help="A checkpoint's directory, or a model's id on the Hugging Face hub.", show_default=False
    ),
    into: Path = typer.Option(
        ..., "--out", "-o", help="Directory to write to; a run that was cut short goes on where it stopped."
    ),
    rank: str = typer.Option("all", help="Leading components to keep: 'all', a number, or a fraction of min(M, N)."),
    targets: str = typer.Option("all", help="'all', 'mlp', 'attention', or a regular expression on matrix names."),
    dtype: str = typer.Option(
        None,
        help="Of U and V as they are kept: float32, bfloat16 or float16.  \\[default: float32]",
        show_default=False,
    ),
    format: str = typer.Option(
        None,
        help="The same by name: fp32, bf16, fp16, or int8. vllm: a whole checkpoint in factored form, for vLLM.",
        show_default=False,
    ),
    max_error: float = typer.Option(
        None,
        help="Of a matrix, relative; int8 spends columns until it holds.  \\[default: about that of an int8 weight]",
        show_default=False,
    ),
    device: str = typer.Option(None, help="Where to compute.  \\[default: a GPU if there is one]", show_default=False),
    workers: int = typer.Option(
        None, help="Matrices at a time.  \\[default: as many as keep the cores busy]", show_default=False
    ),
) -> None:
    """Decompose a checkpoint into frozen factors W = U diag(sigma) Vᵀ, one matrix at a time; the model is never loaded whole.

    [dim]$[/] t2 decompose meta-llama/Llama-3.1-8B --out factors/llama --rank 256 --dtype bfloat16

    [dim]$[/] t2 decompose ./checkpoint --out factors/mine --targets mlp --format int8 --max-error 0.01

    [dim]$[/] t2 decompose ./checkpoint --out factored/mine --format vllm --dtype bfloat16
    """
    import t2kernels as t2

    if is_missing(model):
        raise FileNotFoundError(f"no checkpoint at {model}")
    start, make = time.perf_counter(), t2.decompose
    wanted = {"rank": parse_rank(rank), "targets": targets, "device": device, "workers": workers}
    wanted |= {"dtype": None if dtype is None else parse_dtype(dtype), "format": format, "max_error": max_error}
    if format == "vllm":
        from t2kernels.integrations.vllm.engine.model_folder import write_checkpoint

        make = write_checkpoint
        if wanted.pop("rank") is not None:
            raise ValueError(f"--rank {rank}: the factored form needs every component; leave it out")
        del wanted["format"]
    with bar("[dim]{task.fields[name]}[/]") as progress:
        task = progress.add_task("decomposing", total=None, name="reading the checkpoint")
        factors = make(
            model,
            into,
            **wanted,
            progress=lambda name, done, total: progress.update(task, completed=done, total=total, name=name),
        )
        progress.update(task, name="")
    size = sum(f.stat().st_size for f in into.rglob("*") if f.is_file()) / 2**20
    worst = max(factors.manifest["matrices"].items(), key=lambda item: item[1]["error"])
    out.print(
        f"{len(factors)} matrices, {sum(factors.ranks.values()):,} components, {size:,.1f} MiB in {into}, {time.perf_counter() - start:.1f} s; "
        f"largest ||W - U diag(sigma) Vᵀ|| / ||W|| is {worst[1]['error']:.2g} ({worst[0]})"
    )
    if format == "int8":
        out.print(int8_facts(factors))


def int8_facts(factors) -> str:
    """What int8 factors cost and lose, in a sentence."""
    records = [factors.manifest["matrices"][name] for name in factors]
    columns, rank = sum(r["columns"] for r in records), sum(r["rank"] for r in records)
    worst = max(records, key=lambda r: r["format_error"])
    return (
        f"int8: {columns - rank:,} columns more than components (+{(columns - rank) / rank:.1%}); largest relative error "
        f"{worst['format_error']:.2g}, where an int8 weight with one step a row has {worst['dense_int8_error']:.2g}"
    )


def parse_rank(text: str | None) -> int | float | None:
    """ "all" -> None, "256" -> 256, "0.25" or "1/4" -> 0.25. Raises ValueError."""
    if text is None or text == "all":
        return None
    try:
        if "/" in text:
            above, below = text.split("/")
            return int(above) / int(below)
        return float(text) if "." in text else int(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--rank {text}: wanted 'all', a number of components such as 256, or a fraction such as 0.25 or 1/4"
        ) from None


def parse_dtype(text: str):
    """A floating-point torch dtype by its name. Raises ValueError."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(text, getattr(torch, text, None))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"--dtype {text}: wanted float32, bfloat16 or float16{'; int8 factors: --format int8' if text == 'int8' else ''}"
        )
    return dtype
