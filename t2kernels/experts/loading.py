"""Rows for names (`LoadedExperts`), rows for the candidates of a search (`Scratch`), and their lock (`Lock`)."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError, InputTypeError, OutOfRangeError, StateError, UnknownNameError
from t2kernels.layers.routing.active import Routing
from t2kernels.layers.routing.route import Route
from t2kernels.layers.routing.scopes import Scope

from .columns import Columns
from .names import Key, Name, Names, flat_names, key_of, shape_of
from .origin import Origin
from .rows import RowCounts, Rows
from .table import ScaleTable
from .trainables import Trainables


class LoadedExperts(Columns):
    """Experts in host memory, and the rows of the tables that they are loaded into.

    If the rows are all taken, the least recently used expert loses its row. An expert that a live tensor of `ids` names
    keeps its own.

    rows: rows of the tables, row 0 (the base model) included
    routing: which row each token of the running forward uses
    """

    def __init__(self, table: ScaleTable, origin: Origin, routing: Routing):
        super().__init__(table, origin)
        self.rows: int = table.rows
        self.routing: Routing = routing
        self._experts: dict[str, tuple[Tensor, dict[str, Any]]] = {}  # name -> (z - 1 [C] on the CPU, manifest)
        self._training = Trainables(table.slots)
        self._counts = RowCounts()
        self._rows = Rows(table.rows, self._counts)
        self._lock = Lock()
        self._default: Name = None

    @property
    def names(self) -> list[str]:
        """The experts' names, those in training last."""
        with self._lock:
            return [*self._experts, *self._training]

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._experts or name in self._training

    def __len__(self) -> int:
        with self._lock:
            return len(self._experts) + len(self._training)

    def ids(self, names: Names) -> Tensor:
        """The rows of names, int32 on the model's device: () for one name, [B] for a list, [B, S] for a list of lists.

        names: an expert's name, None for the base model, or a mixture {name: weight}, which is
            1 + Σ weight_k (z_k - 1); where the weights sum to 1, the paper's Σ weight_k z_k (section 3.2)

        Loads the experts that have no row. While the tensor is alive, its rows keep their experts.
        Raises KeyError (unknown name), RuntimeError (more experts at once than rows).
        """
        flat = list(flat_names(names))
        shape = shape_of(names)
        rows = self.pin(flat)
        with torch.inference_mode(False):  # training may use them
            out = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(shape).to(self.device)
        weakref.finalize(out, self._rows.release, set(rows) - {0})
        return out

    def pin(self, names: Sequence[Name]) -> list[int]:
        """The row of each name, reserved until `unpin` gets this list. For callers that keep rows on the host.

        Loads the experts that have no row.
        Raises KeyError (unknown name), RuntimeError (more experts at once than rows).
        """
        with self._lock:
            rows: dict[Key | None, int] = {None: 0}
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
        """Release the rows that one call of `pin` returned."""
        with self._lock:
            self._rows.unpin(set(rows) - {0})

    def use(self, names: Names | Tensor) -> Scope:
        """A scope: inside its `with` block every forward of the model uses these experts (`layers.routing.scopes`).

        names: as for `ids`, or a tensor of `ids`. One name fits any batch.
        `with bank.use(...) as ids` gives the ids.
        """
        ids = self.check_ids(names) if isinstance(names, Tensor) else self.ids(names)
        return self.routing.use(Route(ids), f"bank.use({names!r})")

    @property
    def default(self) -> Name:
        """The expert of every forward, in every thread, that names none and is in no scope; None is the base model.

        Set it to a name or a mixture. The expert keeps its row while it is the default.
        Raises TypeError (not one name), KeyError (unknown name), RuntimeError (no row free).
        """
        return self._default

    @default.setter
    def default(self, name: Name) -> None:
        if name is not None and not isinstance(name, (str, Mapping)):
            raise InputTypeError(
                f"bank.default = {name!r}; expected one name, a mixture {{name: weight}}, or None for the base model"
            )
        self.routing.default = None if name is None else Route(self.ids(name))
        self._default = name

    def check_ids(self, ids: Tensor) -> Tensor:
        """Return the tensor if it can be expert_ids. Its values are read on the CPU only, so a GPU is not synchronised.

        Raises ValueError (type, dimensions), IndexError (a row that the tables do not have).
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.dim() > 2:
            got = f"{ids.dtype} of {ids.dim()} dimensions" if isinstance(ids, Tensor) else repr(ids)
            raise InputError(
                f"expert_ids is {got}; wanted an int32 or int64 tensor, 0-dim, [B] or [B, S]; "
                "bank.ids([...]) makes one from names"
            )
        if ids.device.type == "meta":
            raise InputError("expert_ids is on the meta device and has no values; bank.ids([...]) makes one from names")
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.rows:
                raise OutOfRangeError(
                    f"expert_ids holds {low if low < 0 else high}; the bank has rows 0 (base) to {self.rows - 1}"
                )
        return ids

    def has_room_for(self, name: Name) -> bool:
        """Return whether `ids(name)` would find a row now. Raises KeyError (unknown name)."""
        with self._lock:
            key = self._key(name)
            return key is None or self._rows.has_room_for(key)

    @property
    def rows_in_use(self) -> int:
        """How many rows are reserved by live tensors of `ids`, pins and training; row 0 does not count."""
        with self._lock:
            return self._rows.in_use

    @property
    def loads(self) -> int:
        """How often an expert or a mixture was written into a row."""
        return self._counts.loads

    @property
    def evictions(self) -> int:
        """How often an expert or a mixture lost its row to another one."""
        return self._counts.evictions

    def watch(self, loaded: Callable[[Name], None] | None, evicted: Callable[[Name], None] | None) -> None:
        """Register callbacks for cache events; None unregisters.

        loaded: called with the name, or the mixture, that was written into a row
        evicted: called with the name, or the mixture, that lost its row

        They run on the thread that caused the event, with the bank's lock held: keep them short. A copy of the model is
        not watched.
        """
        with self._lock:
            self._counts.watch(loaded, evicted)

    def scratch(self, count: int) -> Scratch:
        """Lend `count` rows to a search, in a `with` block.

        In it `rows.write(delta [P, C])` fills the rows and `rows.ids` names them.
        Raises RuntimeError if fewer rows can be had.
        """
        return Scratch(self._rows, self.table, self._lock, self.width, self.device, count)

    # --- the caller holds the lock

    def _is_default(self, name: str) -> bool:
        return name in self._default if isinstance(self._default, Mapping) else name == self._default

    def _check_default(self, name: str) -> None:
        """Raise StateError if `name` is the default and its new values would find no row beside the old ones."""
        if self._is_default(name) and not self._rows.has_room_for(object()):
            raise StateError(
                f"{name!r} is bank.default, or a part of it, and no row is free for its new values: "
                "set bank.default = None first, or patch with more rows"
            )

    def _renew_default(self, name: str) -> None:
        """Let the default use the new values of an expert."""
        if self._is_default(name):
            with contextlib.suppress(StateError):  # training has ended: the row of the default holds the same values
                self.default = self._default

    def _load(self, key: Key) -> int:
        delta = self._delta(key)
        row = self._rows.take(key)
        self._write(row, key, delta)
        self._counts.loaded(key)
        return row

    def _delta(self, key: Key) -> Tensor:
        if isinstance(key, tuple):
            delta = torch.zeros(self.width, dtype=torch.float32, device="cpu")
            for name, weight in key:
                delta.add_(self._experts[name][0], alpha=weight)
            # What lies between experts that can run can run.
            between = all(w >= 0 for _, w in key) and sum(w for _, w in key) <= 1
            if not between and (reason := self.table.unsupported(delta)):
                raise InputError(
                    f"the mixture {dict(key)} cannot run on this model: {reason}; make its weights smaller"
                )
            return delta
        return self._experts[key][0]

    def _write(self, row: int, key: Key, delta: Tensor) -> None:
        self.table.write(row, delta)
        self.table.adapters.set(row, dict(key) if isinstance(key, tuple) else {key: 1.0})

    def _drop_mixtures_of(self, name: str) -> None:
        self._rows.drop_where(lambda key: isinstance(key, tuple) and any(n == name for n, _ in key))

    def _require(self, name: str) -> None:
        if name not in self:
            known = ", ".join(map(repr, self.names)) or "none yet"
            raise UnknownNameError(f"no expert named {name!r} in the bank; it has {known}")

    def _key(self, name: Name) -> Key | None:
        """`key_of` a name, after a check that its experts are here and may be used so."""
        key = key_of(name)
        for n in name if isinstance(name, Mapping) else [] if name is None else [name]:
            self._require(n)
        if isinstance(key, tuple) and any(n in self._training for n, _ in key):
            raise InputError("an expert in training cannot be part of a mixture: its row changes at every step")
        return key

    def __getstate__(self) -> dict[str, Any]:
        # A lock and the pins of live tensors cannot be copied. In a copy only the experts in training hold their rows.
        with self._lock:
            state = {k: v for k, v in self.__dict__.items() if k != "_lock"}
            table = copy.copy(self.table)
            table.adapters = self.table.adapters.copy()
            rows = self._rows.copy(self._training)
            return {**state, "_experts": dict(self._experts), "_rows": rows, "table": table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())
        # Another thread may have given a row to another expert after the layers were copied, so the rows are written.
        self.table.adapters.lay()
        for key, row in self._rows.items():
            if key not in self._training:
                self._write(row, key, self._delta(key))
        self.routing.training, self.default = len(self._training), self._default


class Scratch:
    """P rows borrowed from a bank until `close`. `bank.scratch(P)` makes it, best in a `with` block.

    rows, table, lock: of the bank
    width: C, numbers of a candidate
    device: of the model
    count: P
    ids: [P] int32 on the model's device, the rows

    Raises ValueError for P < 1, RuntimeError if fewer than P rows can be had.
    """

    def __init__(self, rows: Rows, table: ScaleTable, lock: Lock, width: int, device: torch.device, count: int):
        if count < 1:
            raise InputError(f"scratch({count}): wanted at least one row")
        self._rows, self._table, self._lock, self._width = rows, table, lock, width
        self._keys = [object() for _ in range(count)]
        self._taken: list[int] = []
        with lock:
            try:
                for key in self._keys:
                    self._taken.append(rows.take(key))
                    rows.pin(self._taken[-1])
            except BaseException:
                self.close()
                raise
        self.ids: Tensor = torch.tensor(self._taken, dtype=torch.int32, device=device)

    def write(self, delta: Tensor) -> Tensor:
        """scale[ids[p]] = base + sigma * delta[p] in every layer, in place.

        delta: [P' <= P, C], z - 1 of each candidate over the supports of all matrices
        Returns the ids of the rows written, [P']. Raises ValueError for another shape or values that are not finite.
        """
        if delta.dim() != 2 or delta.shape[1] != self._width or not 1 <= len(delta) <= len(self.ids):
            raise InputError(f"candidates are {list(delta.shape)}; wanted [at most {len(self.ids)}, {self._width}]")
        if not torch.isfinite(delta).all():
            raise InputError("a candidate is not finite: its alphas, or the experts it mixes, are NaN or infinite")
        self._table.write(self.ids[: len(delta)], delta)
        return self.ids[: len(delta)]

    def close(self) -> None:
        """Give the rows back. A second call has no effect."""
        with self._lock:
            self._rows.unpin(self._taken)
            self._taken = []
            for key in self._keys:
                self._rows.drop(key)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Lock:
    """A re-entrant lock for `with` blocks.

    A fork copies a lock as it is, but not the thread that holds it, which could then never release it. In the child, a
    lock that another thread held is made anew. What that thread was changing may be half done there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> Lock:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Replace the lock unless it is free or held by this thread. Called in a forked child."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


def _renew() -> None:
    for lock in list(_LOCKS):
        lock.renew()


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew)
