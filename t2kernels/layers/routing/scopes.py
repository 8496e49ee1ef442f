"""Which experts the code that is running asked for: `with bank.use("math")`.

A scope holds for the code inside its `with` block, and for nothing else. It lives in a context variable, so each
asyncio task has its own, and a task or `asyncio.to_thread` that starts inside a scope keeps it. Three cases cannot be
told from one another by a context variable, and raise:

- a thread that says nothing while another thread has a scope open: it may have been started inside that scope or not;
- code between two steps of a generator that has a scope open: the variable leaks out of a generator;
- scopes that are closed in another order than they were opened.

torch.compile cannot read a context variable. A compiled model reads a copy kept per thread, and refuses scopes that
this copy cannot show.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from t2kernels import StateError

if TYPE_CHECKING:
    from torch import Tensor

    from .route import Route

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_DRIVERS = ("contextlib", "_pytest")
"""Modules that run a generator as a context manager: there the scope is meant to outlast the step that opened it."""


class AmbiguousScopeError(StateError):
    """It cannot be told which experts a forward should use; the message says why and what to write instead."""


class Scope:
    """`with` block in which every forward of one model uses `route`.

    private: the scope serves a single call of the library, such as `generate(experts=...)`. Other threads need not know
        of it.
    """

    def __init__(self, scopes: Scopes, route: Route | None, label: str = "", private: bool = False):
        self.scopes: Scopes = scopes
        self.route: Route | None = route
        self.label: str = label
        self.private: bool = private
        self.parent: Scope | None = None
        self.thread: int = 0
        self.owner: FrameType | None = None  # the generator that opened the scope, if one did
        self.isolated: bool = False  # opened by an asyncio task or a generator: a copy per thread cannot show it
        self.broken: bool = False  # closed while a later scope was still open

    def __enter__(self) -> Tensor | None:
        """Open the scope; returns the ids of its route, or None."""
        self.parent, self.thread = _innermost.get(), threading.get_ident()
        self.owner = None if self.private else _generator(sys._getframe(1))
        self.isolated = not self.private and (self.owner is not None or asyncio._get_running_loop() is not None)
        _innermost.set(self)
        self.scopes.opened(self)
        return None if self.route is None else self.route.ids

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scopes.closed(self)
        self.owner = None
        if _innermost.get() is not self:
            self.broken = True
            if error is not None:
                return  # it says more than that the scope was closed out of order
            raise AmbiguousScopeError(
                f"the scope {self.label or 'of an expert'} was closed while a scope opened after it was still open, "
                "or in another asyncio task or context than it was opened in; close scopes in the reverse order, "
                "or pass "
                "experts=... to each call instead"
            )
        parent = self.parent
        while parent is not None and parent.broken:
            parent = parent.parent
        _innermost.set(parent)


_innermost: ContextVar[Scope | None] = ContextVar("t2kernels_scope", default=None)
_here = threading.local()  # mirror: the scopes that this thread opened, of all models, innermost last


class Scopes:
    """The open scopes of one patched model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Scope] = set()  # those that other threads must know of
        self.any_open: bool = False  # read by compiled code, which cannot read a set

    def opened(self, scope: Scope) -> None:
        """Note a scope of this thread."""
        if not hasattr(_here, "mirror"):
            _here.mirror = []
        _here.mirror.append(scope)
        if not scope.private:
            with self._lock:
                self._open.add(scope)
                self.any_open = True

    def closed(self, scope: Scope) -> None:
        """Forget a scope, from whichever thread it is closed."""
        mirror = getattr(_here, "mirror", ())
        if scope in mirror:
            mirror.remove(scope)
        with self._lock:
            self._open.discard(scope)
            self.any_open = bool(self._open)

    def visible(self) -> Scope | None:
        """The innermost scope of this context, whether or not it is clear that the running code belongs to it."""
        scope = _innermost.get()
        while scope is not None and scope.scopes is not self:
            scope = scope.parent
        return scope

    def innermost(self) -> Scope | None:
        """The innermost scope of the code that is running, or None. Raises AmbiguousScopeError."""
        scope = self.visible()
        if scope is None:
            if self.any_open:
                self._refuse_other_thread()
            return None
        if scope.owner is not None and not _is_running(scope.owner):
            raise AmbiguousScopeError(
                f"the scope {scope.label} was opened by a generator ({scope.owner.f_code.co_qualname}) that is not "
                "running now, and this forward is not part of it; pass experts=... to each call inside a "
                "generator instead of "
                "bank.use(...)"
            )
        return scope

    def innermost_compiled(self) -> Scope | None:
        """The same for code that torch.compile traces."""
        mine = [scope for scope in getattr(_here, "mirror", ()) if scope.scopes is self]
        if mine:
            scope = mine[-1]
            if scope.isolated:
                raise AmbiguousScopeError(
                    "a compiled model cannot see a scope that an asyncio task or a generator opened; pass "
                    "expert_ids=bank.ids(...) to each call"
                )
            return scope
        if self.any_open:
            self._refuse_other_thread()
        return None

    def _refuse_other_thread(self) -> None:
        here = threading.get_ident()
        with self._lock:
            other = next((s for s in self._open if s.thread != here), None)
        if other is not None:
            raise AmbiguousScopeError(
                f"another thread has the scope {other.label} open, and this thread has none: it may or may not "
                "belong to that scope. Say in this thread which expert is meant: experts=... in the call, "
                "or bank.use(...), where "
                "None is the base model; bank.default holds for every thread"
            )


def _generator(frame: FrameType | None) -> FrameType | None:
    """The generator whose own code opens a scope, unless it runs as a context manager."""
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "contextlib":
        frame = frame.f_back
    if frame is None or not frame.f_code.co_flags & _GENERATORS:
        return None
    driver = frame.f_back.f_globals.get("__name__", "") if frame.f_back is not None else ""
    return None if driver.split(".")[0] in _DRIVERS else frame


def _is_running(owner: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is owner:
            return True
        frame = frame.f_back
    return False
