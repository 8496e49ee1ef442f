"""Models and experts as the command line names them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels.cli.verbs.decompose import parse_dtype, parse_rank
from t2kernels.experts.names import BASE, parse_mixture

from .console import bar, comma_list, is_missing

if TYPE_CHECKING:
    from t2kernels import ExpertBank

TINY = "tiny"

# Options that several verbs share.
ModelOption = typer.Option(
    TINY, "--model", "-m", help="'tiny' (built in), a checkpoint's directory, or a model's id on the hub."
)
TargetsOption = typer.Option("all", help="'all', 'mlp', 'attention', or a regular expression on matrix names.")
RankOption = typer.Option(
    "all", help="Components that an expert may rescale: 'all', a number, or a fraction of min(M, N)."
)
FormOption = typer.Option(
    "auto", help="'auto', 'factored' or 'delta'; docs/reference/patching.md says which is for what."
)
FactorsOption = typer.Option(
    None,
    help="Directory that 't2 decompose' wrote; or int8, fp16, bf16: decompose now, into that.  \\[default: decompose now]",
    show_default=False,
)
DtypeOption = typer.Option(
    None, help="Of the model's weights.  \\[default: float32 for tiny, else as saved]", show_default=False
)
DeviceOption = typer.Option(None, help="Where to run.  \\[default: a GPU if there is one]", show_default=False)


@dataclass
class Loaded:
    """A model with its tokenizer, and the name it was asked for by."""

    name: str
    model: Any
    tokenizer: Any


def load(name: str, dtype: str | None = None, device: str | None = None) -> Loaded:
    """The built-in model, or any causal language model of transformers, in eval mode. Raises OSError or ValueError with what is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from t2kernels import tiny

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = None if dtype is None else parse_dtype(dtype)
    if name == TINY:
        torch.set_num_threads(
            min(torch.get_num_threads(), 4)
        )  # its matrices are 128 wide: more threads would only wait for each other
        with _no_bars():
            model, tokenizer = tiny.load(wanted or torch.float32)
    else:
        if is_missing(name):
            raise FileNotFoundError(f"--model {name}: no such directory")
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted or "auto")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Loaded(name, model.eval().to(device), tokenizer)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers: for a model that loads at once."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def patch(
    loaded: Loaded,
    targets: str = "all",
    rank: str = "all",
    form: str = "auto",
    factors: str | None = None,
    rows: int = 64,
) -> ExpertBank:
    """`patch_model` with a progress bar."""
    import t2kernels as t2

    with bar("[dim]{task.fields[name]}[/]") as progress:
        task = progress.add_task("patching", total=None, name="")
        return t2.patch_model(
            loaded.model,
            targets=targets,
            rank=parse_rank(rank),
            form=form,
            factors=factors,
            rows=rows,
            progress=lambda name, done, total: progress.update(
                task, completed=done, total=total, name=name if done < total else ""
            ),
        )


def add_experts(bank: ExpertBank, text: str, model: str) -> list[str | None]:
    """Put the experts of a comma-separated list into the bank; their names there, None for "base"."""
    return [add_expert(bank, name, model) for name in comma_list(text)]


def add_expert(bank: ExpertBank, name: str, model: str) -> str | None:
    """Put an expert into the bank, by path or, for the built-in model, by name; its name there, None for "base". Raises ValueError."""
    if name == BASE:
        return None
    path = find_expert(name, model)
    short = path.stem if bank.names.count(path.stem) == 0 or name == path.stem else name
    if short not in bank:
        bank.add(short, path)
    return short


def find_expert(name: str, model: str) -> Path:
    """The file of an expert: a path, with or without .safetensors, or the name of one that comes with the built-in model."""
    from t2kernels import tiny
    from t2kernels.experts.files import find_file

    if (found := find_file(name)) is not None:
        return found
    shipped = tiny.experts()
    if model == TINY and name in shipped:
        return shipped[name]
    known = f" nor one of {', '.join(shipped)}, which come with the built-in model" if model == TINY else ""
    raise FileNotFoundError(f"no expert {name!r}: it is not a file{known} ('base' is the model without an expert)")


def parse_mix(text: str, bank: ExpertBank, model: str) -> dict[str, float]:
    """ "math=.7,code=.3" -> {"math": 0.7, "code": 0.3}, with these experts in the bank. Raises ValueError."""
    try:
        shares = parse_mixture(text)
    except ValueError:
        raise ValueError(
            f"--mix {text}: wanted NAME=WEIGHT,NAME=WEIGHT with each name once, such as math=.7,code=.3"
        ) from None
    mixture: dict[str, float] = {}
    for name, share in shares.items():
        expert = add_expert(bank, name, model)
        if expert is not None:  # the base model's share is what the weights leave: 1 + sum of weight (z - 1)
            mixture[expert] = mixture.get(expert, 0.0) + share
    return mixture
