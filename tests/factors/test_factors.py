import json
import math
import pickle

import pytest
import torch

from t2kernels.factors import linalg
from t2kernels.factors.factor import Factor, reconstruction_error, resolve_rank, svd
from t2kernels.factors.identity import fingerprint, sketch
from t2kernels.factors.store import Factors


def make(shape=(24, 40), seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factors():
    return Factors(
        {"a.q": svd(make()), "a.k": svd(make((40, 24), 1)), "b.experts.up_proj.3": svd(make((9, 5), 2))},
        {"base_model": "tiny"},
    )


@pytest.mark.parametrize(
    ("rank", "R", "k"),
    [(None, 7, 7), (3, 7, 3), (9, 7, 7), (0.5, 8, 4), (1 / 16, 128, 8), (0.29, 100, 29), (0.01, 7, 1)],
)
def test_resolve_rank(rank, R, k):
    assert resolve_rank(rank, R) == k


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, 1.5, float("nan"), "8", True])
def test_resolve_rank_refuses(rank):
    with pytest.raises(ValueError, match="rank="):
        resolve_rank(rank, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (31, 17), (17, 31), (64, 64)])
@pytest.mark.parametrize("rank", [None, 0.5])
def test_svd_against_lapack(shape, rank):
    W = make(shape)
    U, sigma, V = svd(W, rank)
    k = resolve_rank(rank, min(shape))
    exact = torch.linalg.svd(W.double(), full_matrices=False)
    assert (U.shape, sigma.shape, V.shape) == ((shape[0], k), (k,), (shape[1], k))
    assert U.is_contiguous()
    assert V.t().is_contiguous()
    torch.testing.assert_close(sigma.double(), exact.S[:k], rtol=2e-7, atol=0)
    torch.testing.assert_close(
        torch.stack([U.double()[:, i].outer(V.double()[:, i]) for i in range(k)], 0) if k else U,
        torch.einsum("mk,kn->kmn", exact.U[:, :k], exact.Vh[:k]),
        rtol=0,
        atol=1e-6,
    )
    assert reconstruction_error(W, Factor(U, sigma, V)) == pytest.approx(
        (exact.S[k:].norm() / exact.S.norm()).item(), abs=3e-7
    )


@pytest.mark.parametrize(
    "W", [torch.zeros(6, 9), make((12, 2)) @ make((2, 20)), torch.ones(5, 5)], ids=["zero", "rank 2", "rank 1"]
)
def test_svd_of_deficient_matrices_stays_orthogonal(W):
    f = svd(W)
    R = min(W.shape)
    torch.testing.assert_close(f.U.t() @ f.U, torch.eye(R), rtol=0, atol=1e-6)
    torch.testing.assert_close(f.V.t() @ f.V, torch.eye(R), rtol=0, atol=1e-6)
    torch.testing.assert_close(f.dense(), W, rtol=0, atol=1e-5)


def test_svd_of_a_wide_spectrum():
    Q, P = (torch.linalg.qr(make((48, 48), s).double())[0] for s in (1, 2))
    for smallest in (1e-3, 1e-6, 1e-9):
        sigma = torch.logspace(0, math.log10(smallest), 48, dtype=torch.float64)
        A = (Q * sigma) @ P.t()
        found = linalg.svd(A, 48)
        assert found.residual <= linalg.TOLERANCE
        torch.testing.assert_close(found.sigma, sigma, rtol=0, atol=1e-14)
        torch.testing.assert_close(found.U.t() @ found.U, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_bad_decomposition_falls_back(monkeypatch):
    def wrong(A):
        w, V = eigh(A)
        return w, V + 1e-5 * torch.ones_like(V)

    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    found = linalg.svd(make().double(), 24)
    assert found.algorithm == "svd-fp64"
    assert found.residual < 1e-12
    monkeypatch.undo()
    assert linalg.svd(make().double(), 24).algorithm == "gram-eigh-fp64"


def test_residual_sees_one_wrong_component():
    A = make().double()
    U, sigma, Vt = torch.linalg.svd(A, full_matrices=False)
    assert linalg.residual(A, U, sigma, Vt) < 1e-13
    Vt[5] = torch.nn.functional.normalize(Vt[5] + 1e-4 * Vt[6], dim=0)
    assert 1e-5 < linalg.residual(A, U, sigma, Vt) < 1e-3


@pytest.mark.parametrize(
    "W", [torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.tensor([[1.0, math.nan]]), torch.ones(0, 3)]
)
def test_svd_refuses(W):
    with pytest.raises(ValueError, match="svd: "):
        svd(W)


def test_sketch_ignores_signs_and_basis_of_equal_singular_values():
    U, sigma, V = svd(make())
    flip = torch.ones(24).index_fill(0, torch.tensor([0, 7, 23]), -1.0)
    s = sketch(Factor(U, sigma, V))
    torch.testing.assert_close(sketch(Factor(U * flip, sigma, V * flip)), s)
    c, d = math.cos(0.7), math.sin(0.7)
    turn = torch.eye(24)
    turn[3:5, 3:5] = torch.tensor([[c, -d], [d, c]])
    turned = sketch(Factor(U @ turn, sigma, V @ turn))
    assert (turned - s)[3:5].abs().min() > 0.05
    torch.testing.assert_close(turned[3:5].sum(), s[3:5].sum())
    torch.testing.assert_close(turned[5:], s[5:])


def test_sketch_is_the_same_on_every_machine():
    assert "".join("+" if x > 0 else "-" for x in linalg.signs(32, 1)) == "++-++-+-++----+-+------++++--+--"
    assert abs(linalg.signs(100_000, 1).double().mean()) < 0.02
    assert abs((linalg.signs(100_000, 1) * linalg.signs(100_000, 2)).double().mean()) < 0.02


def test_sketch_is_of_order_one():
    s = sketch(svd(make((300, 200))))
    assert 0.5 < s.double().square().mean().sqrt() < 2


def test_save_load_cut(factors, tmp_path):
    factors.save(tmp_path / "f")
    loaded = Factors.load(tmp_path / "f")
    assert list(loaded) == list(factors)
    assert loaded.ranks == {"a.q": 24, "a.k": 24, "b.experts.up_proj.3": 5}
    assert loaded.fingerprint == factors.fingerprint
    assert loaded.manifest["base_model"] == "tiny"
    for name, f in factors.items():
        for ours, theirs in zip(f, loaded[name], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(loaded.sketches[name], factors.sketches[name])
        assert loaded[name].V.t().is_contiguous()
    for source in (factors, loaded):
        few = source.cut(4)
        assert few.ranks == {"a.q": 4, "a.k": 4, "b.experts.up_proj.3": 4}
        assert torch.equal(few["a.k"].U, factors["a.k"].U[:, :4])
        assert torch.equal(few["a.k"].V, factors["a.k"].V[:, :4])
        assert len(few.sigmas["a.q"]) == len(few.sketches["a.q"]) == 4
        assert few.fingerprint == factors.fingerprint
        assert few.shape("a.q") == (24, 40)
        assert few.cut(0.125).ranks == {"a.q": 3, "a.k": 3, "b.experts.up_proj.3": 1}
        assert few.cut(None).ranks == few.ranks
    assert factors.cut(4)["a.q"].U.data_ptr() == factors["a.q"].U.data_ptr()


def test_a_cut_is_saved_and_pickled(factors, tmp_path):
    few = factors.cut(4)
    few.save(tmp_path / "f")
    for other in (
        Factors.load(tmp_path / "f"),
        pickle.loads(pickle.dumps(few)),
        pickle.loads(pickle.dumps(Factors.load(tmp_path / "f"))),
    ):
        for name, f in few.items():
            assert all(torch.equal(x, y) for x, y in zip(f, other[name], strict=True))
            assert torch.equal(other.sketches[name], few.sketches[name])
    assert Factors.load(tmp_path / "f").fingerprint != factors.fingerprint  # the bytes of what was cut off are gone


def test_fingerprint_changes_with_any_byte(factors):
    f = factors["a.q"]
    changed = f.V.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    assert fingerprint(Factor(f.U, f.sigma, changed)) != fingerprint(f)
    assert fingerprint(f.cut(23)) != fingerprint(f)
    assert fingerprint(Factor(f.U.clone(), f.sigma.clone(), f.V.clone())) == fingerprint(f)
    other = Factors(dict(factors) | {"a.q": Factor(f.U, f.sigma, changed)})
    assert other.fingerprint != factors.fingerprint


def test_unknown_name(factors):
    with pytest.raises(KeyError, match=r"no factors of 'x'.*a\.q"):
        factors["x"]
    assert "x" not in factors
    assert factors.get("x") is None


def test_shapes_are_checked():
    f = svd(make())
    with pytest.raises(ValueError, match=r"m: wanted U \[M, R\]"):
        Factors({"m": Factor(f.U, f.sigma, f.V.t())})


def test_load_says_what_is_wrong(factors, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory of factors"):
        Factors.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        Factors.load(tmp_path)
    path = factors.save(tmp_path / "f")
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / manifest["matrices"]["a.q"]["file"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.q\.safetensors cannot be read: it is truncated"):
        Factors.load(path)["a.q"]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.q\.safetensors is missing"):
        Factors.load(path)["a.q"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        Factors.load(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest of factors"):
        Factors.load(path)


def test_a_save_that_fails_is_not_taken_for_finished(factors, tmp_path, monkeypatch):
    from t2kernels import storage

    path, real, left = factors.save(tmp_path / "f"), storage.save_file, [2]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*up_proj\.3\.safetensors.*Free space") as e:
        factors.save(path)
    assert e.value.errno == 28
    assert not [p for p in path.iterdir() if p.name.endswith(".tmp")]
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        Factors.load(path)


def test_to_keeps_sigma_in_fp32():
    f = svd(make()).to(torch.bfloat16)
    assert (f.U.dtype, f.sigma.dtype, f.V.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert f.V.t().is_contiguous()
    assert 1e-3 < reconstruction_error(make(), f) < 1e-2
