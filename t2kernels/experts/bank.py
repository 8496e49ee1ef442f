"""`ExpertBank`: names to rows. It owns the scale table of every layer of one patched model.

Which names are in the bank and which of them have a row; `table.py` writes the rows, `trainables.py` keeps what is in training.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from t2kernels.layers.active import Route, Routing
from t2kernels.layers.groups import find_groups
from t2kernels.layers.linear import SVFLinear
from t2kernels.layers.scopes import Scope

from .columns import flatten, spans, unflatten
from .expert import Expert
from .names import Name, flat_names, key_of, shape_of
from .origin import Origin
from .rows import Rows
from .scratch import Scratch
from .table import ScaleTable, Slot
from .trainables import Trainables


class ExpertBank:
    """The experts of one patched model. Made by `patch_model`.

    matrices: {matrix name: k}, the number of components that an expert may rescale, in model order
    rows: rows of the tables, row 0 (the base model) included. Experts beyond that wait in host memory and are loaded when they are used;
        the least recently used one gives up its row, never one that a live `ids` tensor names.
    """

    def __init__(
        self,
        layers: Sequence[tuple[SVFLinear, tuple[str, ...]]],
        rows: int,
        origin: Origin,
        routing: Routing,
        plan: dict,
    ):
        if rows < 2:
            raise ValueError(f"rows={rows}: row 0 is the base model, so at least 2 are needed")
        self.rows, self.origin, self.routing, self.plan = rows, origin, routing, plan
        self.table = ScaleTable(layers, rows)
        self._slots, self.width = self.table.slots, self.table.width
        self.matrices = {n: s.layer.support for s in self._slots for n in s.names}
        self._places = {n: (s, i) for s in self._slots for i, n in enumerate(s.names)}
        self._experts: dict[str, tuple[Tensor, dict]] = {}  # name -> (z - 1 on the host [C], manifest)
        self._rows = Rows(rows)  # of names, and of mixtures as sorted (name, weight) pairs
        self._training = Trainables(self._slots)
        self._default: Name = None
        self._dense: dict[object, Tensor] = {}  # experts whose dense weights are kept -> ids, which hold their row
        self._one_row = WeakIdKeyDictionary()  # ids tensor -> the row that is all of it
        self._lock = threading.RLock()
        self.loads = 0
        self._on_load: Callable[[object], None] | None = None
        for group in find_groups(layers):
            for layer in group.layers:
                layer.group = group

    # --- what is in the bank

    @property
    def evictions(self) -> int:
        """How often an expert gave up its row to another one."""
        return self._rows.evictions

    @property
    def rows_in_use(self) -> int:
        """How many rows live ids tensors, kept dense weights and training hold; row 0 is not counted."""
        return self._rows.in_use

    def watch(self, loaded: Callable[[Name], None] | None, evicted: Callable[[Name], None] | None) -> None:
        """Have each load into a row, and each eviction from one, told as it is counted in `loads` and `evictions`: with an expert's name or a mixture.

        They are called on whichever thread caused it, with the bank locked: count and return. None ends it; a copy of the model is not watched.
        """

        def by_name(told: Callable[[Name], None] | None) -> Callable[[object], None] | None:
            return told and (lambda key: told(dict(key) if isinstance(key, tuple) else key))

        with self._lock:
            self._on_load, self._rows.on_evict = by_name(loaded), by_name(evicted)

    def has_room_for(self, name: Name) -> bool:
        """Whether `ids(name)` would find a row now. Raises KeyError (unknown name)."""
        with self._lock:
            key = self._key(name)
            return key is None or self._rows.room_for(key)

    @property
    def names(self) -> list[str]:
        return [*self._experts, *self._training]

    def __contains__(self, name: object) -> bool:
        return name in self._experts or name in self._training

    def __len__(self) -> int:
        return len(self._experts) + len(self._training)

    def __getitem__(self, name: str) -> Expert:
        """The expert as it stands here: on this model's supports; one in training as it is now."""
        self._known(name)
        if name in self._training:
            return self.expert(self._training.z(name))
        delta, manifest = self._experts[name]
        return self.expert(unflatten(self._slots, 1 + delta), **manifest)

    def __repr__(self) -> str:
        return f"ExpertBank({len(self.matrices)} matrices, {len(self)} experts, {self.rows} rows: {self.describe()})"

    def describe(self) -> str:
        """Which forms were picked for how many matrices, why, and the bytes a token reads compared with dense layers in the model's dtype."""
        counts = Counter(self.plan.values())
        reads = dense = 0
        for s in self._slots:
            x, (m, c), n = s.shape[0], s.layer.U.shape[-2:], s.layer.Vt.shape[-1]
            whole = x * m * n * s.layer.dtype.itemsize
            dense += whole
            reads += x * (m + n) * c * s.layer.U.dtype.itemsize + (whole if s.layer.form == "delta" else 0)
        forms = ", ".join(f"{count} {form} ({why})" for (form, why), count in counts.items())
        kinds = {str(s.layer.U.dtype).removeprefix("torch.") for s in self._slots if s.layer.U.dtype != s.layer.dtype}
        said = f" (factors in {' and '.join(sorted(kinds))})" if kinds else ""
        return f"{forms}; reads {reads / dense:.2f}x the dense layers{said}"

    @property
    def spans(self) -> dict[str, slice]:
        """{matrix: its columns} in a row of `scratch`, those that an expert may rescale."""
        return spans(self._slots)

    def sigma(self, name: str) -> Tensor:
        """[R] fp32, the singular values of a matrix, largest first."""
        slot, i = self._find(name)
        return slot.layer.sigma.reshape(slot.shape)[i]

    def expert(self, z: Mapping[str, Tensor], **manifest) -> Expert:
        """An `Expert` that carries the identity of this model's factors, as a trained one must."""
        unknown = [n for n in z if n not in self.matrices]
        if unknown:
            raise ValueError(f"no matrix {unknown[0]!r} in this bank; it has {', '.join(list(self.matrices)[:4])}, ...")
        return self.origin.stamp(z, manifest)

    # --- adding and removing

    def add(self, name: str, expert: Expert | str | os.PathLike, max_error: float = 0.1, replace: bool = False) -> None:
        """Take an expert into the bank, from memory or from where one was saved.

        max_error: most that may be lost where the expert rescales components outside a layer's support, as
            max sigma_i |z_i - 1| over what is left out, divided by the same over everything: ||dW - dW_k|| / ||dW|| in the spectral norm
        replace: whether `name` may exist. The new values go into the row it has, unless a live ids tensor uses that.
        Raises ExpertError or ExpertMismatch (file, values, other factors), ValueError (name taken, too much lost).
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"an expert's name is a non-empty string, not {name!r}")
        if name in self and not replace:
            raise ValueError(f"the bank has an expert named {name!r}; remove it first, or pass replace=True")
        if name in self._training:
            raise ValueError(f"{name!r} is in training and cannot be replaced; stop_training({name!r}) first")
        if not isinstance(expert, Expert):
            expert = Expert.load(expert)
        self.origin.check(expert)
        delta, lost = self._flatten(expert, max_error, name)
        manifest = {**expert.manifest, "lost": lost} if lost else dict(expert.manifest)
        with self._lock:
            self._experts[name] = (delta, manifest)
            dense = name in self._dense
            self._drop_dense(name)
            self._forget_mixtures_of(name)
            row = self._rows.find(name)
            if row is not None and not self._rows.pinned(row):
                self.table.write(row, delta)
            else:
                self._rows.drop(name)
                if self._rows.free() is not None:
                    self._load(name)
            if dense:
                self.keep_dense(name)

    def remove(self, name: str) -> None:
        """Forget an expert. A running forward that uses it ends with it; its row is free afterwards."""
        self._known(name)
        if name in self._training:
            raise ValueError(f"{name!r} is in training; stop_training({name!r}) first")
        with self._lock:
            del self._experts[name]
            self._drop_dense(name)
            self._forget_mixtures_of(name)
            self._rows.drop(name)

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write every expert to `folder`/{name}.safetensors; returns the paths."""
        paths = [Path(folder) / f"{name}.safetensors" for name in self.names]
        for name, path in zip(self.names, paths, strict=True):
            self[name].save(path)
        return paths

    # --- choosing rows

    def ids(self, names: Name | Sequence[Name] | Sequence[Sequence[Name]]) -> Tensor:
        """Rows for names, int32 on the model's device: () for one name, [B] for a list, [B, S] for a list of lists.

        A name is an expert's, None for the base model, or a mixture {name: weight}: 1 + sum_k weight_k (z_k - 1), which is the paper's
        sum_k weight_k z_k (section 3.2) when the weights sum to one. Experts that are not in a row are loaded; while the tensor lives,
        its rows keep their experts. Raises KeyError (unknown name), RuntimeError (more experts at once than rows).
        """
        with self._lock:
            flat: list[Name] = list(flat_names(names))
            rows = self.pin(flat)
            out = torch.tensor(rows, dtype=torch.int32).reshape(shape_of(names)).to(self.device)
            weakref.finalize(out, self.unpin, rows)
            if len(set(rows)) == 1:
                self._one_row[out] = rows[0]
            return out

    def pin(self, names: Sequence[Name]) -> list[int]:
        """The row of each name, kept from other experts until `unpin` is given this list: `ids` for those that keep the rows on the host.

        Raises KeyError (unknown name), RuntimeError (more experts at once than rows).
        """
        with self._lock:
            rows: dict[object, int] = {None: 0}
            keys = [self._key(n) for n in names]
            try:
                for key in dict.fromkeys(k for k in keys if k is not None):
                    row = self._rows.find(key) or self._load(key)
                    self._rows.pin(row)
                    rows[key] = row
            except BaseException:
                self.unpin(list(rows.values()))
                raise
            return [rows[k] for k in keys]

    def unpin(self, rows: Sequence[int]) -> None:
        """Let go of what one call of `pin` returned."""
        with self._lock:
            self._rows.unpin(set(rows) - {0})

    def row_of(self, ids: Tensor) -> int | None:
        """The one row that a tensor made by `ids` holds; None if there are several, or if it is not known without asking the device."""
        return None if torch.compiler.is_compiling() else self._one_row.get(ids)

    def use(self, names: Name | Sequence[Name] | Tensor) -> Scope:
        """A scope: inside its `with` block every forward of the model uses these experts; one name (the usual case) holds for any batch."""
        ids = self.check_ids(names) if isinstance(names, Tensor) else self.ids(names)
        return self.routing.use(Route(ids), f"bank.use({names!r})")

    @property
    def default(self) -> Name | Sequence[Name] | Tensor:
        """The experts of every forward, in every thread, that names none and is in no scope: "one expert for everything". None: the base model.

        Set it to one name or mixture. The expert keeps its row while it is the default.
        """
        return self._default

    @default.setter
    def default(self, name: Name) -> None:
        if name is not None and not isinstance(name, (str, Mapping)):
            raise TypeError(
                f"bank.default = {name!r}; expected one name, a mixture {{name: weight}}, or None for the base model"
            )
        ids = None if name is None else self.ids(name)
        self.routing.default = None if ids is None else Route(ids)
        self._default = name

    def keep_dense(self, name: Name) -> int:
        """Keep W' = U diag(sigma * z) Vᵀ of one expert beside the factors, in every layer in factored form, and use it where a whole forward has
        that expert: it then costs what the dense model costs. Returns the bytes that this takes: those of the dense layers.

        name: an expert's, None (the base model) or a mixture. It keeps its row until `drop_dense`; an expert that is replaced is made again.
        For one expert and no other, `unpatch_model(model, expert=...)` does the same without the factors.
        Raises KeyError (unknown name), ValueError (in training), RuntimeError (no row free).
        """
        key = self._key(name)
        if key in self._training:
            raise ValueError(
                f"{name!r} is in training: its weights change at every step; stop_training({name!r}) first"
            )
        with self._lock, torch.no_grad():
            self._dense[key] = ids = self.ids(name)
            made = []
            for s in self._slots:
                if s.layer.form == "factored":
                    made.append(s.layer.dense(self.row_of(ids)))
                    s.layer.dense_rows[self.row_of(ids)] = made[-1]
            return sum(W.numel() * W.element_size() for W in made)

    def drop_dense(self, name: Name) -> None:
        """Undo `keep_dense`. Raises KeyError if nothing is kept for the name."""
        key = self._key(name)
        if key not in self._dense:
            raise KeyError(f"no dense weights are kept for {name!r}")
        self._drop_dense(key)

    def keeps_dense(self, name: Name) -> bool:
        """Whether dense weights are kept for an expert."""
        return self._key(name) in self._dense

    def _drop_dense(self, key: object) -> None:
        ids = self._dense.pop(key, None)
        if ids is not None:
            for s in self._slots:
                if s.layer.form == "factored":
                    s.layer.dense_rows.pop(self.row_of(ids), None)

    def check_ids(self, ids: Tensor) -> Tensor:
        """Raises ValueError or IndexError if the tensor cannot be expert_ids. Values are looked at on the CPU only: no synchronisation."""
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.dim() > 2:
            got = f"{ids.dtype} of {ids.dim()} dimensions" if isinstance(ids, Tensor) else repr(ids)
            raise ValueError(
                f"expert_ids is {got}; wanted an int32 or int64 tensor, 0-dim, [B] or [B, S]; bank.ids([...]) makes one from names"
            )
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.rows:
                raise IndexError(
                    f"expert_ids holds {low if low < 0 else high}; the bank has rows 0 (base) to {self.rows - 1}"
                )
        return ids

    @property
    def layers(self) -> list[tuple[SVFLinear, tuple[str, ...]]]:
        """Every patched layer with the names of its matrices, in model order."""
        return [(s.layer, s.names) for s in self._slots]

    @property
    def device(self) -> torch.device:
        return self._slots[0].layer.scale.device

    # --- training

    def start_training(self, name: str, parametrisation: str = "raw", init: Expert | None = None) -> list[nn.Parameter]:
        """Make `name` a trainable expert: a parameter p per layer over its support, whose row every forward sees as it is then.

        parametrisation: "raw", z = 1 + p from p = 0; "sigmoid", the authors' release: z = sigmoid(p) scaled so that the trace of W is kept,
            from p = 0.1 + 0.01 randn. init: start from this expert instead ("raw" only).
        Returns the parameters, in model order. Raises ValueError on a taken name or an unknown parametrisation.
        """
        self._training.check(parametrisation, init)
        if name in self:
            raise ValueError(
                f"the bank has an expert named {name!r}; choose another name, or remove it and pass it as init"
            )
        start = None
        if init is not None:
            self.origin.check(init)
            start, _ = self._flatten(init, 0.0, name)
        with self._lock:
            row = self._rows.take(name)
            self._rows.pin(row)  # until training stops
            parameters = self._training.start(name, row, parametrisation, start)
            self.routing.training = len(self._training)
            return parameters

    def stop_training(self, name: str, /, **manifest) -> Expert:
        """End the training of `name`: it becomes an ordinary expert of the bank, which is returned."""
        if name not in self._training:
            raise KeyError(f"{name!r} is not in training; in training are {self.in_training or 'none'}")
        expert = self.expert(self._training.z(name), **manifest)
        with self._lock:
            self._training.stop(name)
            self.routing.training = len(self._training)
            self._rows.unpin([self._rows.find(name)])
            self._rows.drop(name)
        self.add(name, expert)
        return self[name]

    @property
    def in_training(self) -> list[str]:
        return list(self._training)

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """{matrix, or module and stack: p} of an expert in training, in model order."""
        return self._training.parameters(name)

    # --- rows

    def scratch(self, count: int) -> Scratch:
        """Lend `count` rows to a search, in a `with` block: `rows.write(delta [P, C])` fills them with z - 1, `rows.ids` names them.

        Raises RuntimeError if fewer rows are free of live ids.
        """
        return Scratch(self, count)

    def _load(self, key: object) -> int:
        if isinstance(key, tuple):
            delta = torch.zeros(self.width)
            for name, weight in key:
                delta.add_(self._experts[name][0], alpha=weight)
        else:
            delta = self._experts[key][0]
        row = self._rows.take(key)
        self.table.write(row, delta)
        self.loads += 1
        if self._on_load:
            self._on_load(key)
        return row

    def _forget_mixtures_of(self, name: str) -> None:
        def test(key: object) -> bool:
            return isinstance(key, tuple) and any(n == name for n, _ in key)

        for key in [k for k in self._dense if test(k)]:
            self._drop_dense(key)
        self._rows.drop_where(test)

    # --- names and numbers

    def _known(self, name: str) -> None:
        if name not in self:
            raise KeyError(
                f"no expert named {name!r} in the bank; it has {', '.join(map(repr, self.names)) or 'none yet'}"
            )

    def _key(self, name: Name) -> object:
        """`key_of` a name whose experts are in the bank, and fit for it."""
        key = key_of(name)
        parts = [n for n, _ in key] if isinstance(key, tuple) else []
        for n in name if isinstance(name, Mapping) else [] if name is None else [name]:
            self._known(n)
        if any(n in self._training for n in parts):
            raise ValueError("an expert in training cannot be part of a mixture: its row changes at every step")
        return key

    def _find(self, name: str) -> tuple[Slot, int]:
        if name not in self._places:
            raise KeyError(f"no matrix {name!r} in this bank; it has {', '.join(list(self.matrices)[:4])}, ...")
        return self._places[name]

    def _flatten(self, expert: Expert, max_error: float, name: str) -> tuple[Tensor, float]:
        return flatten(self._slots, self.origin, expert, max_error, name)

    def __getstate__(self) -> dict:
        # Neither locks nor live ids tensors can be copied: a copy starts with nothing in use but what is in training.
        state = {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_one_row")}
        return {**state, "_rows": self._rows.without_pins(self._training), "_dense": {}, "_on_load": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _one_row=WeakIdKeyDictionary())
        self.routing.training, self.default = len(self._training), self._default
