"""Block Lanczos against the exact path: by sigma, by what an expert does with the components, and where it gives up."""

import pytest
import torch

from t2kernels.factors import linalg
from t2kernels.factors.algorithms import compiled
from t2kernels.factors.algorithms import gram as grams
from t2kernels.factors.algorithms import leading as algorithm
from t2kernels.factors.algorithms.krylov import misses
from t2kernels.factors.factor import keep, svd
from t2kernels.factors.identity import sketch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma, M, N):
    U, V = (torch.linalg.qr(normal(n, len(sigma), seed=s).double())[0] for n, s in ((M, 1), (N, 2)))
    return ((U * sigma) @ V.t()).float()


@pytest.fixture(params=["compiled", "torch"])
def products(request, monkeypatch):
    """The compiled products, and torch's, as on a machine without the extension or without AVX-512."""
    if request.param == "torch":
        monkeypatch.setattr(compiled.extension, "unsupported", lambda: "not built")
    elif not compiled.fits(torch.zeros(1, 1), torch.zeros(1, 1)):
        pytest.skip("no compiled products here: t2kernels._C is not built, or the CPU lacks AVX-512")


i = torch.arange(1, 513, dtype=torch.float64)
SPECTRA = {
    "power law": i**-0.5,
    "steep": i**-1.5,
    "bulk with spikes": torch.where(i < 17, 20 - i, 1.5 * (i / 17) ** -0.4),
    "pairs": (1 + (i - 1) // 2) ** -0.5,
    "a cluster of 12": torch.where(i < 13, 1.0, i**-0.7),
    "rank 100": torch.where(i < 101, i**-0.3, 0.0),
}


def exact(A, k):
    U, sigma, Vt = torch.linalg.svd(A.double(), full_matrices=False)
    return U[:, :k], sigma[:k], Vt[:k]


def effect(U, sigma, Vt, change):
    """What an expert adds to W: U diag(sigma (z - 1)) Vᵀ."""
    return (U.double() * (sigma.double() * change)) @ Vt.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(700, 512), (512, 700), (512, 512)])
@pytest.mark.parametrize("name", SPECTRA)
def test_an_expert_does_the_same_as_with_the_exact_components(name, shape, dtype):
    A = with_spectrum(SPECTRA[name], *shape).to(dtype)
    k = 32
    wide = A.t() if shape[0] < shape[1] else A
    found = algorithm.leading(wide.contiguous(), k)
    assert found is not None
    U, sigma, Vt, reached = found
    assert reached <= algorithm.ENOUGH
    assert linalg.residual(wide.double(), U, sigma, Vt) <= 2e-7
    one = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U.t() @ U, one, rtol=0, atol=1e-7)
    torch.testing.assert_close(Vt @ Vt.t(), one, rtol=0, atol=1e-7)
    truth = exact(wide, k)
    torch.testing.assert_close(sigma, truth[1], rtol=1e-9, atol=0)
    # Components that share a value to rounding may come as another basis: an expert that treats them alike is the same.
    same = (truth[1][:-1] - truth[1][1:]) < 1e-5 * truth[1][0]
    group = torch.cat([torch.zeros(1, dtype=torch.long), (~same).long().cumsum(0)])
    change = 0.25 * normal(k, seed=3).double()[group]
    wanted = effect(*truth, change)
    assert (effect(U, sigma, Vt, change) - wanted).norm() <= 2e-7 * wanted.norm()


def test_the_start_is_fixed_and_signs_do_not_matter():
    A = with_spectrum(SPECTRA["power law"], 600, 512)
    torch.manual_seed(1)
    first = algorithm.leading(A, 32)
    torch.manual_seed(2)
    again = algorithm.leading(A, 32)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True))
    U, sigma, Vt = exact(A, 32)
    theirs = keep(linalg.SVD(U, sigma, Vt, "", 0.0))
    torch.testing.assert_close(sketch(keep(linalg.SVD(*first[:3], "", 0.0))), sketch(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "A",
    [
        with_spectrum(torch.where(i < 21, i**-0.3, 0.0), 512, 512),  # rank below k
        torch.zeros(512, 512),
        torch.eye(512),
        normal(400, 400),  # flat: k = 80 of 400 need most of the space
    ],
    ids=["rank 20", "zero", "identity", "flat"],
)
def test_it_gives_up_rather_than_answer_wrongly(A):
    assert algorithm.leading(A, 32 if len(A) == 512 else 80) is None


def test_more_equal_values_than_a_block_has_columns_are_all_found_or_none():
    """A block of 16 sees 16 copies at once, and rounding brings more; a fresh block looks for the others."""
    A = with_spectrum(torch.where(i < 41, 1.0, 0.5 * i**-0.5), 512, 512)
    copy = torch.eye(512)  # exact copies: no rounding tells them apart
    copy[range(40, 512), range(40, 512)] = 0.5 * i[40:].float() ** -0.5
    for matrix in (A, copy):
        found = algorithm.leading(matrix, 64)
        assert found is None or found[1][:40].sub(1).abs().max() < 1e-6


def test_a_component_that_the_space_does_not_hold_is_seen(products):
    A = with_spectrum(SPECTRA["power law"], 600, 512)
    _, sigma, Vt = exact(A, 33)
    keep_all = [n for n in range(33) if n != 5]
    assert not misses(grams.gram(A), sigma[:32], Vt[:32])
    assert misses(grams.gram(A), sigma[keep_all], Vt[keep_all])


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_large_matrices_come_from_it_and_small_ones_do_not(scale):
    A = with_spectrum(torch.arange(1, 1025).double() ** -0.5, 1024, 1100) * scale
    found = linalg.svd(A, 16)
    assert found.algorithm == "block-lanczos-fp64"
    torch.testing.assert_close(found.sigma, SPECTRA["power law"][:16] * scale, rtol=1e-5, atol=0)
    assert linalg.residual(A.double() / scale, found.U, found.sigma / scale, found.Vt) < 2e-7
    assert linalg.svd(A[:1000], 16).algorithm == "gram-eigh-fp64"
    A[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        svd(A, 16)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_setting_of_fp32_products_changes_it(precision, products):
    A = with_spectrum(SPECTRA["power law"], 600, 512)
    first = algorithm.leading(A, 16)
    try:
        torch.set_float32_matmul_precision(precision)
        again = algorithm.leading(A, 16)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(first[1], again[1], rtol=1e-12, atol=0)
    assert again[3] <= algorithm.ENOUGH


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("shape", [(1500, 700), (700, 700), (37, 5)])
def test_the_gram_matrix_and_products_with_bf16_weights_have_nearly_the_accuracy_of_fp32(
    shape, halves, monkeypatch, products
):
    monkeypatch.setattr(grams, "halves", lambda A: halves)
    A, X = normal(*shape, seed=5).bfloat16(), normal(9, shape[1], seed=6)
    wide = A.double()
    for found, wanted in (
        (grams.gram(A), wide.t() @ wide),
        (grams.times(X, A), X.double() @ wide.t()),
        (grams.times(X * 1e-30, A).double() * 1e30, X.double() @ wide.t()),
    ):
        assert (found.double() - wanted).norm() <= 6e-6 * wanted.norm()
    assert torch.equal(grams.gram(A), grams.gram(A).t())


@pytest.mark.parametrize("halves", [True, False])
def test_bf16_products_do_not_decide_the_accuracy(halves, monkeypatch, products):
    for module in (grams, algorithm):
        monkeypatch.setattr(module, "halves", lambda A: halves)
    A = with_spectrum(SPECTRA["bulk with spikes"], 700, 512).bfloat16()
    U, sigma, Vt, error = algorithm.leading(A, 48)
    truth, change = exact(A, 48), 0.25 * normal(48, seed=3).double()
    wanted = effect(*truth, change)
    off = (effect(U, sigma, Vt, change) - wanted).norm() / wanted.norm()
    assert off <= 3 * algorithm.ENOUGH
    assert error <= algorithm.ENOUGH


@pytest.mark.parametrize("shape", [(1100, 1024), (1024, 1500)])
def test_a_flat_spectrum_is_right(shape, products):
    A = normal(*shape, seed=8).bfloat16()
    k = 48
    found = linalg.svd(A, k)
    assert found.residual <= linalg.TOLERANCE
    truth, change = exact(A, k), 0.25 * normal(k, seed=3).double()
    torch.testing.assert_close(found.sigma, truth[1], rtol=1e-10, atol=0)
    wanted = effect(*truth, change)
    assert (effect(found.U, found.sigma, found.Vt, change) - wanted).norm() <= 3e-8 * wanted.norm()


def test_the_bytes_are_the_same_each_time_and_threads_change_only_rounding(products):
    A = with_spectrum(SPECTRA["power law"], 1100, 512).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = algorithm.leading(A, 32), algorithm.leading(A, 32)
        torch.set_num_threads(2)
        two = algorithm.leading(A, 32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True))
    change = 0.25 * normal(32, seed=3).double()
    wanted = effect(*first[:3], change)
    assert (effect(*two[:3], change) - wanted).norm() <= 3e-8 * wanted.norm()
