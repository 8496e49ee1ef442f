"""The op alone, for comparing one commit with another; `benchmarks/ops.py` compares it with other ways to compute the
same.

    pytest benchmarks/test_svf_linear.py --benchmark-autosave
    git checkout other && pytest benchmarks/test_svf_linear.py --benchmark-compare

pytest-benchmark's own clock and tables; on a GPU it waits for the device. Each case is compared with fp64 before it is
timed.
"""

from __future__ import annotations

import cases
import pytest
import torch
from measure import wait

from t2kernels.ops import svf_linear_group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = "llama-3-8b" if DEVICE.type == "cuda" else "small"
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@pytest.mark.parametrize("T", [1, 8, 256])
@pytest.mark.parametrize("mix", ["one", "all distinct"])
@pytest.mark.parametrize(
    "form, factors",
    [("delta", DTYPE), ("factored", DTYPE), ("factored", torch.int8)],
    ids=["delta", "factored", "int8"],
)
@pytest.mark.parametrize("group", ["o", "gate+up"])
def test_forward(benchmark, group, form, factors, mix, T):
    torch.manual_seed(0)
    w = cases.weights(*cases.shapes(MODEL, group), form, 64, factors, DTYPE, DEVICE) if form == "delta" else None
    w = w or cases.weights(*cases.shapes(MODEL, group), form, None, factors, DTYPE, DEVICE)
    x, ids = torch.randn(T, w.V.shape[0], device=DEVICE).to(DTYPE), cases.mixed(mix, T, DEVICE)
    base = cases.dense(x, ids, w) if w.delta else None

    def call():
        found = svf_linear_group(x, w.V, w.U, w.scale, ids, base)
        wait(DEVICE)
        return found

    with torch.no_grad():
        truth = cases.exact(x, ids, w)
        assert cases.error(call(), truth) <= 1.1 * cases.error(cases.two_matmuls(x, ids, w), truth)
        benchmark(call)


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_backward(benchmark, form):
    torch.manual_seed(0)
    w = cases.weights(*cases.shapes(MODEL, "qkv"), form, 64 if form == "delta" else None, DTYPE, DTYPE, DEVICE)
    x, ids = (
        torch.randn(256, w.V.shape[0], device=DEVICE).to(DTYPE).requires_grad_(),
        cases.mixed("8 sorted", 256, DEVICE),
    )
    scale = w.scale.clone().requires_grad_()
    dys = [torch.randn(256, U.shape[0], device=DEVICE).to(DTYPE) for U in w.U]

    def step():
        found = torch.autograd.grad(svf_linear_group(x, w.V, w.U, scale, ids), [x, scale], dys)
        wait(DEVICE)
        return found

    dx, dscale = step()
    g = torch.cat([d.double() @ U.double() for d, U in zip(dys, w.U, strict=True)], 1)
    wanted = (g * w.scale.double()[ids]) @ w.V.double().t()
    room = 1e-5 if DTYPE == torch.float32 else 1e-2
    assert (dx.double() - wanted).norm() <= room * wanted.norm()
    truth = torch.zeros_like(g[:1].expand(len(scale), -1)).index_add(0, ids, (x.double() @ w.V.double()) * g)
    assert (dscale.double() - truth).norm() <= room * truth.norm()
    benchmark(step)
