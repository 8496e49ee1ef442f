"""The experts in a training checkpoint: their files, which can be served, and their parameters, to go on from.

The file of an expert holds z = 1 + p in fp32, which does not give p back exactly. A run that resumed from it would be
another run, so the parameters are kept as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2kernels.experts.expert import Expert, ExpertError, ExpertMismatch
from t2kernels.storage import header, why_unreadable, write_tensors

FOLDER, PARAMETERS = "experts", "parameters.safetensors"


def save(
    folder: str | Path,
    experts: Mapping[str, Expert],
    parameters: Mapping[str, Mapping[str, torch.Tensor]],
    parametrisation: str,
) -> None:
    """Write folder/experts/{name}.safetensors, and folder/parameters.safetensors if there are parameters.

    parameters: {expert: {matrix: p}}
    """
    for name, expert in experts.items():
        expert.save(Path(folder) / FOLDER / f"{name}.safetensors")
    if parameters:
        tensors = {f"{name}/{matrix}": p for name, part in parameters.items() for matrix, p in part.items()}
        write_tensors(
            Path(folder) / PARAMETERS, tensors, {"parametrisation": parametrisation, "experts": list(parameters)}
        )


@torch.no_grad()
def load(
    folder: str | Path,
    name: str,
    parameters: Mapping[str, torch.nn.Parameter],
    parametrisation: str,
    check: Callable[[Expert], object],
) -> None:
    """Set the parameters of one expert to those in a checkpoint.

    parameters: {matrix: p}, written in place; check: raises ExpertMismatch for an expert of other factors
    Raises ExpertError for a checkpoint that is missing or damaged, ExpertMismatch for one of another parametrisation,
    of other matrices or of other factors.
    """
    folder = Path(folder)
    path = folder / PARAMETERS
    if not path.is_file():
        raise ExpertError(f"{folder} is no checkpoint of SVFTrainer: it has no {PARAMETERS}")
    try:
        facts, saved = header(path) or {}, load_file(path)
    except SafetensorError as e:
        raise ExpertError(f"{path}: {why_unreadable(path)} ({e}); resume from an older checkpoint") from None
    if name not in facts.get("experts", ()):
        raise ExpertMismatch(
            f"{folder} holds the experts {', '.join(facts.get('experts', ())) or 'none'}, not {name!r}"
        )
    if facts["parametrisation"] != parametrisation:
        raise ExpertMismatch(
            f"{folder} was trained with parametrisation={facts['parametrisation']!r}, not {parametrisation!r}"
        )
    check(Expert.load(folder / FOLDER / f"{name}.safetensors"))
    found = {key.removeprefix(f"{name}/"): t for key, t in saved.items() if key.startswith(f"{name}/")}
    if {k: t.shape for k, t in found.items()} != {k: p.shape for k, p in parameters.items()}:
        odd = next(
            k
            for k in {**found, **parameters}
            if k not in found or k not in parameters or found[k].shape != parameters[k].shape
        )
        raise ExpertMismatch(f"{folder} was trained with other targets or another rank: {odd} differs")
    for key, p in parameters.items():
        p.copy_(found[key])
