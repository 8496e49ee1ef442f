"""The best experts of a run so far: in memory, since an expert is small, and in a file of each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from t2kernels.factors import schema
from t2kernels.storage import write_tensors
from t2kernels.train.trainer_state import OLDER, CheckpointError, check_parameters, of_expert, read

FILE = "best.safetensors"
MANIFEST: schema.Schema = {
    "best": schema.Each(
        schema.Kind(
            "[value, step], numbers",
            lambda v: (
                isinstance(v, list) and len(v) == 2 and type(v[0]) in (int, float) and math.isfinite(v[0])
                and schema.INDEX.test(v[1])
            ),
        )
    )
}  # fmt: skip


class BestExperts:
    """The parameters that each expert had when it was best."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, int, dict[str, Tensor]]] = {}

    def offer(self, name: str, value: float, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember an expert if `value` is more than ever before. Of two equal ones the earlier stays."""
        if name not in self._kept or value > self._kept[name][0]:
            self._kept[name] = (value, step, {key: p.detach().clone() for key, p in parameters.items()})

    @torch.no_grad()
    def restore(self, name: str, parameters: Mapping[str, nn.Parameter]) -> int | None:
        """Give the parameters their best values. Returns the step of them; None if nothing was offered."""
        if name not in self._kept:
            return None
        _, step, values = self._kept[name]
        for key, p in parameters.items():
            p.copy_(values[key])
        return step

    def save(self, folder: str | Path) -> None:
        """Write folder/best.safetensors, unless nothing was offered yet. Raises OSError."""
        if self._kept:
            tensors = {f"{name}/{key}": p for name, (_, _, part) in self._kept.items() for key, p in part.items()}
            found = {name: [value, step] for name, (value, step, _) in self._kept.items()}
            write_tensors(Path(folder) / FILE, tensors, {"best": found})

    @classmethod
    def load(
        cls, folder: str | Path, parameters: Mapping[str, Mapping[str, nn.Parameter]] | None = None
    ) -> BestExperts:
        """What `save` wrote into a checkpoint, or nothing.

        parameters: of each expert of the run, which those of the file must fit
        Raises CheckpointError for a damaged file, ExpertMismatch for one of other experts or matrices.
        """
        best, path = cls(), Path(folder) / FILE
        if not path.is_file():
            return best
        tensors, facts = read(path)
        schema.check(facts, MANIFEST, path, CheckpointError, OLDER)
        for name, (value, step) in facts["best"].items():
            own = of_expert(tensors, name)
            check_parameters(path, own, own if parameters is None else parameters.get(name, {}))
            best._kept[name] = float(value), step, own
        return best
