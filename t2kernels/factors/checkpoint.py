"""`Checkpoint`: a model's weights on disk, found through its config and read one tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2kernels import InputError, MissingFileError, one_line
from t2kernels.storage import read_json, why_unreadable

from .matrices import Matrix, Targets, find_matrices

INDEX: str = "model.safetensors.index.json"
PLAIN: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
HUB_ID: re.Pattern[str] = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def name_of(model: nn.Module | str | Path) -> tuple[str, str | None]:
    """(name, revision) of a model or of its directory, as manifests record it.

    The name is a hub id, or the last part of a local path, never a whole path.
    """
    revision = None
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        revision = getattr(config, "_commit_hash", None)
        model = str(getattr(config, "_name_or_path", None) or type(model).__name__)
    path = Path(model).expanduser()
    if not path.is_dir():
        return str(model), revision
    path = path.resolve()
    if path.parent.name == "snapshots":  # the hub's cache: models--{owner}--{name}/snapshots/{revision}
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return path.name, revision


class Checkpoint:
    """config.json and safetensors of a model, in one file or in shards. The model is built on the meta device only.

    path: a directory, or a model's id on the Hugging Face hub
    targets: as in `find_matrices`

    directory: the directory, after a download
    name, revision: as in `name_of`
    files: {tensor: file in the directory}
    matrices: {name: matrix} that `targets` selects
    Raises FileNotFoundError or ValueError that names the missing or broken file.
    """

    def __init__(self, path: str | Path, targets: Targets = "all") -> None:
        self.directory: Path = _local(path)
        name, revision = name_of(self.directory)
        self.name: str = name
        self.revision: str | None = revision
        self.files: dict[str, str] = _tensor_files(self.directory)
        model = _meta_model(self.directory)
        self._prefix: str = getattr(model, "base_model_prefix", "")
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.matrices: dict[str, Matrix] = find_matrices(model, targets)
        for m in self.matrices.values():
            self.key(m)

    def read(self, m: Matrix) -> Tensor:
        """W [M, N] as it is stored.

        Raises ValueError if it is not plain floating point, has another shape than the config says, or cannot be read.
        """
        key = self.key(m)
        path = self.directory / self.files[key]
        try:
            with safe_open(path, framework="pt") as f:
                part = f.get_slice(key)
                kind = part.get_dtype()
                if kind not in PLAIN:
                    raise InputError(
                        f"{m.name}: {path} holds {key} as {kind}, a quantised format; "
                        "decompose the original, or the loaded model"
                    )
                shape, wanted = part.get_shape(), list(self._shapes[m.tensor])
                if shape != wanted:
                    raise InputError(
                        f"{m.name}: {path} holds {key} as {shape}, its config says {wanted}; "
                        "config and weights are of two models"
                    )
                stored = part[:] if m.index is None else part[m.index]
        except SafetensorError as e:
            raise InputError(f"{m.name}: {path} cannot be read: {why_unreadable(path)} ({e}); fetch it again") from None
        w = stored if m.index is None else stored.reshape(wanted[1:])
        return w.t() if m.transposed else w

    def key(self, m: Matrix) -> str:
        """The key of a matrix's tensor in the files. Raises ValueError if they do not hold it."""
        # A base model may be stored without the prefix that a model with a head has, and the other way round (GPT-2).
        bare = m.tensor.removeprefix(f"{self._prefix}.")
        for key in (m.tensor, bare, f"{self._prefix}.{m.tensor}"):
            if key in self.files:
                return key
        raise InputError(
            f"{self.directory} holds no tensor {m.tensor!r} (for {m.name}); transformers renames or merges its "
            "tensors at loading. Decompose the loaded model: decompose(AutoModelForCausalLM.from_pretrained(...))"
        )


def _local(path: str | Path) -> Path:
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise InputError(
            f"{path} is a file; wanted a directory with config.json and safetensors, or a model's id on the hub"
        )
    if not isinstance(path, str) or not HUB_ID.fullmatch(path):
        raise MissingFileError(
            f"{path} does not exist; wanted a directory with config.json and safetensors, or a model's id on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # offline, gated, missing, interrupted: each is another class of hub, HTTP or OS error
        raise MissingFileError(
            f"{path} is not a directory, and the hub did not provide it: {type(e).__name__}: {e}"
        ) from e


def _tensor_files(directory: Path) -> dict[str, str]:
    """{tensor: file}, from the index, or from the headers of the files."""
    if (directory / INDEX).is_file():
        files = read_json(directory / INDEX, "an index of shards").get("weight_map")
        if not isinstance(files, dict) or not files:
            raise InputError(f"{directory / INDEX} has no weight_map; fetch it again")
        missing = sorted({f for f in files.values() if not (directory / f).is_file()})
        if missing:
            raise MissingFileError(
                f"{directory}: {len(missing)} shards that {INDEX} names are missing: {', '.join(missing[:3])}; "
                "fetch them again"
            )
        return files
    # One file under transformers' own name wins over others beside it (the original format, adapters).
    paths = [p] if (p := directory / "model.safetensors").is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        others = (
            "; its .bin or .pt files are pickles, which are not read: load the model and decompose it"
            if _pickles(directory)
            else ""
        )
        raise MissingFileError(f"{directory} holds no .safetensors file{others}")
    files = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as f:
                files |= dict.fromkeys(f.keys(), path.name)
        except SafetensorError as e:
            raise InputError(f"{path} cannot be read: {why_unreadable(path)} ({e}); fetch it again") from None
    return files


def _pickles(directory: Path) -> bool:
    return any(True for pattern in ("*.bin", "*.pt", "*.pth") for _ in directory.glob(pattern))


def _meta_model(directory: Path) -> nn.Module:
    if not (directory / "config.json").is_file():
        raise MissingFileError(f"{directory} holds no config.json, which says what its matrices are; fetch it")
    try:
        return meta_model(transformers.AutoConfig.from_pretrained(directory, local_files_only=True))
    except InputError as e:
        raise InputError(f"{directory}: {e}") from e
    except (ImportError, MemoryError):
        raise
    except Exception as e:  # transformers checks few fields; the rest fail as KeyError, TypeError, RecursionError, ...
        raise InputError(
            f"{directory / 'config.json'} is not a config that transformers {transformers.__version__} makes a model "
            f"of: {one_line(e)}"
        ) from e


def meta_model(config: transformers.PretrainedConfig) -> nn.Module:
    """The model that a config describes, on the meta device: names and shapes without numbers.

    Raises ValueError if transformers has no model for the config.
    """
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    makers = [
        transformers.AutoModelForCausalLM.from_config,
        *([architecture] if architecture else []),
        transformers.AutoModel.from_config,
    ]
    refused = None
    for make in makers:
        try:
            with torch.device("meta"):
                return make(config)
        except ValueError as e:  # "Unrecognized configuration class": this auto class has no such model
            refused = e
    raise InputError(f"transformers has no model for a {config.model_type} config: {refused}")
