"""The experts in a training checkpoint: their files, which can be served, and their parameters, to go on from.

The file of an expert holds z = 1 + p in fp32, which does not give p back exactly. A run that resumed from it would be
another run, so the parameters are kept as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from t2kernels.experts.expert import Expert, ExpertError, ExpertMismatch
from t2kernels.experts.names import check_files
from t2kernels.factors import schema
from t2kernels.storage import FileError, digest_of, read_json, read_tensors, why_unreadable, write_json, write_tensors

FOLDER, PARAMETERS, DIGESTS = "experts", "parameters.safetensors", "digests.json"
OLDER = "resume from an older checkpoint"
MANIFEST: schema.Schema = {"parametrisation": schema.TEXT, "experts": schema.TEXTS}
SEALED: schema.Schema = {"sha256": schema.Each(schema.DIGEST)}


class CheckpointError(ExpertError):
    """A checkpoint of SVFTrainer that is not there, damaged, or changed after it was written."""


def save(
    folder: str | Path,
    experts: Mapping[str, Expert],
    parameters: Mapping[str, Mapping[str, torch.Tensor]],
    parametrisation: str,
) -> None:
    """Write folder/experts/{name}.safetensors, and folder/parameters.safetensors unless there are none.

    Raises NameRefused for a name that cannot be a file, and for two that differ only in case; OSError.
    """
    check_files(experts)
    for name, expert in experts.items():
        expert.save(Path(folder) / FOLDER / f"{name}.safetensors")
    if parameters:
        tensors = {f"{name}/{matrix}": p for name, part in parameters.items() for matrix, p in part.items()}
        write_tensors(
            Path(folder) / PARAMETERS, tensors, {"parametrisation": parametrisation, "experts": list(parameters)}
        )


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file of a checkpoint. Raises CheckpointError for one that is damaged."""
    try:
        saved, found = read_tensors(path)
    except SafetensorError as e:
        raise CheckpointError(f"{path}: {why_unreadable(path)} ({e}); {OLDER}") from None
    except FileError as e:
        raise CheckpointError(f"{path} is damaged: {e}; {OLDER}") from None
    return saved, found or {}


def of_expert(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """{matrix: tensor} of one expert, from {"expert/matrix": tensor}."""
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}


@torch.no_grad()
def load(
    folder: str | Path,
    name: str,
    parameters: Mapping[str, torch.nn.Parameter],
    parametrisation: str,
    check: Callable[[Expert], None],
) -> None:
    """Set the parameters of one expert to those in a checkpoint.

    check: raises ExpertMismatch for an expert of other factors
    Raises ExpertError for a checkpoint that is not there, damaged, changed (by its digest), or of another
    parametrisation, ExpertMismatch for one of other matrices or factors.
    """
    folder = Path(folder)
    path = folder / PARAMETERS
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint of SVFTrainer: it has no {PARAMETERS}")
    saved, found = read(path)
    facts = schema.check(found, MANIFEST, path, CheckpointError, OLDER)
    if name not in facts["experts"]:
        raise ExpertMismatch(f"{folder} holds the experts {', '.join(facts['experts']) or 'none'}, not {name!r}")
    if facts["parametrisation"] != parametrisation:
        raise ExpertMismatch(
            f"{folder} was trained with parametrisation={facts['parametrisation']!r}, not {parametrisation!r}"
        )
    check(Expert.load(folder / FOLDER / f"{name}.safetensors"))
    mine = of_expert(saved, name)
    check_parameters(path, mine, parameters)
    for key, p in parameters.items():
        p.copy_(mine[key])


def check_parameters(path: Path, mine: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise an error if the tensors of an expert in a file of a checkpoint do not fit its parameters.

    Raises ExpertMismatch for other matrices or shapes, CheckpointError for what is no finite floating-point number.
    """
    for key in {**mine, **parameters}:
        if key not in mine or key not in parameters or mine[key].shape != parameters[key].shape:
            raise ExpertMismatch(f"{path.parent} was trained with other targets or another rank: {key} differs")
        if not mine[key].is_floating_point() or not torch.isfinite(mine[key]).all():
            raise CheckpointError(
                f"{path}: {key} is {mine[key].dtype} or holds NaN or infinity, wanted finite numbers; {OLDER}"
            )


def seal(folder: str | Path) -> None:
    """Write folder/digests.json: the sha256 of every file in a checkpoint, the optimiser's and Trainer's among them."""
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix(): digest_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / DIGESTS, {"sha256": found})


def verify(folder: str | Path) -> None:
    """Compare the files of a checkpoint with what `seal` wrote. One without it, of an older version, passes.

    Raises CheckpointError for a file that is missing, damaged, or changed after it was written.
    """
    path = Path(folder) / DIGESTS
    if not path.is_file():
        return
    try:
        facts = schema.check(read_json(path, "a list of digests"), SEALED, path, CheckpointError, OLDER)
    except FileError as e:
        raise CheckpointError(f"{e}; {OLDER}") from None
    for name, digest in facts["sha256"].items():
        file = path.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {DIGESTS} names it; {OLDER}")
        if digest_of(file) != digest:
            raise CheckpointError(f"{file} is damaged or was changed: its sha256 is not that in {DIGESTS}; {OLDER}")
