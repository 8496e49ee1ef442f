"""`t2 decompose`: write the factors of a model to disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import InputError, MissingFileError
from t2kernels.cli.console import bar, is_missing, out
from t2kernels.cli.model_files import locate, reading
from t2kernels.cli.models import load, parse_device, parse_dtype, parse_rank

if TYPE_CHECKING:
    from t2kernels import Factors


def decompose(
    model: str = typer.Argument(
        help="The directory of a checkpoint, a .gguf file, 'tiny', or the id of a model on the Hugging Face hub.",
        show_default=False,
    ),
    into: Path = typer.Option(
        ..., "--out", "-o", help="Directory to write to. A run that was interrupted continues there."
    ),
    rank: str = typer.Option(
        None,
        help="Leading components to keep: 'all', a number, or a fraction of min(M, N).  \\[default: 1/16 in the "
        "checkpoint's dtype for models of 512 and wider; else, and for int8 and vllm, all]",
        show_default=False,
    ),
    targets: str = typer.Option("all", help="'all', 'mlp', 'attention', or a regular expression on matrix names."),
    dtype: str = typer.Option(
        None,
        help="Dtype of U and V: float32, bfloat16 or float16.  \\[default: float32]",
        show_default=False,
    ),
    format: str = typer.Option(
        None,
        help="Format of U and V: fp32, bf16, fp16 or int8. vllm: a whole checkpoint in factored form, for vLLM.",
        show_default=False,
    ),
    max_error: float = typer.Option(
        None,
        help="Largest relative error of a matrix; int8 adds columns to reach it.  "
        "\\[default: about the error of int8 weights]",
        show_default=False,
    ),
    device: str = typer.Option(None, help="Where to compute.  \\[default: a GPU if there is one]", show_default=False),
    workers: int = typer.Option(
        None,
        min=1,
        help="Matrices to decompose at once.  \\[default: enough to keep the cores busy]",
        show_default=False,
    ),
) -> None:
    """Decompose a checkpoint into frozen factors W = U diag(sigma) Vᵀ, without loading the whole model.

    [dim]$[/] t2 decompose meta-llama/Llama-3.1-8B --out factors/llama --rank 256 --dtype bfloat16

    [dim]$[/] t2 decompose ./checkpoint --out factors/mine --targets mlp --format int8 --max-error 0.01

    [dim]$[/] t2 decompose ./checkpoint --out factored/mine --format vllm --dtype bfloat16
    """
    import t2kernels as t2

    if is_missing(model):
        raise MissingFileError(f"no checkpoint at {model}")
    start, make = time.perf_counter(), t2.decompose
    wanted = {"rank": parse_rank(rank), "targets": targets, "device": parse_device(device), "workers": workers}
    wanted |= {"dtype": None if dtype is None else parse_dtype(dtype), "format": format, "max_error": max_error}
    files = locate(model)  # after the options, which are looked at first
    source = load(model).model if files.gguf else files.source  # transformers makes tensors of its own of a GGUF file
    if rank is None and format is None:
        wanted |= _budget(model, source, targets, wanted["dtype"])
    if format == "vllm":
        from t2kernels.integrations.vllm.engine.model_folder import write_checkpoint

        make = write_checkpoint
        if wanted.pop("rank") is not None:
            raise InputError(f"--rank {rank}: the factored form needs every component; leave it out")
        if files.gguf:
            raise InputError(f"--format vllm: {model} is a GGUF file; give the directory of its original checkpoint")
        del wanted["format"]
    with bar("[dim]{task.fields[name]}[/]") as progress:
        task = progress.add_task("decomposing", total=None, name="reading the checkpoint")
        factors = make(
            source,
            into,
            **wanted,
            progress=lambda name, done, total: progress.update(task, completed=done, total=total, name=name),
        )
        progress.update(task, name="")
    size = sum(f.stat().st_size for f in into.rglob("*") if f.is_file()) / 2**20
    worst = max(factors.manifest["matrices"].items(), key=lambda item: item[1]["error"])
    out.print(
        f"{len(factors)} matrices, {sum(factors.ranks.values()):,} components, {size:,.1f} MiB in {into}, "
        f"{time.perf_counter() - start:.1f} s; "
        f"largest ||W - U diag(sigma) Vᵀ|| / ||W|| is {worst[1]['error']:.2g} ({worst[0]})"
    )
    if format == "int8":
        out.print(int8_facts(factors))


def _budget(name: str, source: Any, targets: str, dtype: Any) -> dict[str, Any]:
    """{rank, dtype} that keep the factors of a wide model far below the size of its checkpoint; {} for a small one.

    A layer casts the factors to the dtype of its weight, so factors in the checkpoint's dtype lose nothing there.
    """
    from transformers import AutoConfig

    from t2kernels.factors.checkpoint import meta_model
    from t2kernels.factors.matrices import find_matrices, usual_rank

    if isinstance(source, str):
        if not Path(source, "config.json").is_file():
            return {}  # `decompose` says what is missing
        with reading(name):
            config = AutoConfig.from_pretrained(source)
            source = meta_model(config)
            stored = getattr(config, "dtype", None)
    else:
        stored = source.dtype
    rank = usual_rank(m.shape for m in find_matrices(source, targets).values())
    return {} if rank is None else {"rank": rank, "dtype": dtype or stored}


def int8_facts(factors: Factors) -> str:
    """The size and the error of int8 factors, in a sentence."""
    records = [factors.manifest["matrices"][name] for name in factors]
    columns, rank = sum(r["columns"] for r in records), sum(r["rank"] for r in records)
    worst = max(records, key=lambda r: r["format_error"])
    return (
        f"int8: {columns - rank:,} columns more than components (+{(columns - rank) / rank:.1%}); largest relative "
        f"error {worst['format_error']:.2g}, and an int8 weight with one step a row has {worst['dense_int8_error']:.2g}"
    )
