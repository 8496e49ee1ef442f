"""`ExpertFolder`: the folder from which a server reads experts and in which it stores uploads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import same_file
from t2kernels.factors.matrices import Targets, find_matrices
from t2kernels.factors.store import Factors
from t2kernels.serve.http.errors import APIError, SettingsError, bad

from .registry import ExpertRegistry, differs_in_case

SUFFIX: str = ".safetensors"


class ExpertFolder:
    """The files of the served experts, one NAME.safetensors each.

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

        Raises APIError: 400 if the server has no folder, 409 if the folder has a file whose name differs only in case.
        """
        place = self.home() / f"{name}{SUFFIX}"
        if other := same_file(place.name, (path.name for path in self.home().glob(f"*{SUFFIX}"))):
            raise differs_in_case(place.name, f"the experts folder has a file {other!r}")
        return place

    def delete(self, name: str) -> None:
        """Delete an expert's own file, if there is a folder and the file is in it."""
        if self.path is not None:
            (self.path / f"{name}{SUFFIX}").unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """The path of a file of the folder, by its bare name.

        Raises APIError: 400 if the name leads out of the folder or has another suffix, 404 if there is no such file.
        """
        folder = self.home()
        path = folder / name
        bare = 0 < len(name) < 128 and Path(name).name == name and not name.startswith(".") and "\0" not in name
        if not bare or not name.endswith(SUFFIX):
            message = f"file {name!r}: expected the bare name of a {SUFFIX} file inside the experts folder"
            raise bad(message, "file", "bad_file_name")
        if path.resolve().parent != folder.resolve():
            message = f"file {name!r} leads out of the experts folder: links are not followed; copy the file into it"
            raise bad(message, "file", "bad_file_name")
        if not path.is_file():
            raise APIError(404, f"there is no file {name!r} in the experts folder", "file_not_found", "file")
        return path

    def check(self, model: nn.Module, name: str, targets: Targets = "all", factors: str | Path | None = None) -> None:
        """Compare the files with a model that is not patched yet: patching and decomposing take minutes.

        name: of the model; targets, factors: as in `patch_model`; only a folder of factors says more
        Raises SettingsError, with the names of both models, for a file that is not an expert of this model.
        """
        ranks = {n: m.rank for n, m in find_matrices(model, targets).items()}
        known = Factors.load(factors) if factors is not None and Path(factors).is_dir() else None
        for path in sorted(self.home().glob(f"*{SUFFIX}")):
            try:
                expert = read(self.file(path.name))
                expert.check({n: torch.ones(rank) for n, rank in ranks.items()})
                if known is not None:
                    expert.check(known)
            except (APIError, ExpertError) as error:
                said = error.message if isinstance(error, APIError) else str(error)
                theirs = "" if isinstance(error, APIError) else f" (the model is {name!r})"
                raise SettingsError(f"{path}: {said}{theirs}") from None

    def load_all(self, registry: ExpertRegistry) -> None:
        """Serve every .safetensors file of the folder under its own name.

        Raises SettingsError, with the file's name, if one of them is not an expert of this model.
        """
        for path in sorted(self.home().glob(f"*{SUFFIX}")):
            try:
                load(registry, path.stem, self.file(path.name))
            except APIError as error:
                raise SettingsError(f"{path}: {error.message}") from None


def read(path: Path) -> Expert:
    """The expert in a file. Raises APIError 400 if it holds none."""
    try:
        return Expert.load(path)
    except ExpertError as error:
        raise bad(str(error).replace(str(path), path.name), code="bad_expert") from None


def load(registry: ExpertRegistry, name: str, path: Path) -> None:
    """Serve the expert in a file under a name. Raises APIError 400 or 409 if the name or the file is not accepted."""
    registry.check_new(registry.check_name(name), replace=True)
    registry.publish(registry.admit(name, read(path)))
