"""`t2 export`: an expert as a LoRA adapter for other engines, or merged into a checkpoint. `t2 push`: to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import InputError, MissingFileError
from t2kernels.cli.console import bar, out
from t2kernels.cli.model_files import TINY, locate
from t2kernels.cli.models import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    find_expert,
    load,
    parse_device,
    parse_dtype,
)
from t2kernels.experts.names import MIX, parse_mixture

if TYPE_CHECKING:
    from t2kernels import Expert, Factors, LoraAdapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank may have (vllm/config/lora.py)."""


def export(
    expert: str = typer.Argument(
        help="An expert as in other verbs, or a mixture 'mix:math=.7,code=.3'. With --all a folder of experts, or "
        "'tiny': those of the built-in model.",
        show_default=False,
    ),
    into: Path = typer.Argument(
        help="The folder to write. With --all a folder for each expert is written into it.",
        metavar="DIR",
        show_default=False,
    ),
    to: str = typer.Option("lora", help="'lora': an adapter of PEFT. 'merged': a checkpoint with the expert in it."),
    every: bool = typer.Option(False, "--all", help="Every expert of a folder."),
    rank: int = typer.Option(
        None,
        min=1,
        help="Largest rank of the adapter.  \\[default: exact, all components that change]",
        show_default=False,
    ),
    error: float = typer.Option(
        None,
        min=0.0,
        max=1.0,
        help="Take as small a rank as leaves this relative error in each matrix (Frobenius).",
        show_default=False,
    ),
    uniform: bool = typer.Option(
        False, "--uniform", help="One rank for all matrices, as SGLang and llama.cpp need it; filled with zeros."
    ),
    model: str = ModelOption,
    factors: Path = typer.Option(
        None, help="A directory written by 't2 decompose'.  \\[default: decompose now]", show_default=False
    ),
    dtype: str = DtypeOption,
    device: str = DeviceOption,
) -> None:
    """Write an expert for engines that know nothing of it: as a LoRA adapter, or merged into a checkpoint.

    [dim]$[/] t2 export math lora/math                             [dim]exact: for PEFT and vLLM[/]

    [dim]$[/] t2 export math lora/math --rank 64 --uniform         [dim]for SGLang and llama.cpp as well[/]

    [dim]$[/] t2 export experts/mine merged --to merged --model ./checkpoint

    [dim]$[/] t2 export experts lora --all --error 0.05 --model ./checkpoint
    """
    if to not in ("lora", "merged"):
        raise InputError(f"--to {to}: wanted 'lora' or 'merged'")
    if to == "merged" and (rank is not None or error is not None or uniform):
        raise InputError("--rank, --error and --uniform are for --to lora: a merged expert is exact")
    if into.is_file():
        raise InputError(f"{into} is a file; give the folder to write")
    wanted = None if dtype is None else parse_dtype(dtype)
    found = _folder(expert) if every else {"": _expert(expert, model)}
    places = {name: into / name if every else into for name in found}
    if to == "merged":
        for name, one in found.items():
            _merge(one, places[name], model, factors, dtype, device)
        return
    given = _factors(found, model, factors, device)
    for name, one in found.items():
        adapter = one.to_lora(given, rank, error, uniform)
        adapter.save(places[name], *([] if wanted is None else [wanted]))
        out.print(_facts(adapter, places[name]), soft_wrap=True, markup=False)


def push(
    expert: str = typer.Argument(help="An expert as in other verbs, or a mixture.", show_default=False),
    repo: str = typer.Argument(help="The repository, USER/NAME. It is made if there is none.", show_default=False),
    file: str = typer.Option(
        "expert.safetensors", help="The name of the file there; several experts may be in one repository."
    ),
    private: bool = typer.Option(False, "--private", help="A new repository is private."),
    model: str = ModelOption,
) -> None:
    """Upload an expert to the Hugging Face hub, with a model card made of its manifest.

    [dim]$[/] t2 push experts/mine user/mine                       [dim]then: t2 generate -e user/mine ...[/]

    [dim]$[/] t2 push experts/math user/experts --file math        [dim]then: user/experts:math[/]
    """
    out.print(_expert(expert, model).push_to_hub(repo, file, private), soft_wrap=True, markup=False)


def _expert(name: str, model: str) -> Expert:
    import t2kernels as t2

    if not name.startswith(MIX):
        return t2.Expert.load(find_expert(name, model))
    return t2.Expert.mix([(t2.Expert.load(find_expert(n, model)), a) for n, a in parse_mixture(name).items()])


def _folder(name: str) -> dict[str, Expert]:
    import t2kernels as t2

    files = t2.tiny.experts() if name == TINY else {p.stem: p for p in sorted(Path(name).glob("*.safetensors"))}
    if not files:
        raise MissingFileError(
            f"{name} is no folder with experts (.safetensors files); with --all, wanted one, or 'tiny'"
        )
    return {n: t2.Expert.load(p) for n, p in files.items()}


def _factors(experts: dict[str, Expert], model: str, factors: Path | None, device: str | None) -> Factors:
    """Those of the matrices that the experts have, from a directory or computed now."""
    import t2kernels as t2

    if factors is not None:
        return t2.Factors.load(factors)
    files = locate(model)
    ranks = [r for e in experts.values() for r in e.ranks.values()]
    names = {n for e in experts.values() for n in e.z}
    with bar("[dim]{task.fields[name]}[/]") as progress:
        task = progress.add_task("decomposing", total=None, name="")
        return t2.decompose(
            load(model).model if files.gguf else files.source,
            rank=max(ranks, default=1),
            targets=lambda name, module: name in names,
            device=parse_device(device),
            progress=lambda name, done, total: progress.update(task, completed=done, total=total, name=name),
        )


def _merge(expert: Expert, into: Path, model: str, factors: Path | None, dtype: str | None, device: str | None) -> None:
    import t2kernels as t2

    if into.is_dir() and any(into.iterdir()):
        raise InputError(f"{into} is not empty; give a new folder for the checkpoint")
    loaded = load(model, dtype, device)
    t2.patch_model(
        loaded.model,
        targets=lambda name, module: name in expert.z,
        rank=max(expert.ranks.values()),
        form="delta",
        factors="fp32" if factors is None else factors,
        rows=2,
    )
    t2.unpatch_model(loaded.model, expert=expert)
    loaded.model.save_pretrained(into)
    loaded.tokenizer.save_pretrained(into)
    size = sum(f.stat().st_size for f in into.iterdir()) / 2**20
    out.print(f"{into}: a checkpoint, {size:,.1f} MiB; load it with transformers, or any engine", soft_wrap=True)


def _facts(adapter: LoraAdapter, into: Path) -> str:
    """What was written, and what engines ask of it."""
    ranks: Any = adapter.ranks.values()
    size = sum(f.stat().st_size for f in into.iterdir()) / 2**20
    need = next((r for r in VLLM_RANKS if r >= max(ranks)), None)
    vllm = (
        f"vLLM: --max-lora-rank {need}" if need else f"vLLM takes ranks up to {VLLM_RANKS[-1]}: use --rank or --error"
    )
    even = min(ranks) == max(ranks)
    others = "" if even else "; SGLang and llama.cpp need --uniform"
    spread = f"rank {max(ranks)}" if even else f"ranks {min(ranks)} to {max(ranks)}"
    return (
        f"{into}: {len(adapter.pairs)} matrices, {spread}, {size:,.1f} MiB; "
        f"largest relative error {max(adapter.errors.values()):.2g}; {vllm}{others}"
    )
