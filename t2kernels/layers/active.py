"""Which row of the scale tables each token of the running forward uses.

One `Routing` belongs to one patched model. What is active is kept per thread, because two threads may run the same model with different
experts; an attribute would race, and a context variable cannot be traced by torch.compile nor be seen by autograd's own threads.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor


class Route:
    """The ids of one forward: () for all tokens alike, [B] one a sequence, [B, S] one a token; and the (B, S) of the forward, if known.

    row: the one row of all tokens, where that is known without asking the device
    """

    def __init__(self, ids: Tensor, tokens: tuple[int, int] | None = None, row: int | None = None):
        self.ids, self.tokens, self.row = ids, tokens, row
        self.made: dict = {}  # by group of layers: what its first layer computed for the others
        self._flat: Tensor | None = None

    def fit(self, shape: torch.Size) -> Tensor:
        """The ids for an input whose leading sizes are `shape`, as `svf_linear` takes them. Raises ValueError if they cannot be matched."""
        ids = self.ids
        if ids.dim() == 0 or ids.shape == shape[: ids.dim()]:
            return ids
        if len(shape) == 1:  # a layer that sees the tokens of all sequences in one row
            flat = self._per_token()
            if flat is not None and flat.shape[0] == shape[0]:
                return flat
        raise ValueError(
            f"expert_ids {list(ids.shape)} do not fit a layer input of {list(shape)} tokens: give one id for all (0-dim), one a sequence [B], "
            "or one a token [B, S] of this forward"
        )

    def per_token(self, count: int) -> Tensor:
        """One id for each of `count` tokens in a row, [count]."""
        return self.ids.expand(count) if self.ids.dim() == 0 else self.fit(torch.Size([count]))

    def _per_token(self) -> Tensor | None:
        if self._flat is None:  # expanded once a forward, not once a layer
            if self.ids.dim() == 2:
                self._flat = self.ids.reshape(-1)
            elif self.tokens is not None and self.ids.shape[0] == self.tokens[0]:
                self._flat = self.ids.repeat_interleave(self.tokens[1])
        return self._flat


class Routing:
    """A stack of routes per thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def active(self) -> Route | None:
        """The innermost route of this thread, or None: the base model."""
        stack = getattr(self._local, "stack", None)
        return stack[-1] if stack else None

    def push(self, route: Route | None) -> None:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        self._local.stack.append(route)

    def pop(self) -> None:
        self._local.stack.pop()

    @contextlib.contextmanager
    def use(self, route: Route | None):
        self.push(route)
        try:
            yield
        finally:
            self.pop()

    def checkpoint_contexts(self):
        """`context_fn` for torch.utils.checkpoint: the recomputation runs under the route of its forward, on whatever thread and whenever."""
        return contextlib.nullcontext(), self.use(self.active)

    def __deepcopy__(self, memo) -> Routing:
        return memo.setdefault(id(self), Routing())

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self._local = threading.local()
