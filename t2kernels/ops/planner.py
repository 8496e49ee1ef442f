"""A call of `svf_linear` as sizes and formats, its cost, and the choice that was made for it. Nothing runs here.

`dispatch` chooses, and `t2kernels.explain` shows the choices for a model.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Making an expert's W' = U diag(scale) Vᵀ pays when x W'ᵀ plus making it takes clearly fewer operations than x V and g
# Uᵀ. The exact break-even is max(M, N) tokens. The margin stands for the memory traffic of W', which a count of
# operations leaves out.
MATERIALISE_MARGIN = 1.1


class Call(NamedTuple):
    """One call of the op.

    T, N: tokens and in_features
    M, C: out_features and columns of V and U, one number a member
    x, factors: dtypes of x and of V and U
    one: whether all tokens have the same expert
    tokens: ((row, tokens of this row), ...); None if only the device knows
    base: whether a base is added (delta form)
    grad: whether a backward will follow
    layout: ((implementation, why it cannot read these tensors as they lie in memory), ...)
    """

    T: int
    N: int
    M: tuple[int, ...]
    C: tuple[int, ...]
    x: torch.dtype = torch.bfloat16
    factors: torch.dtype = torch.bfloat16
    one: bool = False
    tokens: tuple[tuple[int, int], ...] | None = None
    base: bool = False
    grad: bool = False
    layout: tuple[tuple[str, str], ...] = ()


class Path(NamedTuple):
    """One way of an implementation to compute a call.

    name: "mm", two matmuls around a row scaling; "pair", two Triton launches; "dense", W' is made; "stream", the C++
        kernel; "decode", the CUDA kernel; "refused", the implementation was asked for by name and cannot run this call
    reason: why this path
    experts: for "dense", the rows whose W' is made; None for the single row that all tokens have
    """

    name: str
    reason: str
    experts: tuple[int, ...] | None = None


class Choice(NamedTuple):
    """What runs for a call: an implementation and why, and the fields of its `Path`."""

    impl: str
    why_impl: str
    path: str
    why_path: str
    experts: tuple[int, ...] | None = None

    @property
    def why(self) -> str:
        """Both reasons."""
        return f"{self.why_impl}; {self.why_path}"


def operations(call: Call, path: str = "mm", T: int | None = None) -> int:
    """Floating-point operations of the products, summed over members: "dense" 2 M N (C + T), else 2 T C (M + N)."""
    T = call.T if T is None else T
    if path == "dense":
        return sum(2 * M * call.N * (C + T) for M, C in zip(call.M, call.C, strict=True))
    return sum(2 * T * C * (M + call.N) for M, C in zip(call.M, call.C, strict=True))


def bytes_moved(call: Call, path: str = "mm") -> int:
    """Bytes that must be read and written at least once: factors, x, y, base, and what lies between (h, g or W')."""
    w, a = call.factors.itemsize, call.x.itemsize
    C, M = sum(call.C), sum(call.M)
    factors = w * (C * call.N + sum(m * c for m, c in zip(call.M, call.C, strict=True)))
    around = a * call.T * (call.N + M * (2 if call.base else 1))
    # "mm": one matmul writes h, the scaling reads and writes it, the other matmul reads it. "pair" writes and reads g
    # once, "stream" in fp32.
    between = {"mm": 4 * a * call.T * C, "dense": 2 * a * M * call.N, "stream": 8 * call.T * C}
    return factors + around + between.get(path, 2 * a * call.T * C)


def cheaper_form(
    M: int, N: int, k: int, weight: float = 2, factors: float = 2, C: int | None = None
) -> tuple[str, str]:
    """("factored" or "delta", why): the form that reads fewer bytes for one token.

    Factored reads U and V: factors * C (M + N) bytes.
    Delta reads the weight and k components: weight * M N + factors * k (M + N).

    weight, factors: bytes of a number of W, and of U and V
    C: columns of the factored form; min(M, N) unless some components have several columns
    """
    factored = factors * (min(M, N) if C is None else C) * (M + N)
    delta = weight * M * N + factors * k * (M + N)
    return ("delta", "reads less than factored") if delta < factored else ("factored", "reads less than delta")


@functools.lru_cache(4096)
def dense_path(call: Call) -> Path | None:
    """The path "dense" if making W' is cheaper for some expert of the call, else None."""
    if call.grad or call.base or not call.T:
        return None
    if call.one:
        return Path("dense", f"W' is made once for one expert with {call.T} tokens") if _pays(call, call.T) else None
    rows = tuple(row for row, T in call.tokens or () if _pays(call, T))
    if not rows:
        return None
    return Path("dense", f"W' is made once for row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}", rows)


def could_be_dense(call: Call) -> bool:
    """True if W' would pay for an expert that had all tokens. Only then the tokens of each expert count."""
    return dense_path(call._replace(one=True)) is not None


def _pays(call: Call, T: int) -> bool:
    return MATERIALISE_MARGIN * operations(call, "dense", T) < operations(call, "mm", T)
