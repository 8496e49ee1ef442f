"""Which implementation and which path a call of `svf_linear` takes, and why. Pure functions of sizes, formats and the machine.

Nothing is measured or tuned while serving. What is decided here can be asked: `t2kernels.explain`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

IMPLS = ("torch", "cpp", "triton", "cuda")

# An expert's W' is worth making when x W'ᵀ and its making need clearly fewer operations than x V and g Uᵀ: the exact break-even is max(M, N)
# tokens, and the copy of W' costs memory traffic that the count of operations leaves out.
MATERIALISE_MARGIN = 1.1
# Above this many tokens two library matmuls around a row scaling do better than the skinny kernels, whose tiles are made for streaming weights:
# predicted crossover 128 to 160 tokens on an H200-like machine, from a time model; to be replaced by what `t2 tune` measures.
PAIR_TOKENS = 160
# Matrices that one launch of the skinny expand can hold: q, k, v and one more.
PAIR_MEMBERS = 4
# Tokens up to which `auto` prefers the decode kernel, for factors of 16 and of 8 bits. Each 16 rows of a factor read all of x once more, from L2:
# above that this traffic passes the factor's own (computed, not measured; `t2 tune` measures it). The kernel itself takes 32.
DECODE_TOKENS = (16, 8)
DECODE_LIMIT = 32
DECODE_MEMBERS = 8
# (x, factors): the dtypes that the decode kernel multiplies.
DECODE_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float16),
    (torch.float16, torch.int8),
)
# Up to so many tokens the C++ kernels are ahead of torch by 5 % or more on every shape of benchmarks/cpp.py, by what runs and by the dtypes of x and
# of the factors; others: never. Torch converts factors of another dtype whole before it multiplies. For bf16 alone it has instructions of its
# own where there is AVX-512, and from 8 tokens on they win.
CPP_TOKENS = {
    ("avx512", torch.float32, torch.float32): 16,
    ("avx512", torch.bfloat16, torch.bfloat16): 4,
    ("avx2", torch.float32, torch.float32): 4,
    ("avx2", torch.bfloat16, torch.bfloat16): 16,
    **{
        (isa, x, factors): 16
        for isa in ("avx512", "avx2")
        for x, factors in (
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
            (torch.float32, torch.int8),
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.int8),
            (torch.float16, torch.float16),
            (torch.float16, torch.int8),
        )
    },
    # torch widens the whole of other factors in each call: 0.20 to 0.86 of its time at T = 64, on one thread and on two.
    **{("avx512", torch.float32, factors): 64 for factors in (torch.bfloat16, torch.float16, torch.int8)},
}
NO_FP64 = "float64 is for checks, on impl='torch'"


class Machine(NamedTuple):
    """What the planner knows of a device. missing: (impl, why it cannot run), unchecked: (impl, why `auto` does not trust it yet).

    isa: the instruction set of the C++ kernels on a CPU
    """

    kind: str = "cpu"
    name: str = "CPU"
    missing: tuple[tuple[str, str], ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()
    pair_tokens: int = PAIR_TOKENS
    decode_tokens: tuple[int, int] = DECODE_TOKENS
    isa: str = ""

    def trusts(self, impl: str) -> bool:
        """Whether `auto` may take an implementation here."""
        return all(name != impl for name, _ in (*self.missing, *self.unchecked))


class Call(NamedTuple):
    """One call of the op. T tokens, N in_features, M and C (columns of V and U) by member, dtypes of x and of the factors.

    tokens: tokens of each expert that has any, {row: count} as pairs, or None where only the device knows; one: all tokens have one expert
    base: whether a base is added (delta form); grad: whether a backward will follow; kept: whether W' of the one expert is kept by the layer
    rows: whether Vᵀ and U lie row by row in memory, as layers keep them
    unfit: why these tensors do not lie as the decode kernel reads them, or None
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
    kept: bool = False
    rows: bool = True
    unfit: str | None = None


class Choice(NamedTuple):
    """impl: one of IMPLS, and why_impl; path: "mm" (x V, row scaling, g Uᵀ), "pair" (two skinny kernels), "dense" (W' made for `experts`, or for
    the one there is), "kept" (the layer has W'), "stream" (the C++ kernel), "decode" (the CUDA kernel), "refused" (asked for by name, and cannot
    run), and why_path."""

    impl: str
    why_impl: str
    path: str
    why_path: str
    experts: tuple[int, ...] | None = None

    @property
    def why(self) -> str:
        return f"{self.why_impl}; {self.why_path}"


def operations(call: Call, path: str = "mm", T: int | None = None) -> int:
    """Floating-point operations of the products: "mm" and "pair" 2 T C (M + N), "dense" 2 M N (C + T), summed over the members."""
    T = call.T if T is None else T
    if path == "dense":
        return sum(2 * M * call.N * (C + T) for M, C in zip(call.M, call.C, strict=True))
    return sum(2 * T * C * (M + call.N) for M, C in zip(call.M, call.C, strict=True))


def bytes_moved(call: Call, path: str = "mm") -> int:
    """Bytes that must be read and written at least once: factors, x, y and base, and what lies between (h, or W')."""
    w, a = call.factors.itemsize, call.x.itemsize
    if path == "kept":
        return a * sum(M * call.N + call.T * (M + call.N) for M in call.M)
    C, M = sum(call.C), sum(call.M)
    factors = w * (C * call.N + sum(m * c for m, c in zip(call.M, call.C, strict=True)))
    around = a * call.T * (call.N + M * (2 if call.base else 1))
    # h is written by one matmul, read and written by the scaling and read by the other; the pair writes and reads g once, the stream in fp32.
    between = {"mm": 4 * a * call.T * C, "dense": 2 * a * M * call.N, "stream": 8 * call.T * C}.get(
        path, 2 * a * call.T * C
    )
    return factors + around + between


@functools.lru_cache(4096)
def choose(call: Call, machine: Machine, impl: str = "auto") -> Choice:
    """The path of a call. impl: "auto", or one by name, which must be able to run (`why_missing`)."""
    impl, why = _implementation(call, machine) if impl == "auto" else (impl, "asked for")
    if call.kept:
        return Choice("torch", "a library matmul", "kept", "W' of this expert is kept")
    if impl == "cuda":
        unfit = why_no_decode(call)
        return Choice(
            impl, why, *(("refused", unfit) if unfit else ("decode", f"{_tokens(call.T)}: each factor streamed once"))
        )
    if impl == "cpp":
        return Choice(impl, why, "stream", "factors read once, widened in registers")
    dense = _worth_a_dense_weight(call)
    if dense is not None:
        return Choice(impl, why, "dense", _say_dense(call, dense), dense or None)
    if impl == "triton" and not call.grad:
        if len(call.M) > PAIR_MEMBERS:
            return Choice(impl, why, "mm", f"more than {PAIR_MEMBERS} matrices: library matmuls around a row scaling")
        if call.T <= machine.pair_tokens:
            return Choice(impl, why, "pair", f"at most {machine.pair_tokens} tokens: skinny kernels")
        return Choice(impl, why, "mm", f"more than {machine.pair_tokens} tokens: library matmuls around a row scaling")
    return Choice(impl, why, "mm", "two matmuls around a row scaling")


def cheaper_form(
    M: int, N: int, k: int, weight: float = 2, factors: float = 2, C: int | None = None
) -> tuple[str, str]:
    """("factored" or "delta", why): whichever reads fewer bytes for a token.

    Factored reads U and V, factors * C (M + N) bytes; delta the weight and k components, weight * M N + factors * k (M + N).
    weight, factors: bytes of a number of W, and of U and V; C: columns of the factored form, min(M, N) unless some components have several
    """
    factored = factors * (min(M, N) if C is None else C) * (M + N)
    delta = weight * M * N + factors * k * (M + N)
    return ("delta", "reads less than factored") if delta < factored else ("factored", "reads less than delta")


def could_be_dense(call: Call) -> bool:
    """Whether W' could be worth making for some expert, if one had all the tokens: only then is it worth asking who has how many."""
    return _worth_a_dense_weight(call._replace(one=True)) is not None


def why_missing(machine: Machine, impl: str, x: torch.dtype = torch.float32) -> str | None:
    """Why `impl` cannot run on the machine for an input of dtype `x`, or None."""
    why = dict(machine.missing).get(impl)
    return NO_FP64 if why is None and impl != "torch" and x == torch.float64 else why


def why_no_decode(call: Call, limit: int = DECODE_LIMIT) -> str | None:
    """Why the decode kernel does not take a call, for `limit` tokens at the most; None where it does."""
    if call.grad:
        return "the decode kernel has no backward"
    if not 1 <= call.T <= limit:
        return f"{_tokens(call.T)}, the decode kernel takes 1 to {limit}"
    if (call.x, call.factors) not in DECODE_DTYPES:
        return f"the decode kernel does not multiply x in {_dtype(call.x)} by factors in {_dtype(call.factors)}"
    if not 1 <= len(call.M) <= DECODE_MEMBERS:
        return f"{len(call.M)} matrices, the decode kernel takes {DECODE_MEMBERS}"
    step = 16 // call.factors.itemsize
    for name, size in (("N", call.N), *(("the number of columns", c) for c in call.C)):
        if size < 1 or size % step:
            return f"{name} is {size}, the decode kernel wants a multiple of {step} in {_dtype(call.factors)}"
    return "a member has no rows" if min(call.M) < 1 else call.unfit


def why_not_cpp(call: Call, isa: str) -> str | None:
    """Why a call is not for the C++ kernels where they can run, or None: what they cannot do, and where torch is as fast."""
    if call.grad:
        return "it has no backward"
    if not call.rows:
        return "V or U does not lie in memory as it reads them"
    most = CPP_TOKENS.get((isa, call.x, call.factors), 0)
    if not 0 < call.T <= most:
        formats = f"{call.x} with {call.factors} factors on {isa}".replace("torch.", "")
        return f"faster up to {most} tokens only ({formats})" if most else f"not measured to be faster ({formats})"
    return None


def _tokens(T: int) -> str:
    return f"{T} token{'' if T == 1 else 's'}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _implementation(call: Call, machine: Machine) -> tuple[str, str]:
    kept_off = dict((*machine.unchecked, *machine.missing))
    if call.x == torch.float64:
        kept_off = dict.fromkeys(IMPLS, NO_FP64)
    if "cuda" not in kept_off and (why := why_no_decode(call, machine.decode_tokens[call.factors.itemsize == 1])):
        kept_off["cuda"] = why
    if machine.kind != "cpu":
        kept_off["cpp"] = "for CPUs"
    elif "cpp" not in kept_off and (why := why_not_cpp(call, machine.isa)):
        kept_off["cpp"] = why
    for impl in ("cuda", "triton", "cpp"):
        if impl not in kept_off:
            return (
                impl,
                f"measured to be faster than torch on {machine.name}"
                if impl == "cpp"
                else f"checked on {machine.name}",
            )
    reasons = "; ".join(f"no {impl}: {kept_off[impl]}" for impl in ("cpp", "triton", "cuda")[machine.kind != "cpu" :])
    return "torch", f"{machine.name}; {reasons}"


@functools.lru_cache(4096)
def _worth_a_dense_weight(call: Call) -> tuple[int, ...] | None:
    """The rows whose W' is worth making: () where the one expert of all tokens is, whichever it is; None where none is."""
    if call.grad or call.base or not call.T:
        return None

    def worth(T: int) -> bool:
        return MATERIALISE_MARGIN * operations(call, "dense", T) < operations(call, "mm", T)

    if call.one:
        return () if worth(call.T) else None
    rows = tuple(row for row, T in call.tokens or () if worth(T))
    return rows or None


def _say_dense(call: Call, rows: Iterable[int]) -> str:
    rows = list(rows)
    of = (
        f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}" if rows else f"one expert with {call.T} tokens"
    )
    return f"W' is made once for {of}"
