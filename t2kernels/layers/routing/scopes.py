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
_COROUTINES = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_DRIVERS = ("contextlib", "_pytest")
"""Modules that run a generator as a context manager: there the scope is meant to outlast the step that opened it."""


class AmbiguousScopeError(StateError):
    """It cannot be told which experts a forward should use; the message says why and what to write instead."""


class Scope:
    """`with` block in which every forward of one model uses `route`. It may be entered again, also while it is open.

    private: the scope serves a single call of the library, such as `generate(experts=...)`. Other threads need not know
        of it.
    """

    def __init__(self, scopes: Scopes, route: Route | None, label: str = "", private: bool = False):
        self.scopes: Scopes = scopes
        self.route: Route | None = route
        self.label: str = label
        self.private: bool = private
        self.opened: list[Opened] = []  # not closed yet, in all threads and tasks

    def __enter__(self) -> Tensor | None:
        """Open the scope; returns the ids of its route, or None."""
        opened = Opened(self, _innermost.get(), None if self.private else _generator(sys._getframe(1)))
        _innermost.set(opened)
        self.opened.append(opened)
        self.scopes.opened(opened)
        return None if self.route is None else self.route.ids

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        last = _whole(_innermost.get())
        in_order = last is not None and last.scope is self and last in self.opened
        entry = last if in_order or not self.opened else self.opened[-1]
        if entry in self.opened:
            self.opened.remove(entry)
            self.scopes.closed(entry)
        if in_order:
            _innermost.set(_whole(last.parent))
            return
        if entry is not None and entry.scope is self:
            entry.broken = True
        if error is None:  # an error says more than that the scope was closed out of order
            raise AmbiguousScopeError(
                f"the scope {self.label or 'of an expert'} was closed while a scope opened after it was still open, "
                "or in another asyncio task or context than it was opened in; close scopes in the reverse order, "
                "or pass experts=... to each call instead"
            )


class Opened:
    """A scope that was entered and, until `closed`, not left.

    parent: the scope around it; owner: the generator that must run for the scope to hold, if one opened it
    """

    def __init__(self, scope: Scope, parent: Opened | None, owner: FrameType | None):
        self.scope: Scope = scope
        self.scopes: Scopes = scope.scopes
        self.route: Route | None = scope.route
        self.parent: Opened | None = parent
        self.owner: FrameType | None = owner
        self.thread: int = threading.get_ident()
        # opened by an asyncio task or a generator: a copy per thread cannot show it
        self.isolated: bool = not scope.private and (owner is not None or asyncio._get_running_loop() is not None)
        self.broken: bool = False  # closed out of order: its context may hold on to it


_innermost: ContextVar[Opened | None] = ContextVar("t2kernels_scope", default=None)
_here = threading.local()  # mirror: the scopes that this thread opened, of all models, innermost last


class Scopes:
    """The open scopes of one patched model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Opened] = set()  # those that other threads must know of
        self.any_open: bool = False  # read by compiled code, which cannot read a set

    def opened(self, entry: Opened) -> None:
        """Note a scope of this thread."""
        if not hasattr(_here, "mirror"):
            _here.mirror = []
        _here.mirror.append(entry)
        if not entry.scope.private:
            with self._lock:
                self._open.add(entry)
                self.any_open = True

    def closed(self, entry: Opened) -> None:
        """Forget a scope, from whichever thread it is closed."""
        entry.owner = None
        mirror = getattr(_here, "mirror", ())
        if entry in mirror:
            mirror.remove(entry)
        with self._lock:
            self._open.discard(entry)
            self.any_open = bool(self._open)

    def visible(self) -> Opened | None:
        """The innermost scope of this context, whether or not it is clear that the running code belongs to it."""
        entry = _whole(_innermost.get())
        while entry is not None and entry.scopes is not self:
            entry = _whole(entry.parent)
        return entry

    def innermost(self) -> Opened | None:
        """The innermost scope of the code that is running, or None. Raises AmbiguousScopeError."""
        scope = self.visible()
        if scope is None:
            if self.any_open:
                self._refuse_other_thread()
            return None
        if scope.owner is not None and not _is_running(scope.owner):
            raise AmbiguousScopeError(
                f"the scope {scope.scope.label} was opened by a generator ({scope.owner.f_code.co_qualname}) that is "
                "not running now, and this forward is not part of it; pass experts=... to each call inside a "
                "generator instead of bank.use(...)"
            )
        return scope

    def innermost_compiled(self) -> Opened | None:
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
                f"another thread has the scope {other.scope.label} open, and this thread has none: it may or may not "
                "belong to that scope. Say in this thread which expert is meant: experts=... in the call, "
                "or bank.use(...), where "
                "None is the base model; bank.default holds for every thread"
            )


def _whole(entry: Opened | None) -> Opened | None:
    """The innermost scope from `entry` on that was not closed out of order."""
    while entry is not None and entry.broken:
        entry = entry.parent
    return entry


def _generator(frame: FrameType | None) -> FrameType | None:
    """The innermost generator that runs the code which opens a scope, itself or by a call. None in a coroutine.

    Generators that run as context managers do not count, but those around them do.
    """
    while frame is not None:
        kind = 0 if _module(frame) == "contextlib" else frame.f_code.co_flags & (_GENERATORS | _COROUTINES)
        if kind & _COROUTINES:
            return None
        if kind and _module(frame.f_back) not in _DRIVERS:
            return frame
        frame = frame.f_back
    return None


def _module(frame: FrameType | None) -> str:
    """The package of the code of a frame."""
    return "" if frame is None else frame.f_globals.get("__name__", "").split(".")[0]


def _is_running(owner: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is owner:
            return True
        frame = frame.f_back
    return False
