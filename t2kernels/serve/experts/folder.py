"""`ExpertFolder`: the folder from which a server reads experts and adapters, and in which it stores uploads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from t2kernels import T2Error
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.exchange.peft_files import CONFIG, WEIGHTS, is_adapter
from t2kernels.experts.expert import Expert
from t2kernels.experts.names import same_file
from t2kernels.factors.matrices import Targets, find_matrices
from t2kernels.factors.store import Factors
from t2kernels.serve.http.errors import APIError, SettingsError, bad

from .registry import ExpertRegistry, differs_in_case

SUFFIX: str = ".safetensors"


class ExpertFolder:
    """The files of the served experts: NAME.safetensors, or for a LoRA adapter the folder NAME as PEFT writes it.

    path: the folder; None: the server reads and writes no files
    """

    path: Path | None

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)

    def home(self) -> Path:
        """The folder. Raises APIError 400 if the server has none."""
        if self.path is None:
            raise bad("this server has no folder for experts: start it with --experts DIR", code="no_experts_folder")
        return self.path

    def place(self, name: str) -> Path:
        """The path of an expert's own file, which need not exist.

        Raises APIError: 400 if the server has no folder, 409 if the folder has a file whose name differs only in case,
        or an adapter of this name.
        """
        place = self.home() / f"{name}{SUFFIX}"
        if other := same_file(place.name, (path.name for path in self.home().glob(f"*{SUFFIX}"))):
            raise differs_in_case(place.name, f"the experts folder has a file {other!r}")
        if self.has_adapter(name):
            message = f"the folder of a LoRA adapter has the name {name!r}; choose another name, or remove the folder"
            raise APIError(409, message, "expert_exists", "name")
        return place

    def has_adapter(self, name: str) -> bool:
        """Whether there is the folder of an adapter of this name."""
        return self.path is not None and is_adapter(self.path / name)

    def files(self) -> dict[str, str]:
        """{name of an expert: its file, or the folder of its adapter}. Raises SettingsError if it has both."""
        found = {path.stem: path.name for path in sorted(self.home().glob(f"*{SUFFIX}"))}
        for name in sorted(path.name for path in self.home().iterdir() if is_adapter(path)):
            if name in found:
                both = f"{found[name]} and the folder of an adapter"
                raise SettingsError(f"{self.home()}: {both} would both be served as {name!r}; rename one of them")
            found[name] = name
        return found

    def delete(self, name: str) -> None:
        """Delete an expert's own file, if there is a folder and the file is in it."""
        if self.path is not None:
            (self.path / f"{name}{SUFFIX}").unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """The path of a file of the folder, or of an adapter's folder, by its bare name.

        Raises APIError: 400 if the name leads out of the folder or has another suffix, 404 if there is no such file.
        """
        folder = self.home()
        path = folder / name
        bare = 0 < len(name) < 128 and Path(name).name == name and not name.startswith(".") and "\0" not in name
        if not bare or not (name.endswith(SUFFIX) or is_adapter(path)):
            message = f"file {name!r}: expected the bare name of a {SUFFIX} file inside the experts folder"
            raise bad(f"{message}, or of the folder of a LoRA adapter", "file", "bad_file_name")
        parts = [path / CONFIG, path / WEIGHTS] if is_adapter(path) else []
        if path.resolve().parent != folder.resolve() or any(p.resolve().parent != path.resolve() for p in parts):
            message = f"file {name!r} leads out of the experts folder: links are not followed; copy the file into it"
            raise bad(message, "file", "bad_file_name")
        if not (parts or path.is_file()):
            raise APIError(404, f"there is no file {name!r} in the experts folder", "file_not_found", "file")
        return path

    def check(self, model: nn.Module, name: str, targets: Targets = "all", factors: str | Path | None = None) -> None:
        """Compare the files with a model that is not patched yet: patching and decomposing take minutes.

        name: of the model; targets, factors: as in `patch_model`; only a folder of factors says more
        Raises SettingsError, with the names of both models, for a file that is not an expert of this model.
        """
        matrices = find_matrices(model, targets)
        ranks = {n: m.rank for n, m in matrices.items()}
        known = Factors.load(factors) if factors is not None and Path(factors).is_dir() else None
        for path in map(self.home().joinpath, self.files().values()):
            try:
                expert = read(self.file(path.name))
                if isinstance(expert, LoraAdapter):
                    expert.check({n: m.shape for n, m in matrices.items()})
                    continue
                expert.check({n: torch.ones(rank) for n, rank in ranks.items()})
                if known is not None:
                    expert.check(known)
            except (APIError, ValueError) as error:
                said = error.message if isinstance(error, APIError) else str(error)
                theirs = "" if isinstance(error, APIError) else f" (the model is {name!r})"
                raise SettingsError(f"{path}: {said}{theirs}") from None

    def load_all(self, registry: ExpertRegistry) -> None:
        """Serve every .safetensors file and every adapter of the folder under its own name.

        Raises SettingsError, with the file's name, if one of them is not for this model.
        """
        for name, file in self.files().items():
            try:
                load(registry, name, self.file(file))
            except APIError as error:
                raise SettingsError(f"{self.home() / file}: {error.message}") from None


def read(path: Path) -> Expert | LoraAdapter:
    """The expert in a file, or the adapter in a folder. Raises APIError 400 if it holds none."""
    try:
        return LoraAdapter.load(path) if path.is_dir() else Expert.load(path)
    except T2Error as error:
        with open(path if path.is_file() else os.devnull, "rb") as file:
            if b".lora_A." in file.read(1 << 16):
                raise bad(
                    "these are the weights of a LoRA adapter, which are not enough: copy its folder, with "
                    f'{CONFIG}, into the experts folder and send {{"name": NAME, "file": FOLDER}}',
                    code="lora_adapter",
                ) from None
        raise bad(str(error).replace(str(path), path.name), code="bad_expert") from None


def load(registry: ExpertRegistry, name: str, path: Path) -> None:
    """Serve the expert in a file under a name. Raises APIError 400 or 409 if the name or the file is not accepted."""
    registry.check_new(registry.check_name(name), replace=True)
    registry.publish(registry.admit(name, read(path)))
