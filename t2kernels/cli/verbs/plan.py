"""`t2 plan`: what a model with experts takes on which GPUs, from its config alone."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import MissingFileError
from t2kernels.cli.console import is_missing, out, show, table
from t2kernels.cli.model_files import locate, reading
from t2kernels.cli.models import parse_dtype, parse_rank

if TYPE_CHECKING:
    from t2kernels.patching.budget import Plan


def plan(
    model: str = typer.Argument(
        help="A config.json, the directory of a checkpoint, 'tiny', or the id of a model on the hub.",
        show_default=False,
    ),
    gpu: str = typer.Option("h200", help="a100, h100, h200 or l40s."),
    count: int = typer.Option(1, min=1, help="GPUs; the layers are split over them."),
    experts: int = typer.Option(64, min=1, help="Experts in memory at the same time."),
    rank: str = typer.Option("1/16", help="Components that an expert can rescale: 'all', a number, or a fraction."),
    form: str = typer.Option("auto", help="'auto', 'factored' or 'delta'."),
    targets: str = typer.Option("all", help="'all', 'mlp', 'attention', or a regular expression on matrix names."),
    context: int = typer.Option(8192, min=1, help="Tokens of a request."),
    batch: int = typer.Option(1, min=1, help="Requests at a time."),
    dtype: str = typer.Option(
        None, help="Of weights, factors and cache.  \\[default: the config's]", show_default=False
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON; sizes in bytes, times in seconds."),
) -> None:
    """Plan a model with experts: bytes, layout, decomposition, predicted times, and whether it fits. Loads no weights.

    [dim]$[/] t2 plan meta-llama/Llama-3.1-70B --gpu h200 --count 2 --experts 1000

    [dim]$[/] t2 plan ./config.json --batch 32 --context 4096 --json
    """
    from t2kernels.patching.budget import plan as make

    wanted = None if dtype is None else parse_dtype(dtype)
    made = make(_config(model), gpu, count, experts, parse_rank(rank), form, targets, context, batch, wanted)
    if json:
        typer.echo(js.dumps(made.to_dict(), indent=1))
    else:
        _print(model, made)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    place = Path(name).expanduser()
    if place.suffix == ".json":
        if not place.is_file():
            raise MissingFileError(f"no config at {name}")
        with reading(name):
            return AutoConfig.from_pretrained(place)
    if is_missing(name):
        raise MissingFileError(f"no checkpoint and no config at {name}")
    files = locate(name)
    with reading(name):
        return AutoConfig.from_pretrained(files.source, **files.arguments)


def _gb(n: float) -> str:
    return f"{n / 1e9:,.2f}" if n < 1e11 else f"{n / 1e9:,.0f}"


def _print(name: str, p: Plan) -> None:
    unit, word = (1e9, "GB of 1e9") if p.model > 5e9 else (1e6, "MB of 1e6")
    shown = table("matrix", "of", "M x N", "form", "rank", "base", "factors", "rows", "a GPU")
    for k in p.kinds:
        sizes = (f"{n / unit:,.1f}" for n in (k.base, k.factors, k.rows, k.gpu))
        mark = "*" if k.split == "columns of V" else ""
        shown.add_row(k.kind + mark, str(k.count), f"{k.M}x{k.N}", k.form, str(k.rank), *sizes)
    sums = (f"{n / unit:,.1f}" for n in (p.base, p.factors, p.rows, sum(k.gpu for k in p.kinds)))
    shown.add_row("sum", "", "", "", "", *sums)
    note = f"{word} bytes · over GPUs, the rows of U are split and V is on each, or (*) the columns of V and U is"
    show(f"{name} in {p.dtype} with {p.experts} experts on {p.count} {p.gpu}", shown, note)
    out.print(
        f"other weights {_gb(p.other)} GB, KV cache of {p.batch} x {p.context} tokens {_gb(p.kv_cache)} GB, "
        f"an expert's file {p.expert_file / 1e6:,.2f} MB",
        f"a GPU holds {_gb(p.gpu_bytes)} of {_gb(p.usable)} usable GB: {'it fits' if p.fits else 'it does not fit'}; "
        + "; ".join(p.needs),
        f"predicted by arithmetic, not measured: a decode step {1e3 * p.decode_seconds:,.2f} ms "
        f"({p.decode_seconds / p.decode_dense_seconds:.2f} times the base model's), "
        f"a prompt of {p.context} tokens {p.prefill_seconds:,.2f} s",
        f"t2 decompose: about {p.decompose_seconds / 60:,.0f} minutes of one CPU core (measured rates of one machine), "
        f"{_gb(p.decompose_memory)} GB of memory a matrix, {_gb(p.factors_on_disk)} GB on disk",
        sep="\n",
        soft_wrap=True,
    )
