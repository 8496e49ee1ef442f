"""Check on a device that an implementation computes `svf_linear` correctly: its numbers against fp64.

`auto` takes kernels only on a kind of GPU where this check has passed; `t2 tune` keeps the verdict. Kernels that fail
are not timed.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2kernels.ops.dispatch import IMPLEMENTATIONS
from t2kernels.ops.op import svf_linear_group
from t2kernels.ops.planner import Call
from t2kernels.ops.reference import svf_linear_ref

E = 7
# Dtypes of x and of the factors. A bf16 x is the usual case; int8 factors make the factored form pay.
DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float16),
    (torch.float16, torch.int8),
    (torch.float32, torch.float32),
)
# (N, columns of each member, M of each member): a square matrix in factored form, a delta form with few columns, a
# group, odd sizes.
SHAPES = (
    (1024, (1024,), (1024,)),
    (2048, (128,), (4096,)),
    (1024, (256, 64, 64), (1024, 256, 256)),
    (333, (77, 21), (129, 65)),
)
TOKENS = (1, 5, 8, 33, 128, 300)
FEW = (1, 2, 5, 8, 9, 13, 16, 17, 32)  # for the decode kernel: both sides of every change of its tiles


class Case(NamedTuple):
    """One checked call.

    x, factors: dtypes; T, N, C, M: sizes, as in `planner.Call`
    error: the worst of forward, dx and dscale: ||result - truth|| over the allowed one, which is 1.1 times (fp32: 2
        times) that of plain torch
    what: the result that was worst
    """

    x: str
    factors: str
    T: int
    N: int
    C: tuple[int, ...]
    M: tuple[int, ...]
    error: float
    what: str

    @property
    def right(self) -> bool:
        """True if the error is within the allowance."""
        return self.error <= 1


def selfcheck(
    device: torch.device | str,
    impl: str,
    tokens: tuple[int, ...] | None = None,
    shapes: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]] = SHAPES,
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = DTYPES,
) -> list[Case]:
    """Check forward, dx and dscale of `impl` on `device`, with and without a base, against the reference in fp64.
    Unwritten memory holds NaN.

    A result is right if its error is at most 1.1 times that of plain torch in the same dtype; 2 times in fp32, where
    only the order of sums differs. The CUDA kernel is checked for forward, in the cases that it supports.

    tokens: T of the cases; None for numbers that fit the implementation
    shapes: (N, columns of each member, M of each member); dtypes: (x, factors)
    """
    found = []
    tokens = tokens or (FEW if impl == "cuda" else TOKENS)
    with _poisoned(), torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        for x_dtype, w_dtype in dtypes:
            for N, C, M in shapes:
                for T in tokens:
                    if IMPLEMENTATIONS[impl].unsupported(Call(T, N, M, C, x_dtype, w_dtype)):
                        continue
                    for base in (True, False):
                        off = _errors(_problem(T, N, C, M, x_dtype, w_dtype, base, torch.device(device)), impl)
                        what = max(off, key=lambda name: off[name])
                        x_name, w_name = (str(d).removeprefix("torch.") for d in (x_dtype, w_dtype))
                        found.append(
                            Case(x_name, w_name, T, N, C, M, off[what], f"{what}, {'with' if base else 'no'} base")
                        )
    return found


def _problem(
    T: int,
    N: int,
    C: tuple[int, ...],
    M: tuple[int, ...],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    base: bool,
    device: torch.device,
) -> dict[str, Any]:
    V, Us = (
        torch.randn(sum(C), N, device=device) / N**0.5,
        [torch.randn(m, c, device=device) / c**0.5 for m, c in zip(M, C, strict=True)],
    )
    fold = torch.ones(sum(C), device=device)
    if w_dtype == torch.int8:
        steps = V.abs().amax(1) / 127, [U.abs().amax(0) / 127 for U in Us]
        V, Us = (V / steps[0][:, None]).round(), [(U / s).round() for U, s in zip(Us, steps[1], strict=True)]
        fold = steps[0] * torch.cat(steps[1])
    return {
        "x": torch.randn(T, N, device=device).to(x_dtype),
        "V": V.to(w_dtype).t(),
        "U": [U.to(w_dtype) for U in Us],
        "scale": torch.randn(E, sum(C), device=device) * fold,
        "fold": fold,
        "expert_ids": torch.randint(0, E, (T,), device=device, dtype=torch.int32),
        "base": [torch.randn(T, m, device=device).to(x_dtype) for m in M] if base else None,
        "dy": [torch.randn(T, m, device=device).to(x_dtype) for m in M],
    }


def _errors(p: dict[str, Any], impl: str) -> dict[str, float]:
    """{forward, forward without gradients, dx, dscale: error over what is allowed}."""
    x_dtype, room = p["x"].dtype, 2 if p["x"].dtype == torch.float32 else 1.1
    truth, plain = _run(p, _reference), _run(p, _eager)
    with torch.no_grad():  # runs other kernels than a forward with gradients
        alone = svf_linear_group(p["x"], p["V"], p["U"], p["scale"], p["expert_ids"], p["base"], impl=impl)
    out, rows = {}, [("y", alone, plain[0], truth[0])]
    if IMPLEMENTATIONS[impl].unsupported(Call(1, 16, (16,), (16,), grad=True)) is None:
        got = _run(
            p, lambda x, scale: svf_linear_group(x, p["V"], p["U"], scale, p["expert_ids"], p["base"], impl=impl)
        )
        rows += [
            ("y with gradients", got[0], plain[0], truth[0]),
            ("dx", got[1:2], plain[1:2], truth[1:2]),
            ("dscale", [got[2] * p["fold"]], [plain[2] * p["fold"]], [truth[2] * p["fold"]]),
        ]
    for name, y, eager, want in rows:
        off, allowed = (
            [(a.double() - b).norm().item() for a, b in zip(which, want, strict=True)] for which in (y, eager)
        )
        scale = [torch.finfo(x_dtype).eps / 4 * b.norm().item() for b in want]  # the rounding of the result itself
        ratios = [o / (room * a + s) if a or s else float(o > 0) for o, a, s in zip(off, allowed, scale, strict=True)]
        out[name] = max(r if math.isfinite(r) else math.inf for r in ratios)  # a NaN would lose every comparison
    return out


def _run(p: dict[str, Any], f) -> tuple[list[Tensor], Tensor, Tensor]:
    x, scale = p["x"].clone().requires_grad_(), p["scale"].clone().requires_grad_()
    ys = f(x, scale) if f not in (_reference, _eager) else f(p, x, scale)
    torch.autograd.backward(ys, [dy.to(y.dtype) for dy, y in zip(p["dy"], ys, strict=True)])
    return [y.detach() for y in ys], x.grad, scale.grad


def _reference(p: dict[str, Any], x: Tensor, scale: Tensor) -> list[Tensor]:
    return _members(
        p,
        lambda V, U, s, base: svf_linear_ref(x.double(), V.double(), U.double(), s.double(), p["expert_ids"], base),
        scale,
        torch.float64,
    )


def _eager(p: dict[str, Any], x: Tensor, scale: Tensor) -> list[Tensor]:
    """Plain torch in x's dtype; int8 factors are multiplied by their steps first."""
    V_step = p["fold"] if p["V"].dtype == torch.int8 else torch.ones_like(p["fold"])

    def one(V, U, s, base):
        y = ((x @ V.to(x.dtype)) * s.to(x.dtype)[p["expert_ids"].long()]) @ U.to(x.dtype).t()
        return y if base is None else y + base

    # The steps are moved from scale into V, so that nothing overflows or vanishes here.
    return _members(p, one, scale / V_step, x.dtype, V_step)


def _members(p: dict[str, Any], one, scale: Tensor, dtype: torch.dtype, V_step: Tensor | None = None) -> list[Tensor]:
    ys, start = [], 0
    for i, U in enumerate(p["U"]):
        columns = slice(start, start + U.shape[1])
        start = columns.stop
        V = p["V"][:, columns] if V_step is None else p["V"][:, columns].float() * V_step[columns]
        ys.append(one(V, U, scale[:, columns], None if p["base"] is None else p["base"][i].to(dtype)))
    return ys


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Within it, torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
