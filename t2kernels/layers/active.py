"""`Route`, `Routing`: which row of the scale tables each token of the running forward uses.

Each patched model has one `Routing`. The active route is kept per thread, because two threads may run the same model
with different experts. A plain attribute would race; a context variable cannot be traced by torch.compile and is not
seen by autograd's own threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class Route:
    """The expert ids of one forward.

    ids: int32 or int64, () one id for all tokens, [B] one per sequence, [B, S] one per token
    tokens: (B, S) of the forward, or None if it is not known
    cache: {group of layers: the shared result of this forward} (`layers.groups`)
    """

    def __init__(self, ids: Tensor, tokens: tuple[int, int] | None = None) -> None:
        self.ids: Tensor = ids
        self.tokens: tuple[int, int] | None = tokens
        self.cache: dict[Any, Any] = {}
        self._flat: Tensor | None = None

    def fit(self, shape: torch.Size) -> Tensor:
        """The ids for a layer input x, as `svf_linear` takes them. shape: x.shape[:-1].

        Raises ValueError if the ids do not fit the shape.
        """
        ids = self.ids
        if ids.dim() == 0 or ids.shape == shape[: ids.dim()]:
            return ids
        if len(shape) == 1:  # this layer gets the tokens of all sequences in one row
            flat = self._per_token()
            if flat is not None and flat.shape[0] == shape[0]:
                return flat
        raise ValueError(
            f"expert_ids has shape {list(ids.shape)} but this layer got {' x '.join(map(str, shape))} tokens. "
            "Pass one id (0-dim), one per sequence [B], or one per token [B, S]"
        )

    def per_token(self, count: int) -> Tensor:
        """One id for each of `count` tokens in a row, [count]. Raises ValueError if the ids do not fit."""
        return self.ids.expand(count) if self.ids.dim() == 0 else self.fit(torch.Size([count]))

    def _per_token(self) -> Tensor | None:
        if self._flat is None:  # expanded once per forward, not once per layer
            if self.ids.dim() == 2:
                self._flat = self.ids.reshape(-1)
            elif self.tokens is not None and self.ids.shape[0] == self.tokens[0]:
                self._flat = self.ids.repeat_interleave(self.tokens[1])
        return self._flat


class Routing:
    """A stack of routes for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def active(self) -> Route | None:
        """The innermost route of this thread; None: the base model."""
        stack = getattr(self._local, "stack", None)
        return stack[-1] if stack else None

    def push(self, route: Route | None) -> None:
        """Make `route` the active one of this thread, until `pop`."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        self._local.stack.append(route)

    def pop(self) -> None:
        """Undo the last `push` of this thread."""
        self._local.stack.pop()

    @contextlib.contextmanager
    def use(self, route: Route | None) -> Iterator[None]:
        """Make `route` the active one of this thread within a `with` block."""
        self.push(route)
        try:
            yield
        finally:
            self.pop()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for torch.utils.checkpoint: the recomputation uses the route of its forward, in any thread."""
        return contextlib.nullcontext(), self.use(self.active)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        return memo.setdefault(id(self), Routing())

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()
