"""`Routing`: which route the running forward of a patched model uses.

Each patched model has one `Routing`. A forward puts its route on a stack of its own thread, because two threads may run
the same model with different experts. Code outside a forward asks for experts with scopes (`layers.routing.scopes`); a
block that a backward pass computes again finds the route of its forward (`layers.routing.recompute`).

What runs and which scopes are open is kept in globals and not in a `Routing`. torch.compile takes every tensor that it
finds through a module for one that never moves, and a CUDA graph would then be recorded again for each new ids.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .recompute import Recomputation, backward_pass, sequence_number
from .route import Route
from .scopes import AmbiguousScopeError, Scope, Scopes

_here = threading.local()  # stack: the entrances of this thread, of all models


class Entrance:
    """A forward that runs in this thread.

    routing: that of its model; module: the module that it entered
    first: the autograd sequence number at its start; route: its experts
    """

    def __init__(self, routing: Routing, module: nn.Module, first: int):
        self.routing: Routing = routing
        self.module: nn.Module = module
        self.first: int = first
        self.route: Route | None = None


class Routing:
    """Which route the running forward of one patched model uses.

    A forward puts its route on a stack of its thread when it enters the model (`enter`); its layers read it there
    (`active`). A layer that runs outside a forward of the model uses, in this order: the route of the forward that a
    backward pass computes again, the innermost scope, the default.
    """

    def __init__(self) -> None:
        self.scopes: Scopes = Scopes()
        self.recomputation: Recomputation = Recomputation()
        self.default: Route | None = None  # of every thread
        self.training = 0  # experts in training
        self.writing: threading.Lock = threading.Lock()  # of rows of experts in training
        self._outside = False  # whether a layer outside a forward of the model ever used experts under autograd

    @property
    def active(self) -> Route | None:
        """The route of the layer that runs now, or None: the base model. Raises AmbiguousScopeError."""
        stack = getattr(_here, "stack", None)
        if not stack:
            return self._without_entrance()
        last = stack[-1]
        if last.routing is self:
            return last.route
        mine = self._running()  # the forward of another model inside one of this model
        return mine[-1].route if mine else self._without_entrance()

    def _running(self) -> list[Entrance]:
        """The forwards of this model that run in this thread, the innermost last."""
        return [e for e in getattr(_here, "stack", ()) if e.routing is self]

    def _without_entrance(self) -> Route | None:
        if torch.compiler.is_compiling():
            return self.asked_for()
        if backward_pass() != -1:
            return self._of_recomputation()
        route = self.asked_for()
        if route is not None and torch.is_grad_enabled():
            self._outside = True
        return route

    def asked_for(self) -> Route | None:
        """The route of the innermost scope of the code that runs now, or the default. Raises AmbiguousScopeError."""
        scope = self.scopes.innermost_compiled() if torch.compiler.is_compiling() else self.scopes.innermost()
        return self.default if scope is None else scope.route

    def enter(self, module: nn.Module) -> Entrance:
        """Begin a forward of `module` as the base model; `leave` ends it. The caller sets its route."""
        if not hasattr(_here, "stack"):
            _here.stack = []
        compiling = torch.compiler.is_compiling()
        entrance = Entrance(self, module, 0 if compiling else sequence_number())
        _here.stack.append(entrance)
        return entrance

    def inherited(self) -> Route | None:
        """The route of a forward that has just entered and names no experts itself. Raises AmbiguousScopeError."""
        mine = self._running()
        return mine[-2].route if len(mine) > 1 else self._without_entrance()

    def leave(self, module: nn.Module, output: object = None) -> None:
        """End the forward of `module`, if one has begun: a hook before ours may have raised."""
        mine = self._running()
        if not mine or mine[-1].module is not module:
            return
        entrance = mine[-1]
        if _here.stack[-1] is entrance:
            _here.stack.pop()
        else:  # a forward of another model began inside it and was not ended
            _here.stack.remove(entrance)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.recomputation.record(entrance.route, entrance.first, output)

    def use(self, route: Route | None, label: str = "") -> Scope:
        """A scope: inside its `with` block every forward uses `route`."""
        return Scope(self.scopes, route, label)

    def hold(self, route: Route | None) -> Scope:
        """A scope for one call of this library; other threads that say nothing stay with the default."""
        return Scope(self.scopes, route, private=True)

    @contextlib.contextmanager
    def within(self, module: nn.Module, route: Route | None) -> Iterator[None]:
        """Inside the block a layer of `module` uses `route`, as in a forward of the model, also when a backward pass
        computes the block again."""
        self.enter(module).route = route
        try:
            yield
        finally:
            self.leave(module)

    def _of_recomputation(self) -> Route | None:
        forwards = self.recomputation.forwards()
        if len({f.thread for f in forwards}) == 1:
            return max(forwards, key=lambda f: f.first).route  # of nested forwards, model and backbone, the inner one
        if forwards or self.training or self._outside:
            why = (
                "forwards of several threads are mixed in it"
                if forwards
                else "its forward did not go through the patched model"
            )
            raise AmbiguousScopeError(
                f"a patched layer runs inside a backward pass, and it cannot be told with which experts: {why}. "
                "Call the model itself, and checkpoint blocks inside it"
            )
        return self.asked_for()

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        return memo.setdefault(id(self), Routing())

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
