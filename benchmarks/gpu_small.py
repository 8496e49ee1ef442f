"""Check every kernel on sizes that are no whole number of tiles, for compute-sanitizer and as a first look.

    python benchmarks/gpu_small.py            on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)
    python benchmarks/gpu_small.py --tune     then `tune` on two small shapes, into the folder of the tables

The answers are computed on the CPU, so that a sanitizer sees no kernel but ours and what copies tensors.
"""

from __future__ import annotations

import sys

import torch

from t2kernels.ops import svf_linear_group
from t2kernels.ops.dispatch import IMPLEMENTATIONS, device_of
from t2kernels.ops.impls.triton import matmul
from t2kernels.ops.planner import Call
from t2kernels.ops.reference import svf_linear_ref
from t2kernels.ops.tuning.selfcheck import selfcheck
from t2kernels.ops.tuning.tuner import Shape, tune

BF16, INT8 = torch.bfloat16, torch.int8
N, COLUMNS, ROWS, E = 208, (48, 48), (80, 80), 7
TOKENS = (5, 13, 40)


def off(T: int, w: torch.dtype, impl: str, device: torch.device) -> float:
    """The relative error of one call, with a base and without gradients, against fp64 on the CPU."""
    scale, ids = torch.randn(E, sum(COLUMNS)), torch.randint(0, E, (T,), dtype=torch.int32)
    numbers = [torch.randn(sum(COLUMNS), N), *(torch.randn(M, C) for M, C in zip(ROWS, COLUMNS, strict=True))]
    Vt, *Us = ((t * 30).round().clamp(-127, 127).to(w) if w == INT8 else t.to(w) for t in numbers)
    x, bases = torch.randn(T, N).to(BF16), [torch.randn(T, M).to(BF16) for M in ROWS]
    scale = scale / 900 if w == INT8 else scale
    there = [t.to(device) for t in (x, Vt, scale, ids)]
    with torch.no_grad():
        ys = svf_linear_group(
            there[0], there[1].t(), [U.to(device) for U in Us], *there[2:], [b.to(device) for b in bases], impl=impl
        )
    worst, start = 0.0, 0
    for y, U, base in zip(ys, Us, bases, strict=True):
        part = slice(start, start + U.shape[1])
        start = part.stop
        V, s = Vt[part].double().t(), scale[:, part].double()
        want = svf_linear_ref(x.double(), V, U.double(), s, ids, base.double())
        worst = max(worst, ((y.cpu().double() - want).norm() / want.norm()).item())
    return worst


def backward(device: torch.device) -> float:
    """The relative error of dscale of impl="triton" against fp64 on the CPU."""
    T, (C, _), (M, _) = 40, COLUMNS, ROWS
    V, U, scale, x = torch.randn(N, C), torch.randn(M, C), torch.randn(E, C), torch.randn(T, N)
    dy, ids = torch.randn(T, M), torch.randint(0, E, (T,), dtype=torch.int32)
    given = [t.to(device) for t in (dy, x, V, U, scale, ids)]
    _, got = matmul.backward([given[0]], given[1], given[2], [given[3]], *given[4:], True, True)
    want = torch.zeros(E, C, dtype=torch.float64)
    want.index_add_(0, ids.long(), (x.double() @ V.double()) * (dy.double() @ U.double()))
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for impl in ("triton", "cuda"):
        if why := device_of(device).unsupported(impl):
            print(f"{impl}: not run, {why}")
            continue
        for w in (BF16, INT8):
            for T in TOKENS:
                if IMPLEMENTATIONS[impl].unsupported(Call(T, N, ROWS, COLUMNS, BF16, w)) is None:
                    found[impl, str(w), T] = off(T, w, impl, device)
        if impl == "triton":
            found[impl, "backward", 40] = backward(device)
    for case, error in found.items():
        print(*case, f"{error:.2g}", "" if error < 0.02 else "WRONG")
    if "--tune" in sys.argv:
        shapes = [Shape(64, (48, 16), (8, 8), True, BF16, BF16)]
        few = lambda: selfcheck(device, "triton", (5,), ((40, (24, 8), (56, 20)),), ((BF16, INT8),))  # noqa: E731
        print(tune(shapes, device, (3,), timer=lambda call: call() and 1.0, check=few, seconds=20))
    return 0 if found and all(error < 0.02 for error in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
