"""Which experts a forward that is computed again inside a backward pass belongs to.

Activation checkpointing drops what a block computed and runs the block again in the backward pass. By then the scope of
the forward may be closed, and the block may run on another thread. Each forward of a patched model therefore leaves its
route at the autograd nodes of its outputs. When backward reaches such a node, the route is known for this backward
pass; the sequence number of the node that is being differentiated says which of several forwards a block is computed
again for. This works for every kind of checkpointing, since nothing of it is replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from t2kernels.layers.private import require

if TYPE_CHECKING:
    from .route import Route

KEPT = 64  # backward passes remembered after an exception kept them from saying that they ended


class Forward(NamedTuple):
    """A forward that autograd recorded: its route, the range of sequence numbers of its nodes, and the thread that
    counted them."""

    route: Route | None
    first: int
    last: int
    thread: int


class Recomputation:
    """The recorded forwards of one patched model, by backward pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_pass: dict[int, list[Forward]] = {}

    def record(self, route: Route | None, first: int, output: object) -> None:
        """Leave `route` at the nodes of a forward's outputs. first: `sequence_number()` before the forward."""
        nodes = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
        if not nodes:
            return
        forward = Forward(route, first, max(node._sequence_nr() for node in nodes), threading.get_ident())
        for node in nodes:
            node.register_prehook(lambda grads, forward=forward: self._reached(forward))

    def forwards(self) -> list[Forward]:
        """The forwards that the node being differentiated may belong to. Empty where none was recorded."""
        node = torch._C._current_autograd_node()
        at = -1 if node is None else node._sequence_nr()
        return [f for f in self._by_pass.get(backward_pass(), ()) if f.first <= at <= f.last]

    @property
    def running(self) -> bool:
        """Whether a backward pass that reached a recorded forward has not ended."""
        return bool(self._by_pass)

    def _reached(self, forward: Forward) -> None:
        number = backward_pass()
        with self._lock:
            known = self._by_pass.setdefault(number, [])
            if not known:
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._by_pass.pop(number, None))
                for old in sorted(self._by_pass)[:-KEPT]:
                    del self._by_pass[old]
            if forward not in known:
                known.append(forward)


def check_torch() -> None:
    """Raise UnsupportedVersionError if torch lacks a private name that this file uses."""
    for name in ("_current_autograd_node", "_current_graph_task_id"):
        require(torch._C, name, "a block that is computed again must find the experts of its forward")
    require(torch._C._autograd, "_get_sequence_nr", "a forward must know which autograd nodes are its own")
    require(torch.autograd.graph.Node, "_sequence_nr", "an autograd node must tell which forward it belongs to")
    require(torch.autograd.Variable._execution_engine, "queue_callback", "a backward pass must say when it ends")


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread, or -1."""
    return torch._C._current_graph_task_id()


def sequence_number() -> int:
    """The sequence number that this thread's next autograd node gets."""
    return torch._C._autograd._get_sequence_nr()


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
