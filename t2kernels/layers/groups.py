"""Layers that read the same input (q, k, v; gate, up) as one: the first of them that runs does the common work, the others pick up their part.

Their V's lie side by side in one tensor, as their scale rows do in the bank's table, so that x V of all of them is one product and one launch.
What is kept between them is used only for the very tensor it was made from, unchanged, under the same route, and only once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from t2kernels.ops.dispatch import expand, fuses_swiglu, shrink, swiglu
from t2kernels.ops.op import call_group

from .active import Route

# Names of modules of one parent whose forward hands the same tensor to each. A wrong guess costs time and no more: a group whose members turn
# out to be fed differently gives up.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Group:
    """Layers of one form, dtype and input width that are neighbours in the bank's table.

    A layer asks with `expanded` (delta form) or `output` (factored form); None means that it must work alone: gradients are on, the model is
    being compiled or moved, an input has no version counter, or the guess was wrong.
    """

    def __init__(self, layers: Sequence):
        self.layers = tuple(layers)
        self.columns, start = [], 0
        for layer in self.layers:
            self.columns.append(slice(start, start + layer.Vt.shape[0]))
            start += layer.Vt.shape[0]
        self.hits = self.wasted = 0
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._seen: list[Tensor] | None = None  # the buffers that were found side by side
        self._without_route: dict[
            Group, _Made
        ] = {}  # where there is a route, it keeps what was made, and ends with its forward

    def expanded(self, layer, y: Tensor, x: Tensor, route: Route) -> Tensor | None:
        """y + ((x V) * scale[ids]) Uᵀ of one member, with x V computed for all at the first one's turn."""
        made = self._take(layer, x, route, self._shrink)
        if made is None:
            return None
        return expand(made[:, self.columns[self.layers.index(layer)]], [layer.U], [y], [None], x.dtype, x.shape[:-1])[0]

    def output(self, layer, x: Tensor, route: Route | None, ids: Tensor) -> Tensor | None:
        """((x V) * scale[ids]) Uᵀ + bias of one member, computed for all at the first one's turn."""

        def run(x: Tensor, _: object) -> list[Tensor]:
            V, scale = self._frozen()
            biases = [m.bias for m in self.layers]
            some = next((b for b in biases if b is not None), None)
            if some is not None:
                biases = [
                    x.new_zeros(m.U.shape[0]) if b is None else b.to(x.dtype)
                    for m, b in zip(self.layers, biases, strict=True)
                ]
            return call_group(x, V, [m.U for m in self.layers], scale, ids, [], biases if some is not None else [])

        made = self._take(layer, x, route, run)
        return None if made is None else made[self.layers.index(layer)]

    def swiglu(self, x: Tensor, route: Route | None, bases: Callable[[], list[Tensor]] | None) -> Tensor | None:
        """silu(y_gate) * y_up of the two members in one kernel, where the planner picks the skinny kernels; else None.

        bases: makes the base outputs of the two (delta form), or None (factored form)
        """
        if (route is None and bases is not None) or not self._may(x) or not self._ready():
            return None
        first, lead = self.layers[0], x.shape[:-1]
        ids = first.base_ids if route is None else route.fit(lead).to(x.device)
        V, scale = self._frozen()
        Us = [m.U for m in self.layers]
        if not fuses_swiglu(x, V, Us, ids, bases is not None):
            return None
        for member in self.layers:
            member.table()
        made = [None, None] if bases is None else bases()
        if any(b is not None and b.dtype != x.dtype for b in made):
            return None
        biases = [None if bases is not None or m.bias is None else m.bias.to(x.dtype) for m in self.layers]
        return swiglu(x, V, Us, scale, ids, made, biases)

    def _shrink(self, x: Tensor, route: Route) -> Tensor:
        V, scale = self._frozen()
        return shrink(x, V, scale, route.fit(x.shape[:-1]).to(x.device))

    def _take(self, layer, x: Tensor, route: Route | None, make):
        if not self._may(x) or (self.wasted > 3 and self.wasted > self.hits):
            return None
        kept = self._without_route if route is None else route.made
        made = kept.pop(self, None)
        if made is not None and layer in made.waiting and made.fits(x):
            made.waiting.remove(layer)
            self.hits += 1
            if made.waiting:
                kept[self] = made
            return made.what
        self.wasted += made is not None  # nobody came for the rest with the same x: an error between, or a wrong guess
        if not self._ready():
            return None
        for member in self.layers:
            if member._training_rows:
                member.table()  # brings the rows of experts in training up to date
        made = kept[self] = _Made(make(x, route), x, [m for m in self.layers if m is not layer])
        return made.what

    def _may(self, x: Tensor) -> bool:
        return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference())

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """V [N, C] and scale [E, C] of all members, laid side by side; None where their dtypes or devices forbid that."""
        return self._frozen() if self._ready() else None

    def _frozen(self) -> tuple[Tensor, Tensor]:
        """V [N, C] and scale [E, C] of all members."""
        Vt, scale = self._tensors
        return Vt.t(), scale

    def _ready(self) -> bool:
        """Whether V's and tables lie side by side; they are laid so (again, after the model was moved) where that is possible."""
        if self._seen is not None and all(a is b for a, b in zip(self._buffers(), self._seen, strict=True)):
            return True  # moving a module gives it other tensors
        first = self.layers[0]
        Vt, step = first.Vt, first.scale.element_size()
        if not self._side_by_side():
            same = {(m.Vt.device, m.Vt.dtype, m.Vt.shape[1], m.scale.stride(0)) for m in self.layers}
            if len(same) > 1 or not all(
                _follows(m.scale, first.scale, c.start * step) for m, c in zip(self.layers, self.columns, strict=True)
            ):
                return False
            Vt = torch.cat([m.Vt for m in self.layers])
            for m, c in zip(self.layers, self.columns, strict=True):
                m.Vt = Vt[c]
        C = self.columns[-1].stop
        if (
            self._tensors is None
            or self._tensors[0].data_ptr() != Vt.data_ptr()
            or self._tensors[1].data_ptr() != first.scale.data_ptr()
        ):
            Vt = first.Vt.as_strided((C, first.Vt.shape[1]), first.Vt.stride())
            self._tensors = Vt, first.scale.as_strided((first.scale.shape[0], C), first.scale.stride())
        self._seen = self._buffers()
        return True

    def _buffers(self) -> list[Tensor]:
        return [m._buffers[name] for m in self.layers for name in ("Vt", "scale")]

    def _side_by_side(self) -> bool:
        first = self.layers[0]
        width = first.Vt.shape[1] * first.Vt.element_size()
        return all(
            _follows(m.Vt, first.Vt, c.start * width)
            and _follows(m.scale, first.scale, c.start * first.scale.element_size())
            for m, c in zip(self.layers, self.columns, strict=True)
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tensors": None, "_seen": None, "_without_route": {}}


def _follows(t: Tensor, first: Tensor, distance: int) -> bool:
    """Whether t begins `distance` bytes behind `first` in the same memory."""
    return (
        t.data_ptr() - first.data_ptr() == distance
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


class _Made:
    """What was computed for all members from one x, and who has not come for it yet."""

    def __init__(self, what, x: Tensor, waiting: list):
        self.what, self.waiting = what, waiting
        self._x, self._version = weakref.ref(x), x._version

    def fits(self, x: Tensor) -> bool:
        return self._x() is x and x._version == self._version


def find_groups(layers: Sequence[tuple]) -> list[Group]:
    """Groups among a bank's (layer, names): neighbours whose names say that they read the same input."""

    def key(pair: tuple):
        layer, names = pair
        shared = shared_input(names[0]) if len(names) == 1 else None
        return (shared, layer.form, layer.Vt.dtype, layer.Vt.shape[-1]) if shared else id(layer)

    runs = ([layer for layer, _ in run] for _, run in groupby(layers, key))
    return [Group(run) for run in runs if len(run) > 1]


def shared_input(name: str) -> tuple[str, tuple[str, ...]] | None:
    """What matrices whose modules are handed the same tensor have in common: (parent, names together); None for others."""
    parent, _, leaf = name.rpartition(".")
    together = next((t for t in TOGETHER if leaf in t), None)
    return None if together is None else (parent, together)
