"""Products of large matrices in wide sums: csrc/cpu/products.h against fp64, and torch's in their place."""

import pytest
import torch

from t2kernels.factors.algorithms import compiled
from t2kernels.factors.algorithms.compiled import fits, product
from t2kernels.factors.algorithms.products import both, large

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
PAIRS = ((BF16, BF16), (F32, F32), (F32, BF16), (F64, F64), (F64, F32), (F64, BF16))
needs = pytest.mark.skipif(not fits(torch.zeros(1, 1), torch.zeros(1, 1)), reason="no t2kernels._C, or no AVX-512")


def normal(rows, columns, dtype, across, seed):
    t = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return t.t().contiguous().t() if across else t


def off(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@needs
@pytest.mark.parametrize("across", [(x, y) for x in (False, True) for y in (False, True)])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("p, n, K", [(1, 1, 1), (9, 50, 37), (17, 130, 1101), (64, 48, 1024), (100, 300, 700)])
def test_sums_have_their_own_accuracy(p, n, K, dtypes, across):
    X, Y = normal(p, K, dtypes[0], across[0], 1), normal(n, K, dtypes[1], across[1], 2)
    if not fits(X, Y):
        pytest.skip(f"this CPU has no products of {dtypes[0]}")
    limit = 1e-14 if dtypes[0] == F64 else 2e-6
    wanted, wide = X.double() @ Y.double().t(), F64 if dtypes[0] == F64 else F32
    room = torch.full((p, n + 3), torch.nan, dtype=wide)
    assert product(X, Y, room[:, :n]) is not None
    assert off(room[:, :n], wanted) <= limit
    assert room[:, n:].isnan().all()
    start = torch.randn(p, n).to(wide)
    assert off(product(X, Y, start.clone(), add=True), start.double() + wanted) <= limit


@needs
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("N", [1, 47, 48, 131, 513])
def test_the_upper_triangle_is_that_of_the_product(N, dtype):
    A = normal(77, N, dtype, False, 3)
    if not fits(A, A):
        pytest.skip(f"this CPU has no products of {dtype}")
    found = product(A.t(), A.t(), upper=True).double().triu()
    assert off(found, (A.double().t() @ A.double()).triu()) <= (1e-14 if dtype == F64 else 2e-6)


@needs
def test_threads_do_not_change_a_bit():
    X, Y = normal(70, 900, F32, False, 4), normal(333, 900, BF16, True, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = product(X, Y)
        torch.set_num_threads(2)
        assert torch.equal(one, product(X, Y))
    finally:
        torch.set_num_threads(before)


@needs
@pytest.mark.parametrize("K", [0, 5])
def test_no_rows_and_no_columns(K):
    X, Y = torch.zeros(4, K, dtype=F64), torch.zeros(3, K, dtype=F64)
    assert torch.equal(product(X, Y), torch.zeros(4, 3, dtype=F64))
    assert product(X[:0], Y).shape == (0, 3)
    assert product(X, Y[:0]).shape == (4, 0)


def test_what_it_does_not_take():
    X = torch.zeros(2, 2)
    assert not fits(X, X.double())
    assert not fits(X.half(), X.half())
    assert not fits(X, X.to("meta"))


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, F64])
def test_both_products_with_weights_in_fp64(dtype, there, monkeypatch):
    if not there:
        monkeypatch.setattr(compiled.extension, "unsupported", lambda: "not built")
    A, X, Y = normal(1300, 60, dtype, False, 6), normal(7, 60, F64, False, 7), normal(7, 1300, F64, False, 8)
    wide = A.double()
    B, C = both(X, A)
    assert off(B, X @ wide.t()) <= 1e-14
    assert off(C, X @ wide.t() @ wide) <= 1e-14
    assert off(both(X, A, Y)[1], Y @ wide) <= 1e-14


@pytest.mark.parametrize("there", [True, False])
def test_no_global_setting_makes_large_products_narrower(there, monkeypatch):
    if not there:
        monkeypatch.setattr(compiled.extension, "unsupported", lambda: "not built")
    A, B = normal(50, 400, F32, False, 9), normal(400, 60, F32, False, 10)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=BF16):
            assert off(large(A, B), A.double() @ B.double()) <= 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
