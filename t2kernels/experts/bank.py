"""`ExpertBank`: the experts of one patched model by name.

Its parts: `columns.py` makes an expert one row of numbers, `rows.py` gives out rows of the tables, `table.py` writes
them, `loading.py` loads experts into rows when they are used, `trainables.py` holds the experts in training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError, StateError, UnknownNameError
from t2kernels.layers.dense.link import Link
from t2kernels.layers.groups import find_groups
from t2kernels.layers.linear import SVFLinear
from t2kernels.layers.routing.active import Routing

from .exchange.lora import LoraAdapter
from .exchange.peft_files import is_adapter
from .expert import Expert, ExpertError
from .files import SUFFIX
from .loading import LoadedExperts
from .names import check_files, check_name
from .origin import Origin
from .table import ScaleTable


class ExpertBank(LoadedExperts):
    """The experts of one patched model. `patch_model` makes it. All methods may be called from any thread.

    layers: [(layer, names of its matrices)], in model order
    rows: rows of the layers' tables, row 0 (the base model) included. There may be more experts than rows: they wait in
        host memory and are loaded when they are used.
    origin: what is known of the model's factors
    routing: which row each token of the running forward uses
    plan: {matrix: (form, why this form)}
    """

    def __init__(
        self,
        layers: Sequence[tuple[SVFLinear, tuple[str, ...]]],
        rows: int,
        origin: Origin,
        routing: Routing,
        plan: Mapping[str, tuple[str, str]],
    ):
        if rows < 2:
            raise InputError(f"rows={rows}: row 0 is the base model, so at least 2 are needed")
        super().__init__(ScaleTable(layers, rows), origin, routing)
        self.plan: Mapping[str, tuple[str, str]] = plan
        self.entrances: tuple[Link, ...] = ()  # the modules that take `experts`, the patched model first
        for group in find_groups(layers):
            for layer in group.layers:
                layer.group = group
            group.op()  # side by side from the start: a compiled model cannot lay them so

    def __getitem__(self, name: str) -> Expert:
        """The expert on this model's supports; one in training with its current values. Raises KeyError."""
        with self._lock:
            self._require(name)
            if name in self.table.adapters:
                raise InputError(f"{name!r} is a LoRA adapter, not an expert; bank.adapter({name!r}) returns it")
            if name in self._training:
                return self.expert(self._training.z(name))
            delta, manifest = self._experts[name]
        return self.from_vector(delta, **manifest)

    @property
    def adapters(self) -> list[str]:
        """The names of the LoRA adapters in the bank."""
        return list(self.table.adapters)

    def adapter(self, name: str) -> LoraAdapter:
        """A LoRA adapter of the bank. Raises KeyError."""
        with self._lock:
            if name not in self.table.adapters:
                known = ", ".join(map(repr, self.table.adapters)) or "none yet"
                raise UnknownNameError(f"no adapter named {name!r} in the bank; it has {known}")
            return self.table.adapters[name]

    def __repr__(self) -> str:
        return f"ExpertBank({len(self.matrices)} matrices, {len(self)} experts, {self.rows} rows: {self.describe()})"

    def describe(self) -> str:
        """Say how many matrices have which form and why, and how much a token reads compared with dense layers.

        Dense layers count in the model's dtype.
        """
        slots = self.table.slots
        reads, dense = map(sum, zip(*(s.bytes_read() for s in slots), strict=True))
        forms = ", ".join(f"{count} {form} ({why})" for (form, why), count in Counter(self.plan.values()).items())
        kinds = {str(s.layer.U.dtype).removeprefix("torch.") for s in slots if s.layer.U.dtype != s.layer.dtype}
        factors = f" (factors in {' and '.join(sorted(kinds))})" if kinds else ""
        return f"{forms}; reads {reads / dense:.2f}x the dense layers{factors}"

    def add(
        self,
        name: str,
        expert: Expert | LoraAdapter | str | os.PathLike[str],
        max_error: float = 0.1,
        replace: bool = False,
    ) -> None:
        """Add an expert, from memory or from a file; or a LoRA adapter, from memory or from the folder of PEFT.

        A row of a batch uses the one or the other, or a mixture of both: an adapter runs exactly, as A and B beside the
        layers. Every token pays for the columns of all adapters of the bank, Σ r at each layer.

        max_error: the largest loss that is accepted if the expert rescales components outside a layer's support:
            ||dW - dW_k|| / ||dW|| in the spectral norm, which is max sigma_i |z_i - 1| over the components left out,
            divided by the same over all components
        replace: whether `name` may be taken. The new values then go into the row of the old ones, unless a live tensor
            of `ids` uses it.

        A string may also be "user/repo" or "user/repo:file" on the hub (`Expert.load`).
        Raises ExpertError or ExpertMismatch (file, values, other factors), NameRefused (a ValueError: `check_name`),
        ValueError (name taken, too much lost, an adapter of another model), RuntimeError (an adapter that is in use).
        """
        check_name(name, version=True)
        self._check_free(name, replace)
        if isinstance(expert, LoraAdapter) or (not isinstance(expert, Expert) and is_adapter(expert)):
            self._add_adapter(name, expert if isinstance(expert, LoraAdapter) else LoraAdapter.load(expert), replace)
            return
        if not isinstance(expert, Expert):
            expert = Expert.load(expert if isinstance(expert, str) else Path(expert))
        self.check(expert)
        delta, lost = self.flatten(expert, max_error, name)
        if reason := self.table.unsupported(delta):
            raise ExpertError(f"expert {name!r} cannot run on this model: {reason}; train it again")
        manifest = {**expert.manifest, "lost": lost} if lost else dict(expert.manifest)
        with self._lock:
            self._check_free(name, replace)  # again: another thread may have added it while the file was read
            if name in self._experts:
                self._check_default(name)
                self._drop_adapter(name)
                self._drop_mixtures_of(name)
            self._experts[name] = (delta, manifest)
            row = self._rows.find(name)
            if row is not None and not self._rows.is_pinned(row):
                self.table.write(row, delta)
            else:
                self._rows.drop(name)
                if self._rows.has_free():
                    self._load(name)
            self._renew_default(name)

    def remove(self, name: str) -> None:
        """Forget an expert. A running forward that uses it finishes with it; then its row is free.

        Raises KeyError for an unknown name, ValueError for an expert in training, RuntimeError for the default and for
        an adapter that a forward or live ids use.
        """
        with self._lock:
            self._require(name)
            if name in self._training:
                raise InputError(f"{name!r} is in training; stop_training({name!r}) first")
            if self._is_default(name):
                raise StateError(
                    f"{name!r} is bank.default, or a part of it: set bank.default to another expert, or to None, first"
                )
            self._drop_adapter(name)
            del self._experts[name]
            self._drop_mixtures_of(name)
            self._rows.drop(name)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every expert to `folder`/NAME.safetensors, and every adapter to a folder NAME. Returns the paths.

        Raises NameRefused, before anything is written, for two names that differ only in case, or a name and one in the
        folder; OSError.
        """
        there = [path.stem if path.suffix == SUFFIX else path.name for path in Path(folder).glob("*")]
        with self._lock:
            check_files(self.names, there)
            adapters = dict(self.table.adapters)
            kept = {name: e for name, e in self._experts.items() if name not in adapters}
            training = {name: self[name] for name in self._training}
        made = ((name, self.from_vector(delta, **manifest)) for name, (delta, manifest) in kept.items())
        experts = (pair for part in (made, training.items()) for pair in part)
        paths = [expert.save(Path(folder) / f"{name}.safetensors") for name, expert in experts]
        return paths + [adapter.save(Path(folder) / name) for name, adapter in adapters.items()]

    def vector(self, expert: Expert | str) -> Tensor:
        """z - 1 of all matrices as one row, [C] fp32 on the CPU.

        expert: one of this model's factors, or a name
        Raises KeyError (unknown name), ExpertMismatch (other factors), ValueError (more than 10 % lost, see `add`).
        """
        if isinstance(expert, str):
            expert = self[expert]
        self.check(expert)
        name = str(expert.manifest.get("name", ""))
        return self.flatten(expert, 0.1, name)[0]

    def _check_free(self, name: str, replace: bool) -> None:
        with self._lock:
            if name in self and not replace:
                raise InputError(f"the bank has an expert named {name!r}; remove it first, or pass replace=True")
            if name in self._training:
                raise InputError(f"{name!r} is in training and cannot be replaced; stop_training({name!r}) first")

    def _add_adapter(self, name: str, adapter: LoraAdapter, replace: bool) -> None:
        with self._lock:
            self._check_free(name, replace)
            self.table.adapters.check(name, adapter)
            self._check_default(name)
            self._drop_adapter(name)
            self._drop_mixtures_of(name)
            self._rows.drop(name)
            self.table.adapters.add(name, adapter)
            self._experts[name] = (torch.zeros(self.width, dtype=torch.float32, device="cpu"), {})
            if self._rows.has_free():
                self._load(name)
            self._renew_default(name)

    def _drop_adapter(self, name: str) -> None:
        """Remove the columns of an adapter, if it is one. Raises StateError if a row that is in use needs them."""
        if any(self._rows.is_pinned(row) for row in self.table.adapters.rows_of(name)):
            raise StateError(f"the adapter {name!r} is in use; end the forwards, and delete the ids, that name it")
        self.table.adapters.remove(name)

    # --- training

    @torch.inference_mode(False)  # parameters made in inference mode cannot be trained
    def start_training(self, name: str, parametrisation: str = "raw", init: Expert | None = None) -> list[nn.Parameter]:
        """Create a trainable expert: one parameter p [rank] per layer. Every forward uses its current value.

        parametrisation: "raw": z = 1 + p, from p = 0; "sigmoid", as the authors' release: z = sigmoid(p), scaled to
            keep the trace of W, from p = 0.1 + 0.01 randn
        init: the expert to start from ("raw" only)

        Returns the parameters, in model order. Raises ValueError (a name that is refused or taken, unknown
        parametrisation, an `init` that does not fit), RuntimeError (no row free).
        """
        check_name(name, version=True)
        self._training.check(parametrisation, init)
        self._training.check_layers(self.entrances[0]() if self.entrances else None)
        start = None
        if init is not None:
            self.check(init)
            start, _ = self.flatten(init, 0.0, name)
        with self._lock:
            if name in self:
                raise InputError(
                    f"the bank has an expert named {name!r}; choose another name, or remove it and pass it as init"
                )
            parameters = self._training.start(self._rows, name, parametrisation, start)
            self.table.adapters.clear(self._rows.find(name) or 0)
            self.routing.training = len(self._training)
            return parameters

    def stop_training(self, name: str, /, **manifest: Any) -> Expert:
        """End the training of `name`. It becomes an ordinary expert of the bank, which is returned.

        manifest: facts for the expert's manifest
        Raises KeyError if `name` is not in training.
        """
        with self._lock:
            if name not in self._training:
                raise UnknownNameError(f"{name!r} is not in training; in training are {self.in_training or 'none'}")
            expert = self.expert(self._training.z(name), **manifest)
            self._training.stop(self._rows, name)
            self.routing.training = len(self._training)
            self.add(name, expert)
            return self[name]

    @property
    def in_training(self) -> list[str]:
        """The names of the experts in training."""
        with self._lock:
            return list(self._training)

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """{matrix: p} of an expert in training, in model order. For a stack of matrices the key is its name."""
        with self._lock:
            return self._training.parameters(name)
