"""Factors in int8, fp16 and bf16: what they lose, on disk and in a model. Truth is fp64."""

import copy

import pytest
import torch

import t2kernels as t2
from t2kernels.factors.decomposition import decompose
from t2kernels.factors.factor import Factor, svd
from t2kernels.factors.identity import fingerprint, sketch
from t2kernels.factors.int8 import ALIGN, Int8Factor, stack
from t2kernels.factors.quantise import SPREAD, quantise
from t2kernels.factors.store import Factors
from tests.helpers.families import build

SHAPES = [(96, 96), (160, 64), (64, 160), (50, 37), (7, 90)]


def spiky(M, N, decay=0.7):
    """A decaying spectrum, a few input and output channels far larger than the others, as in trained models."""
    W = torch.randn(M, N)
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    W = (U * (1 + torch.arange(len(s))) ** -decay) @ Vh
    W[[1, M // 2]] *= 12
    W[:, [2, N // 3]] *= 12
    return W.float()


def components(f: Int8Factor) -> torch.Tensor:
    """[R, M, N] fp64 of each component at z = 1, column by column: what int8 factors mean, written down plainly."""
    parts = torch.zeros(f.rank, f.U.shape[0], f.V.shape[0], dtype=torch.float64)
    for c, (r, fold) in enumerate(zip(f.source.tolist(), f.fold.double(), strict=True)):
        parts[r] += f.sigma[r].double() * fold * torch.outer(f.U[:, c].double(), f.V[:, c].double())
    return parts


def dense_int8(W):
    step = W.abs().amax(1, keepdim=True) / 127
    return (W / step).round() * step


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_states_its_error(shape, compensate):
    W = spiky(*shape)
    factor = svd(W)
    q = quantise(*factor, compensate=compensate)
    parts, f = components(q.factor), q.factor
    assert (f.U.dtype, f.V.dtype, f.fold.dtype) == (torch.int8, torch.int8, torch.float32)
    assert len(f.source) == len(f.fold) == f.U.shape[1] == f.V.shape[1] == sum(f.runs)
    assert len(f.fold) % ALIGN == 0
    assert f.V.t().is_contiguous()
    assert max(f.U.abs().max(), f.V.abs().max()) <= 127
    torch.testing.assert_close(f.dense().double(), parts.sum(0), rtol=0, atol=1e-6 * W.norm())
    exact = torch.einsum("mr,r,nr->rmn", factor.U.double(), factor.sigma.double(), factor.V.double())
    size = exact.sum(0).norm()
    assert q.dense == pytest.approx(((dense_int8(W.double()) - W).norm() / size).item(), rel=1e-3)
    # E ||Σ_r z_r D_r||² = ||Σ_r D_r||² + SPREAD² Σ_r ||D_r||² for z_r around 1. q.error leaves the product of two
    # residuals out.
    off = parts - exact
    mean = lambda D: D.sum(0).square().sum() + SPREAD**2 * D.square().sum()  # noqa: E731
    assert q.error == pytest.approx((mean(off) / mean(exact)).sqrt().item(), rel=2e-2)
    assert q.record()["residual_columns"] == q.residual <= len(f.fold) - f.rank


@pytest.mark.parametrize("shape", [(256, 256), (384, 128), (128, 384)])
def test_compensated_int8_is_as_good_as_int8_of_the_weight(shape):
    """The issue's bar is 1.3 of dense int8; and without compensation and residual columns it is missed by far."""
    W = spiky(*shape)
    x = torch.randn(64, shape[1], dtype=torch.float64)
    factor = svd(W)
    q = quantise(*factor)
    y = x @ W.double().t()
    off = lambda W_: ((x @ W_.double().t() - y).norm() / y.norm()).item()  # noqa: E731
    best = off(dense_int8(W))
    assert off(q.factor.dense()) < 1.2 * best
    assert q.residual <= -(-shape[0] // 8) + ALIGN
    plain = [
        c.round() * s for c, s in ((m / (m.abs().amax(0) / 127), m.abs().amax(0) / 127) for m in (factor.U, factor.V))
    ]
    assert off((plain[0] * factor.sigma) @ plain[1].t()) > 1.5 * off(q.factor.dense())


@pytest.mark.parametrize("compensate", [True, False])
def test_max_error_is_held_or_refused(compensate):
    factor = svd(spiky(96, 64))
    errors = [quantise(*factor, max_error=e, compensate=compensate) for e in (0.02, 0.01, 0.003, 0.001)]
    assert all(q.error <= e for q, e in zip(errors, (0.02, 0.01, 0.003, 0.001), strict=True))
    columns = [len(q.factor.fold) for q in errors]
    assert columns == sorted(columns)
    assert columns[0] < columns[-1]
    with pytest.raises(ValueError, match=r"int8 factors of this \[96, 64\] matrix reach .* not max_error=1e-07"):
        quantise(*factor, max_error=1e-7, compensate=compensate)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="positive relative error"):
            quantise(*factor, max_error=bad)


def test_no_component_is_left_spiky():
    """A component of little weight with one huge entry hardly changes the error of W, but an expert may use it."""
    L, r = 200, 150
    U, _ = torch.linalg.qr(torch.randn(L, L, dtype=torch.float64))
    V = torch.randn(L, L, dtype=torch.float64)
    V[:, 0] = 0.05 * V[:, 0] / V[:, 0].norm()
    V[3, 0] = 1
    V = torch.linalg.qr(V).Q
    V = torch.cat([V[:, 1 : r + 1], V[:, :1], V[:, r + 1 :]], 1)
    factor = Factor(U.float(), torch.linspace(1, 0.05, L), V.float())
    rounded = (V[:, r] / V[:, r].abs().max() * 127).round()
    assert torch.linalg.vector_norm(rounded / rounded.norm() - V[:, r] * rounded[3].sign() * V[3, r].sign()) > 0.02
    f = quantise(*factor, compensate=True).factor
    v = torch.linalg.svd(components(f.cut(r + 1))[r])[2][0]
    assert (v - v.dot(V[:, r]) * V[:, r]).norm() < 2e-3


def test_degenerate_matrices():
    zero = quantise(torch.eye(8, 4), torch.zeros(4), torch.eye(6, 4))
    assert zero.error == 0
    assert torch.equal(zero.factor.dense(), torch.zeros(8, 6))
    low = torch.randn(40, 3) @ torch.randn(3, 30)
    for q in (quantise(*svd(low)), quantise(*svd(low), max_error=0.01)):
        assert torch.isfinite(q.factor.fold).all()
        assert (q.factor.dense() - low).norm() < 0.02 * low.norm()
    with pytest.raises(ValueError, match="compensation needs all 30 components"):
        quantise(*svd(low, 3), compensate=True)
    assert not quantise(*svd(low, 3)).compensated


def test_cut_takes_the_components_with_their_residual_columns():
    f = quantise(*svd(spiky(96, 64)), max_error=0.003).factor
    assert len(f.runs) >= 3
    parts = components(f)
    for k in (1, 17, 64, 90):
        cut = f.cut(k)
        assert cut.rank == min(k, 64)
        assert len(cut.fold) % ALIGN == 0
        assert cut.V.t().is_contiguous()
        torch.testing.assert_close(components(cut), parts[:k], rtol=0, atol=0)
    torch.testing.assert_close(components(f.cut(20).cut(9)), parts[:9], rtol=0, atol=0)


def test_stacked_factors_are_the_factors():
    several = [quantise(*svd(spiky(48, 32)), max_error=e).factor for e in (0.02, 0.004, 0.008)]
    s = stack(several)
    assert s.U.shape[-1] % ALIGN == 0
    row = s.columns(s.sigma)
    for i, f in enumerate(several):
        torch.testing.assert_close((s.U[i].float() * row[i]) @ s.V[i].float().t(), f.dense(), rtol=0, atol=1e-6)


def test_columns_are_differentiable_and_the_same_each_time():
    f = quantise(*svd(spiky(48, 32)), max_error=0.004).factor
    row = torch.randn(3, 32, requires_grad=True)
    out = torch.randn(3, len(f.fold))
    (f.columns(row) * out).sum().backward()
    want = torch.zeros(3, 32, dtype=torch.float64).index_add(1, f.source, (out * f.fold).double())
    torch.testing.assert_close(row.grad.double(), want, rtol=1e-6, atol=1e-6 * want.abs().max())


# --- on disk


def test_formats_on_disk(tmp_path):
    model = build("llama")
    exact = decompose(model, out=tmp_path / "fp32")
    for source, name in ((exact.to_format("int8"), "memory"), (exact.to_format("int8", tmp_path / "a"), "disk")):
        assert all(isinstance(f, Int8Factor) for f in source.values()), name
    direct = decompose(model, out=tmp_path / "b", format="int8")
    again = source.save(tmp_path / "c")
    for other in (source, Factors.load(again), exact.to_format("int8")):
        assert list(other) == list(exact)
        for n, f in direct.items():
            assert all(torch.equal(a, b) for a, b in zip(f[:5], other[n][:5], strict=True))
        assert dict(other.fingerprints) == dict(direct.fingerprints)
        assert all(torch.equal(other.sketches[n], exact.sketches[n]) for n in exact)
        assert all(torch.equal(other.sigmas[n], exact.sigmas[n]) for n in exact)
    for n, record in direct.manifest["matrices"].items():
        assert {
            "dtype",
            "columns",
            "residual_columns",
            "format_error",
            "dense_int8_error",
            "measured",
            "compensated",
        } <= set(record)
        assert record["dtype"] == "int8"
        assert record["columns"] == len(direct[n].fold)
        assert record["fingerprint"] == fingerprint(direct[n]) != exact.fingerprints[n]
        off = (direct[n].dense() - exact[n].dense()).norm() / exact[n].dense().norm()
        assert record["error"] == pytest.approx(off.item(), rel=2e-2)
    cut = Factors.load(tmp_path / "a").cut(5)
    for n, f in cut.items():
        assert f.rank == 5
        torch.testing.assert_close(components(f), components(direct[n])[:5], rtol=0, atol=0)
    assert direct.manifest["dtype"] == "int8"
    with pytest.raises(ValueError, match=r"q_proj: its factors are int8 already"):
        direct.to_format("fp16")
    half = exact.to_format("fp16", tmp_path / "half", max_error=1e-3)
    assert {f.U.dtype for f in half.values()} == {torch.float16}
    assert all(m["format_error"] < 1e-3 for m in half.manifest["matrices"].values())
    with pytest.raises(ValueError, match=r"q_proj: bf16 factors have a relative error of .* more than max_error=0.001"):
        exact.to_format("bf16", max_error=1e-3)
    with pytest.raises(ValueError, match="format='int4'; wanted one of 'fp32'"):
        exact.to_format("int4")


def test_decompose_again_goes_on_only_where_the_format_is_the_same(tmp_path, monkeypatch):
    from t2kernels.factors import linalg

    made, real = [], linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda A, k: made.append(k) or real(A, k))
    model = build("llama")
    counts = []
    for asked in (
        {},
        {"format": "int8"},
        {"format": "int8"},
        {"format": "int8", "max_error": 0.01},
        {"format": "fp16"},
    ):
        made.clear()
        decompose(model, out=tmp_path, targets="mlp", **asked)
        counts.append(len(made))
    assert counts == [6, 6, 0, 6, 6]
    with pytest.raises(ValueError, match="give one of them"):
        decompose(model, format="int8", dtype=torch.float16)
    with pytest.raises(ValueError, match="limits what a format loses"):
        decompose(model, max_error=0.1)
    with pytest.raises(ValueError, match=r"q_proj: int8 factors of this .* reach"):
        decompose(model, format="int8", max_error=1e-9)


def test_an_expert_knows_nothing_of_formats(tmp_path):
    model = build("llama")
    exact = decompose(model)
    saved = t2.patch_model(copy.deepcopy(model), factors=exact)
    expert = saved.expert({n: 1 + 0.4 * torch.randn(k) for n, k in saved.matrices.items()})
    other = build("llama")
    for factors in (
        "int8",
        "fp16",
        exact.to_format("int8"),
        exact.to_format("fp16"),
        exact.to_format("int8", tmp_path / "i").cut(None),
    ):
        bank = t2.patch_model(copy.deepcopy(model), factors=factors)
        bank.add("a", expert)
        back = bank["a"]
        assert all(torch.equal(back.z[n], expert.z[n]) for n in expert.z)
        saved.add("b", back, replace=True)
    with pytest.raises(t2.ExpertMismatch):
        t2.patch_model(other, factors="int8").add("a", expert)
    # Without sketches of the exact factors, those of the rounded ones are near enough.
    for f in exact.values():
        assert (sketch(quantise(*f, compensate=False).factor) - sketch(f)).abs().max() < 0.1


# --- the bar: real weights, real hidden states, the op, beside dense int8 and dense bf16


@torch.no_grad()
def test_int8_is_no_worse_than_int8_of_the_weights_on_the_built_in_model():
    from t2kernels import tasks, tiny
    from t2kernels.factors.matrices import find_matrices

    model, tokenizer = tiny.load()
    rows = [row for name in ("math", "code", "reason") for row in tasks.load(name).split("test", 20)]
    batch = tokenizer([f"{row['prompt']}={row['answer']}" for row in rows], return_tensors="pt", padding=True)
    mask = batch["attention_mask"].bool()
    seen, want = {}, find_matrices(model)
    hooks = [
        m.module.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0])) for n, m in want.items()
    ]
    logs = lambda m: m(**batch).logits.double().log_softmax(-1)[mask]  # noqa: E731
    base = logs(model)
    for hook in hooks:
        hook.remove()
    weights = {n: m.read().clone() for n, m in want.items()}

    def far(other):
        return (base.exp() * (base - logs(other))).sum(-1).mean().item()

    rounded = copy.deepcopy(model)
    for n, W in weights.items():
        rounded.get_submodule(n).weight = torch.nn.Parameter(dense_int8(W))
    patched = copy.deepcopy(model)
    bank = t2.patch_model(patched, factors="int8", form="factored", rows=2)
    ratios = []
    for layer, (n,) in bank.layers:
        x = seen[n][mask].double()
        y = x @ weights[n].double().t()
        mine = t2.svf_linear(x, layer.V, layer.U, layer.scale, torch.zeros((), dtype=torch.int32))
        ratios.append(((mine - y).norm() / (x @ dense_int8(weights[n]).double().t() - y).norm()).item())
    ratios = torch.tensor(ratios)
    assert ratios.median() < 1.3
    assert ratios.max() < 1.5
    assert far(patched) < far(rounded)
    # What it costs: columns beyond R, of which filling up to 16 is a half at R = 128.
    assert sum(layer.scale.shape[1] - layer.rank for layer, _ in bank.layers) <= 0.125 * sum(
        layer.rank for layer, _ in bank.layers
    )


@pytest.mark.parametrize("shape", [(128, 128), (96, 192)])
def test_fp16_factors_are_nearer_than_a_bf16_weight(shape):
    W = spiky(*shape)
    x = torch.randn(64, shape[1], dtype=torch.float64)
    y = x @ W.double().t()
    f = svd(W).to(torch.float16)
    mine = t2.svf_linear(x, f.V, f.U, f.sigma[None], torch.zeros((), dtype=torch.int32))
    assert (mine - y).norm() < 0.4 * (x @ W.bfloat16().double().t() - y).norm()
