"""`Route`: which row of the scale tables each token of one forward uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError


class Route:
    """The expert ids of one forward.

    ids: int32 or int64, () one id for all tokens, [B] one per sequence, [B, S] one per token
    tokens: (B, S) of the forward, or None if it is not known
    repeats: True if a forward may have a multiple of B sequences, each row repeated (beams, guidance in `generate`)
    cache: {group of layers: the shared result of this forward} (`layers.groups`)
    """

    def __init__(self, ids: Tensor, tokens: tuple[int, int] | None = None, repeats: bool = False) -> None:
        self.given: Tensor = ids  # while it is alive, its experts keep their rows
        self.ids: Tensor = _trainable(ids)
        self.repeats: bool = repeats
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
        raise InputError(
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


def _trainable(ids: Tensor) -> Tensor:
    """The ids as a tensor that autograd can save: those that inference mode made are copied."""
    if torch.compiler.is_compiling() or not ids.is_inference():
        return ids
    with torch.inference_mode(False):
        return ids.clone()
