"""`Trainables`: experts in training. Their numbers are parameters of the layers; a forward computes their rows anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from t2kernels import InputError, T2Error

from .expert import Expert
from .rows import Rows
from .table import Slot


class GradientError(T2Error, ValueError):
    """Experts cannot be trained on this base model."""


class Trainables:
    """Names in training, with their parameters and rows. Used by the bank, with its lock held.

    slots: the layers of the model
    """

    def __init__(self, slots: Sequence[Slot]):
        self._slots = slots
        self._keys: dict[str, str] = {}  # name -> key of its parameters in the layers

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, parametrisation: str, init: Expert | None) -> None:
        """Raise ValueError if the parametrisation is unknown, or does not go with these layers or an initial expert."""
        if parametrisation not in ("raw", "sigmoid"):
            raise InputError(f"parametrisation={parametrisation!r}; wanted 'raw' or 'sigmoid'")
        if parametrisation == "raw":
            return
        if init is not None:
            raise InputError(
                "init: only parametrisation='raw' can start from an expert, because z does not fix the p of 'sigmoid'"
            )
        partial = [n for s in self._slots for n in s.names if s.layer.form == "delta" or s.layer.support < s.layer.rank]
        if partial:
            raise InputError(
                f"parametrisation='sigmoid' rescales every component, but {partial[0]} leaves some out: "
                "patch with form='factored', rank=None"
            )

    def check_layers(self, model: nn.Module | None) -> None:
        """Raise GradientError if gradients cannot flow through a base layer. Each kind of layer is asked once.

        model: the patched model, if it is known
        """
        weights = () if model is None else list(model.named_parameters())
        if model is not None and any(
            type(m).__name__.startswith(("FSDP", "FullyShardedDataParallel")) for m in model.modules()
        ):
            raise GradientError(
                "the model is sharded by FSDP already, which would neither shard the parameters of a new expert nor "
                "average their gradients over the processes: call start_training first, then shard the model"
            )
        if (frozen := next((n for n, p in weights if p.is_inference()), None)) is not None:
            raise GradientError(
                f"{frozen} was made, or moved, under torch.inference_mode, so nothing can be trained through it: load "
                "and move the model outside of it"
            )
        asked: dict[object, str | None] = {}
        for s in self._slots:
            if any(t.is_inference() for t in s.layer.buffers()):
                raise GradientError(
                    f"{s.names[0]} holds tensors that torch.inference_mode made, which cannot be trained: load and "
                    "patch the model outside of it"
                )
            kind = s.layer.probe_kind()
            if kind is None:
                continue
            if kind not in asked:
                asked[kind] = s.layer.unsupported_training()
            if reason := asked[kind]:
                what = kind[0].__name__ if isinstance(kind, tuple) else kind
                raise GradientError(
                    f"{s.names[0]} ({what}) cannot be trained through: {reason}, so the gradients of z would be wrong "
                    "without an error. Train on a base in bf16, or with weight-only quantisation; "
                    "the expert then serves on this one"
                )

    def start(self, rows: Rows, name: str, parametrisation: str, start: Tensor | None) -> list[nn.Parameter]:
        """Reserve a row and create the parameters.

        rows: of the bank; the row stays reserved until `stop`
        start: [C] z - 1 to begin from; None: the parametrisation's own start
        Returns one parameter per layer, in model order. Raises RuntimeError if no row can be had.
        """
        row = rows.take(name)
        rows.pin(row)
        key = self._keys[name] = f"e{row}"
        parameters = []
        for s in self._slots:
            shape, device = (*s.layer.sigma.shape[:-1], s.layer.support), s.layer.sigma.device
            if parametrisation == "sigmoid":
                p = 0.1 + 0.01 * torch.randn(shape, dtype=torch.float32, device=device)
            elif start is not None:
                whole = start[s.start : s.stop].reshape(s.layer.sigma.shape)
                p = whole[..., : s.layer.support].to(device).clone()
            else:
                p = torch.zeros(shape, dtype=torch.float32, device=device)
            parameters.append(nn.Parameter(p))
            s.layer.add_trained(key, row, parameters[-1], parametrisation)
        return parameters

    def stop(self, rows: Rows, name: str) -> None:
        """Remove the parameters from the layers and free the row."""
        key = self._keys.pop(name)
        for s in self._slots:
            s.layer.drop_trained(key)
        row = rows.find(name)
        if row is not None:
            rows.unpin([row])
            rows.drop(name)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """{matrix: p}, in model order. For a stack of matrices the key is the name of the stack."""
        key = self._keys[name]
        return {
            s.names[0] if len(s.names) == 1 else s.names[0].rpartition(".")[0]: s.layer.logits[key] for s in self._slots
        }

    @torch.no_grad()
    def z(self, name: str) -> dict[str, Tensor]:
        """{matrix: z [k], the current values, fp32 on the CPU}."""
        key = self._keys[name]
        parts = [(s, s.layer.trained_z(key).detach().float().cpu().reshape(len(s.names), -1)) for s in self._slots]
        return {n: z[i].clone() for s, z in parts for i, n in enumerate(s.names)}
