"""Groups: layers that read the same input (q, k, v; gate, up) share the product x V.

q, k, v read the same x. The first of them to run computes x V for all three and caches it; the others reuse it if they
get the identical, unmodified tensor under the same route. Their V's lie side by side in one tensor, and their scale
rows side by side in the bank's table, so that this is one product and one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from t2kernels.ops.dispatch import adds_in_place, device_of, expand, fuses_swiglu, plan, shrink, swiglu
from t2kernels.ops.joint import can_join, join
from t2kernels.ops.op import call, call_group
from t2kernels.ops.prepared import Prepared
from t2kernels.ops.stream_order import capturing, finish

from .delta_forward import DeltaForward, dense, makes_new, plain_parameters
from .routing.active import Routing
from .routing.route import Route

# Names of modules of one parent whose forward passes the same tensor to each. A wrong guess costs time only: a group
# whose members get different tensors gives up.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class Member(Protocol):
    """What a group needs of an `SVFLinear`. (A protocol, since `linear.py` imports this file.)"""

    form: str
    routing: Routing
    Vt: Tensor
    U: Tensor
    scale: Tensor
    base: Any

    def table(self) -> Tensor:
        """scale with the rows of experts in training up to date."""
        ...


class Group:
    """Layers of one form, dtype and input width that are neighbours in the bank's table.

    `changed()` and `expanded()` (delta form) and `output()` (factored form) return None if the shared result cannot be
    used; the layer then computes its own. That is so with gradients, after the factors of a member were changed, and
    for groups whose members got different inputs several times. Under torch.compile only `changed()` shares.

    layers: the members, in the order of the bank
    columns: the columns of each in V and scale of the group
    hits: how often a member reused the shared result; wasted: how often a shared result was dropped before all used it
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers: tuple[Any, ...] = tuple(layers)
        self.columns: list[slice] = []
        start = 0
        for layer in self.layers:
            self.columns.append(slice(start, start + layer.Vt.shape[0]))
            start += layer.Vt.shape[0]
        self.hits: int = 0
        self.wasted: int = 0
        self._op: Prepared | None = None  # with V and scale of all members
        # each member with the parameters of its dense layer, if that is a plain one; None: no layer to compute y with
        self._dense: list[tuple[Any, dict[str, Any]]] | None = None
        self._fresh: bool = False  # whether the outputs of all dense layers may be overwritten
        self._traced: tuple[Tensor, list[Tensor], list[Any]] | None = None  # `_Shared` of a forward that is compiled
        # the members' buffers when they were last found side by side, and Vt, U and scale in them
        self._seen: list[tuple[dict[str, Any], Tensor, Tensor, Tensor]] = []
        # The cache of forwards without a route. A route has a cache of its own, which ends with its forward.
        self._base_cache: dict[Group, _Shared] = {}

    def changed(self, layer: Member, x: Tensor, route: Route) -> Tensor | None:
        """x Wᵀ + ((x V) * scale[ids]) Uᵀ of one member. The first member's call computes it for all, in one op."""
        # Few functions are called here: between two layers the weights push this code out of the caches, and a call
        # costs five times what it costs in a loop (80 us a layer of SmolLM2, 14 us in a loop; AMD EPYC).
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(layer, x, route)
        cache = route.cache
        several = len(self.layers) > 1
        if several and (shared := cache.pop(self, None)) is not None:
            if shared.kind == "changed" and layer in shared.result and shared.fits(x):
                self.hits += 1
                y = shared.result.pop(layer)
                if shared.result:
                    cache[self] = shared
                return y
            self.wasted += 1
        if type(x) is not Tensor and torch.compiler.is_compiling():  # an export that traces without Dynamo
            return self._compiled(layer, x, route)
        on = "cpu" if x.is_cpu else x.device.type
        if (self.wasted > 3 and self.wasted > self.hits) or torch.is_autocast_enabled(on):
            return None
        op = self._op if self._ready() else None
        if op is None or self._dense is None:
            return None
        if layer.routing.training:
            for member in self.layers:
                member.table()  # writes the rows of experts in training
        ys = self._outputs(op, x, route)
        if not several:
            return ys[0]
        made = dict(zip(self.layers, ys, strict=True))
        y = made.pop(layer)
        cache[self] = _Shared("changed", made, x)
        return y

    def joined(self, layer: Member, x: Tensor, route: Route) -> Tensor | None:
        """`changed` with gradients: the first member's call computes the dense products and the changes of all, in one
        step of autograd. None where that cannot be (`ops.joint`)."""
        if not (layer.routing.training or x.requires_grad) or (self.wasted > 3 and self.wasted > self.hits):
            return None
        shared = route.cache.pop(self, None)
        if shared is not None and shared.kind == "joined" and layer in shared.result and shared.fits(x):
            self.hits += 1
            y = shared.result.pop(layer)
            if shared.result:
                route.cache[self] = shared
            return y
        self.wasted += shared is not None
        op = self._op if self._ready() else None
        held = [p for _, p in self._dense or ()]
        if op is None or not held or not all(held):
            return None
        weights, biases = [p["weight"] for p in held], [p["bias"] for p in held]
        if not can_join(x, op.V, weights, biases):
            return None
        ids = route.fit(x.shape[:-1]).cpu()
        if not adds_in_place(plan(x, op.V, op.Us, ids, base=True, grad=True).impl, device_of(x.device)):
            return None
        tables = [m.table() for m in self.layers] if layer.routing.training else [op.scale]
        scale = tables[0] if len(tables) == 1 else torch.cat(tables, 1)
        ys = join(x, op.V, op.Us, scale, ids, weights, biases)
        made = dict(zip(self.layers, ys, strict=True))
        y = made.pop(layer)
        if made:
            route.cache[self] = _Shared("joined", made, x)
        return y

    def _compiled(self, layer: Member, x: Tensor, route: Route) -> Tensor | None:
        """`changed` for a compiler: without weak references, versions and locks, of a group that is laid already."""
        op = self._op
        if op is None or layer.routing.training:
            return None
        if self._traced is None or self._traced[0] is not x or layer not in self._traced[2]:
            ids = route.fit(x.shape[:-1]).to(x.device)
            bases = [dense(m.base(), x) for m in self.layers]
            if any(y.dtype != x.dtype for y in bases):
                return None
            self._traced = x, call_group(x, op.V, op.Us, op.scale, ids, bases, []), list(self.layers)
        _, ys, waiting = self._traced
        waiting.remove(layer)
        if not waiting:
            self._traced = None
        return ys[self.layers.index(layer)]

    def _outputs(self, op: Prepared, x: Tensor, route: Route) -> list[Tensor]:
        bases, dtype, same = [], x.dtype, True
        for m, p in self._dense or ():
            y = linear(x, p["weight"], p["bias"]) if p else dense(m.base(), x)
            same = same and y.dtype is dtype
            bases.append(y)
        ids = route.fit(x.shape[:-1])
        if not (ids.is_cpu and x.is_cpu) and ids.device != x.device:
            ids = ids.to(x.device)
        if not same:
            pairs = zip(self.layers, bases, strict=True)
            return [call(x.to(y.dtype), m.Vt.t(), m.U, m.table(), ids, y) for m, y in pairs]
        if self._fresh:
            return op.add(x, ids, bases)
        return call_group(x, op.V, op.Us, op.scale, ids, bases, [])

    def expanded(self, layer: Member, y: Tensor, x: Tensor, route: Route) -> Tensor | None:
        """y + ((x V) * scale[ids]) Uᵀ of one member. The first member's call computes x V for all."""

        def make(op: Prepared) -> Tensor:
            return shrink(x, op.V, op.scale, route.fit(x.shape[:-1]).to(x.device))

        shared = self._take("expanded", layer, x, route, make)
        if shared is None:
            return None
        g = shared[:, self.columns[self.layers.index(layer)]]
        return expand(g, [layer.U], [y], [None], x.dtype, x.shape[:-1])[0]

    def output(self, layer: Member, x: Tensor, route: Route | None, ids: Tensor) -> Tensor | None:
        """((x V) * scale[ids]) Uᵀ + bias of one member. The first member's call computes it for all."""

        def make(op: Prepared) -> list[Tensor]:
            biases = [_bias(m, x.dtype) for m in self.layers]
            if any(b is not None for b in biases):
                sizes = [m.U.shape[0] for m in self.layers]
                biases = [x.new_zeros(M) if b is None else b for M, b in zip(sizes, biases, strict=True)]
            else:
                biases = []
            return call_group(x, op.V, op.Us, op.scale, ids, [], biases)

        shared = self._take("output", layer, x, route, make)
        return None if shared is None else shared[self.layers.index(layer)]

    def swiglu(self, x: Tensor, ids: Tensor, bases: Callable[[], list[Tensor]] | None) -> Tensor | None:
        """silu(y_gate) * y_up of the two members in one kernel; None unless the planner picks the skinny kernels.

        x: [..., N]; ids: as in `svf_linear`
        bases: computes the base outputs of the two (delta form), or None (factored form)
        """
        op = self.op() if _usable() else None
        if op is None:
            return None
        V, Us, scale = op.V, op.Us, op.scale
        if not fuses_swiglu(x, V, Us, ids, bases is not None):
            return None
        for member in self.layers:
            member.table()
        made = [None, None] if bases is None else bases()
        if any(b is not None and b.dtype != x.dtype for b in made):
            return None
        biases = [None, None] if bases is not None else [_bias(m, x.dtype) for m in self.layers]
        return swiglu(x, V, Us, scale, ids, made, biases)

    def op(self) -> Prepared | None:
        """The op with V [N, C], U and scale [E, C] of all members, which are laid side by side if they are not; None if
        their dtypes or devices differ."""
        return self._op if self._ready() else None

    def unshared(self) -> str | None:
        """Why `changed` and `output` leave each member to work alone, or None: they do not."""
        if self.wasted > 3 and self.wasted > self.hits:
            return "the members got different inputs"
        if self.op() is None:
            return "the factors are of several dtypes or devices"
        delta = self.layers[0].form == "delta"
        return "the forward of a dense layer was replaced" if delta and self._dense is None else None

    def overwrites(self) -> bool:
        """True if the change may be added where the outputs of the dense layers lie: nobody else holds them."""
        return self.op() is not None and self._fresh

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """V and scale of `op`."""
        op = self.op()
        return None if op is None else (op.V, op.scale)

    def scatter(self) -> None:
        """Forget where the members' tensors lie: they are about to move."""
        self._op, self._dense, self._seen, self._traced = None, None, [], None

    def _take(self, kind: str, layer: Member, x: Tensor, route: Route | None, make: Callable[[Prepared], Any]) -> Any:
        """The shared result for x: from the cache, or made now for all members; None if this layer must work alone."""
        if not _usable() or (self.wasted > 3 and self.wasted > self.hits):
            return None
        cache = self._base_cache if route is None else route.cache
        shared = cache.pop(self, None)
        if shared is not None and layer in shared.waiting and shared.kind == kind and shared.fits(x):
            shared.waiting.remove(layer)
            self.hits += 1
            if shared.waiting:
                cache[self] = shared
            return shared.result
        self.wasted += shared is not None  # another x: an error in between, or a wrong guess
        op = self.op()
        if op is None:
            return None
        if layer.routing.training:
            for member in self.layers:
                member.table()  # writes the rows of experts in training
        shared = cache[self] = _Shared(kind, make(op), x, [m for m in self.layers if m is not layer])
        return shared.result

    def _ready(self) -> bool:
        """Lay V's and tables side by side, again after the model was moved. False if that is impossible."""
        for now, Vt, U, scale in self._seen:  # moving a module would have given it other tensors
            if now["Vt"] is not Vt or now["U"] is not U or now["scale"] is not scale:
                break
        else:
            if self._seen:
                return True
        first = self.layers[0]
        with torch.inference_mode(False), torch.no_grad():  # buffers must not become inference tensors
            if not self._side_by_side():
                step = first.scale.element_size()
                same = {(m.Vt.device, m.Vt.dtype, m.Vt.shape[1], m.scale.stride(0)) for m in self.layers}
                if len(same) > 1 or not all(
                    _follows(m.scale, first.scale, c.start * step)
                    for m, c in zip(self.layers, self.columns, strict=True)
                ):
                    return False
                if capturing(first.Vt.device):
                    return False  # the copy would be a part of the graph: nothing is in it before the first replay
                Vt = torch.cat([m.Vt for m in self.layers])
                for m, c in zip(self.layers, self.columns, strict=True):
                    m.Vt = Vt[c]
                finish(Vt.device)
            C = self.columns[-1].stop
            Vt = first.Vt.as_strided((C, first.Vt.shape[1]), first.Vt.stride())
            scale = first.scale.as_strided((first.scale.shape[0], C), first.scale.stride())
            self._op = Prepared(Vt.t(), [m.U for m in self.layers], scale)
        modules = [m.base() for m in self.layers]
        if all(isinstance(d, DeltaForward) for d in modules):
            self._dense = [(m, plain_parameters(d)) for m, d in zip(self.layers, modules, strict=True)]
            self._fresh = all(makes_new(d) for d in modules)
        self._seen = [(m._buffers, m.Vt, m.U, m.scale) for m in self.layers]
        return True

    def _side_by_side(self) -> bool:
        first = self.layers[0]
        width = first.Vt.shape[1] * first.Vt.element_size()
        return all(
            _follows(m.Vt, first.Vt, c.start * width)
            and _follows(m.scale, first.scale, c.start * first.scale.element_size())
            for m, c in zip(self.layers, self.columns, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_op": None, "_dense": None, "_traced": None, "_seen": [], "_base_cache": {}}


def _usable() -> bool:
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


class _Shared:
    """A result computed for all members from one x, and the members that have not used it yet.

    kind: "changed": `result` is {member: its output}, of the members that wait; else it serves all in `waiting`
    """

    def __init__(self, kind: str, result: Any, x: Tensor, waiting: Sequence[Member] = ()) -> None:
        self.kind, self.result, self.waiting = kind, result, list(waiting)
        # Inference tensors have no version counter. No model changes the input of q, k and v between them, so their
        # identity suffices.
        self._x, self._version = weakref.ref(x), None if x.is_inference() else x._version

    def fits(self, x: Tensor) -> bool:
        """True if x is the identical tensor, unmodified."""
        return self._x() is x and (self._version is None or x._version == self._version)


def _bias(layer: Any, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _follows(t: Tensor, first: Tensor, distance: int) -> bool:
    """True if t begins `distance` bytes behind `first` in the same memory."""
    return (
        t.data_ptr() - first.data_ptr() == distance
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def find_groups(layers: Sequence[tuple[Any, tuple[str, ...]]]) -> list[Group]:
    """The groups among the (layer, names) of a bank: neighbours whose names say that they read the same input."""

    def key(pair: tuple[Any, tuple[str, ...]]) -> Any:
        layer, names = pair
        shared = shared_input(names[0]) if len(names) == 1 else None
        return (shared, layer.form, layer.Vt.dtype, layer.Vt.shape[-1]) if shared else id(layer)

    runs = ([layer for layer, _ in run] for _, run in groupby(layers, key))
    return [Group(run) for run in runs if len(run) > 1]


def shared_input(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(parent, names of the modules that get the same input) of a matrix; None if it shares its input with none."""
    parent, _, leaf = name.rpartition(".")
    together = next((t for t in TOGETHER if leaf in t), None)
    return None if together is None else (parent, together)
