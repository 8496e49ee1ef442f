"""What both engines do with a batch: prompts as lists, and which row goes with the marks of its factors."""

from __future__ import annotations

from torch import Tensor


def tokens_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """[B] lists: left-padded prompts without their padding. ids, mask: [B, P] int64"""
    return [row[there].tolist() for row, there in zip(ids.cpu(), mask.cpu().bool(), strict=True)]


def whole_names(policy: str, seen: set[str]) -> bool:
    """True for the first policy of an expert, whose factors are compared with the engine's. It is added to `seen`."""
    name = policy.partition("@")[0]
    first = name not in seen
    seen.add(name)
    return first
