"""Checkpoints of experts only, in the one file that transformers' Trainer reads back: model.safetensors.

Trainer hands the model the tensors of that file and not its place. So the files of a checkpoint of `trainer_state` are
packed into it, each as the uint8 tensor of its bytes, and are unpacked and checked as those are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import check_files
from t2kernels.storage import temporary_beside
from t2kernels.train import trainer_state

FILE = "model.safetensors"
MARK = "t2kernels:"
"""Begins the names of the tensors. No parameter of a model has a colon in its name."""


def pack(
    folder: str | os.PathLike[str],
    experts: Mapping[str, Expert],
    parameters: Mapping[str, Mapping[str, Tensor]],
    parametrisation: str,
) -> None:
    """Write folder/model.safetensors, and folder/experts/{name}.safetensors to serve. Raises NameRefused, OSError."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        trainer_state.save(made, experts, parameters, parametrisation)
        packed = {MARK + name: _bytes(Path(made) / name) for name in _files(experts)}
    for name, expert in experts.items():
        expert.save(place / trainer_state.FOLDER / f"{name}.safetensors")
    temporary = temporary_beside(place / FILE)
    save_file(packed, temporary, {"format": "pt"})
    os.replace(temporary, place / FILE)


def unpack(
    state: Mapping[str, Tensor],
    parameters: Mapping[str, Mapping[str, nn.Parameter]],
    parametrisation: str,
    check: Callable[[Expert], None],
    remove: bool = False,
) -> bool:
    """Set the parameters of all experts to those packed in a state dict. Returns False if it has none.

    parameters: {expert: {matrix: p}}; check: as in `trainer_state.load`
    remove: whether to take the packed tensors out of the state dict
    Raises ExpertError and ExpertMismatch as `trainer_state.load` does.
    """
    packed = {name: t for name, t in state.items() if name.startswith(MARK)}
    if not packed:
        return False
    if missing := [name for name in _files(parameters) if MARK + name not in packed]:
        raise ExpertError(
            f"the checkpoint has no {missing[0]}: it is of other experts, {', '.join(map(repr, _names(packed)))}; name "
            "the same experts as in the run that wrote it"
        )
    if list(parameters) != _names(packed):
        raise ExpertError(
            f"the checkpoint is of the experts {_names(packed)}, those in training are {list(parameters)}; name the "
            "same ones, in the same order: the optimiser's state is in that order"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in _files(parameters):
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            if (found := packed[MARK + name]).dtype != torch.uint8:
                raise ExpertError(
                    f"the checkpoint's {name} is {found.dtype}, wanted torch.uint8: it was cast or damaged"
                )
            path.write_bytes(found.cpu().numpy().tobytes())
        for name, own in parameters.items():
            try:
                trainer_state.load(folder, name, own, parametrisation, check)
            except ExpertError as e:
                raise type(e)(str(e).replace(folder, "the checkpoint")) from None
    if remove and isinstance(state, dict):
        for name in packed:
            del state[name]
    return True


def _files(names: Mapping[str, object]) -> list[str]:
    """The files of a checkpoint. Only these are ever written by `unpack`, whatever a state dict has."""
    check_files(names)
    return [trainer_state.PARAMETERS, *(f"{trainer_state.FOLDER}/{name}.safetensors" for name in names)]


def _names(packed: Mapping[str, Tensor]) -> list[str]:
    start = f"{MARK}{trainer_state.FOLDER}/"
    return [n.removeprefix(start).removesuffix(".safetensors") for n in packed if n.startswith(start)]


def _bytes(path: Path) -> Tensor:
    return torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint8))
