"""`t2 tune`: check the kernels on this GPU or CPU and time them for a model's shapes, once, for `auto`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import InputError, MissingFileError, StateError
from t2kernels.cli.console import bar, comma_list, is_missing, out
from t2kernels.cli.model_files import locate, reading
from t2kernels.cli.models import parse_dtype

if TYPE_CHECKING:
    import torch

    from t2kernels.ops.tuning.tuner import Shape


def tune(
    model: str = typer.Argument(
        help="The directory of a checkpoint or the id of a model on the hub; only its config is read."
    ),
    ranks: str = typer.Option(
        "128,256", help="Components of the delta form to tune for, comma-separated; '' for none."
    ),
    factored: bool = typer.Option(True, metavar="", help="Tune the factored form, with all components, too."),
    dtype: str = typer.Option("bfloat16", help="Dtype of the model."),
    factors: str = typer.Option(
        "same,int8", help="Formats of the factors, comma-separated: 'same' as the model, 'int8', or a dtype."
    ),
    tokens: str = typer.Option(
        "1,8,32,128", help="Tokens of a forward to tune for, comma-separated. On a CPU they are fixed."
    ),
    device: str = typer.Option("cuda", help="Which GPU, or 'cpu': the C++ kernels."),
    folder: Path = typer.Option(
        None, help="Directory for the tables.  \\[default: the user's cache directory]", show_default=False
    ),
) -> None:
    """Check the Triton and CUDA kernels on this GPU against fp64, then time them for a model's shapes. Takes minutes.

    With --device cpu: the C++ kernels, beside torch. Then `auto` knows up to how many tokens they are faster here.

    [dim]$[/] t2 tune meta-llama/Llama-3.1-8B

    [dim]$[/] t2 tune ./checkpoint --ranks 64 --no-factored --factors same

    [dim]$[/] t2 tune ./checkpoint --device cpu --ranks 36 --no-factored
    """
    import torch
    from transformers import AutoConfig

    from t2kernels.ops.dispatch import device_of
    from t2kernels.ops.tuning.cpu import tune_cpu
    from t2kernels.ops.tuning.tuner import tune as run
    from t2kernels.ops.tuning.tuner import tune_cuda

    if is_missing(model):
        raise MissingFileError(f"{model}: no such directory")
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise StateError(
            f"t2 tune measures a GPU, and torch {torch.__version__} finds none here; --device cpu measures the CPU"
        )
    x = parse_dtype(dtype)
    formats = [x if f == "same" else torch.int8 if f == "int8" else parse_dtype(f) for f in comma_list(factors)]
    files, counts = locate(model), _numbers("--ranks", ranks)
    at = _numbers("--tokens", tokens)
    with reading(model):
        config = AutoConfig.from_pretrained(files.source, **files.arguments)
    wanted = shapes(config, counts, factored, x, formats)
    if on_cpu:
        with bar("[dim]{task.fields[name]}[/]") as progress:
            task = progress.add_task("checking, then timing", total=None, name="")
            told = lambda name, done, total: progress.update(task, completed=done, total=total, name=name)  # noqa: E731
            path = tune_cpu(wanted, folder=folder, progress=told)
        out.print(f"checked and tuned: {path}", soft_wrap=True)
        return
    triton, cuda = (device_of(torch.device(device)).unsupported(impl) is None for impl in ("triton", "cuda"))
    paths = []
    with bar("[dim]{task.fields[name]}[/]") as progress:
        task = progress.add_task("checking, then timing", total=None, name="")
        if triton or not cuda:  # if neither runs, this says why
            paths.append(
                run(
                    wanted,
                    device,
                    at,
                    folder,
                    progress=lambda name, done, total: progress.update(task, completed=done, total=total, name=name),
                )
            )
        if cuda:
            progress.update(task, total=None, name="the CUDA kernel")
            paths.append(tune_cuda(wanted, device, folder))
    for path in paths:
        out.print(f"checked and tuned: {path}", soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    """Parse "128,256" into [128, 256]. Raises InputError."""
    try:
        return [int(part) for part in comma_list(text)]
    except ValueError:
        raise InputError(f"{option} {text}: expected whole numbers, comma-separated") from None


def shapes(config: Any, ranks: list[int], factored: bool, x: torch.dtype, formats: list[torch.dtype]) -> list[Shape]:
    """The distinct calls of a patched model of this config, in both forms. Matrices of one input are one call."""
    from t2kernels.factors.checkpoint import meta_model
    from t2kernels.factors.matrices import find_matrices
    from t2kernels.layers.groups import shared_input
    from t2kernels.ops.tuning.tuner import Shape

    found: dict[Shape, None] = {}
    matrices = [m for m in find_matrices(meta_model(config)).values() if m.index is None]
    for _, run in groupby(matrices, lambda m: (shared_input(m.name) or m.name, m.shape[1])):
        members = list(run)
        N, M = members[0].shape[1], tuple(m.shape[0] for m in members)
        for f in formats:
            if factored:
                found[Shape(N, M, tuple(m.rank for m in members), False, x, f)] = None
            for k in ranks:
                C = tuple(min(k, m.rank) for m in members)
                found[Shape(N, M, C, True, x, f)] = None
                # If the base layer is another library's, members expand one by one.
                for m, c in zip(members, C, strict=True):
                    found[Shape(N, (m.shape[0],), (c,), True, x, f)] = None
    return list(found)
