"""Models whose factors are int8, fp16 or bf16: forward, gradients, both forms, saving, casting, undoing."""

import copy

import pytest
import torch

import t2kernels as t2
from t2kernels.factors.decomposition import decompose
from t2kernels.factors.factor import svd
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.matrices import find_matrices
from t2kernels.factors.quantise import quantise
from t2kernels.layers.factored_linear import FactoredLinear
from t2kernels.layers.linear import SVFLinear
from t2kernels.ops import svf_linear_ref
from tests.helpers.families import build

LIMIT = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2, "int8": 4e-2}  # of logits, two layers deep, relative


def patched(family="llama", **kw):
    model = build(family)
    return model, *_patch(model, **kw)


def _patch(plain, **kw):
    model = copy.deepcopy(plain)
    return model, t2.patch_model(model, **kw)


def draw(bank, size=0.3):
    return bank.expert({n: 1 + size * torch.randn(k) for n, k in bank.matrices.items()})


def prompts(B=3):
    return torch.randint(3, 60, (B, 6))


def dense(plain, expert):
    """The model with W' = U diag(sigma z) Vᵀ written into its weights, from fp64."""
    model = copy.deepcopy(plain)
    for name, m in find_matrices(model).items():
        f = svd(m.read())
        U, s, V = (t.double() for t in f)
        z = torch.ones_like(s)
        z[: len(expert.z[name])] = expert.z[name].double()
        w = (U * (s * z)) @ V.t()
        stored = getattr(m.module, m.tensor.rpartition(".")[2])
        with torch.no_grad():
            (stored if m.index is None else stored[m.index]).copy_(w.t() if m.transposed else w)
    return model


def rel(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("form", ["factored", "delta"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "int8"])
def test_a_mixed_batch_in_every_format(format, form):
    plain, model, bank = patched(factors=format, form=form, rows=5)
    kinds = {m.U.dtype for m in model.modules() if isinstance(m, SVFLinear)}
    assert kinds == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[format]}
    experts = {n: draw(bank) for n in "ab"}
    for n, e in experts.items():
        bank.add(n, e)
    x = prompts()
    with torch.no_grad():
        got = model(x, experts=["a", None, "b"]).logits
        want = [
            m(x[i : i + 1]).logits[0]
            for i, m in enumerate((dense(plain, experts["a"]), plain, dense(plain, experts["b"])))
        ]
        for g, w in zip(got, want, strict=True):
            assert rel(g, w) < LIMIT[format]
        if form == "delta":
            torch.testing.assert_close(got[1], plain(x).logits[1], rtol=0, atol=0)  # the dense model, same batch
            torch.testing.assert_close(model(x, experts=None).logits, plain(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["fp16", "int8"])
def test_a_model_in_half_precision(format, dtype):
    plain = build("llama").to(dtype)
    model, bank = _patch(plain, factors=format, form="factored")
    bank.add("a", draw(bank))
    x = prompts()
    with torch.no_grad():
        assert rel(model(x).logits, build("llama")(x).logits) > 0.1
        assert rel(model(x).logits, plain.float()(x).logits) < 6e-2
        assert model(x, experts="a").logits.dtype == dtype


def test_layers_give_what_their_columns_say():
    bank = patched(factors="int8", form="factored", rows=4, max_error=0.004)[2]
    bank.add("a", draw(bank))
    ids = bank.ids(["a", None, "a"])
    for layer, _ in bank.layers:
        x = torch.randn(3, 5, layer.in_features)
        with bank.use(ids):
            got = layer(x)
        want = svf_linear_ref(x.double(), layer.V, layer.U, layer.scale, ids, None, layer.bias)
        assert rel(got, want) < 1e-5
        assert layer.scale.shape[1] % 16 == 0
        assert layer.scale.shape[1] > layer.rank


@pytest.mark.parametrize(("family", "form"), [("llama", "factored"), ("llama", "delta"), ("mixtral", "delta")])
def test_training_on_int8_factors_gives_the_right_gradient(family, form):
    plain = build(family)
    model, bank = _patch(plain, factors="int8", form=form, max_error=0.006)
    start = draw(bank, 0.1)
    params = bank.start_training("a", init=start)
    x = prompts()

    def loss():
        return model(x, experts=["a", None, "a"]).logits.double().square().mean()

    loss().backward()
    grads = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    loss().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    # Along a random direction, in fp64 sums: the change of the loss is the product with the gradient.
    steps = [torch.randn_like(p) for p in params]
    slope = sum((g.double() * d).sum() for g, d in zip(grads, steps, strict=True))
    values, eps = [], 2e-3
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(params, steps, strict=True):
                p.add_(sign * eps * d)
            values.append(loss())
    assert ((values[0] - values[1]) / (2 * eps)).item() == pytest.approx(
        slope.item(), rel=2e-2, abs=1e-3 * abs(values[0].item())
    )
    # And it is near the gradient on exact factors.
    exact, exact_bank = _patch(plain, form=form)
    theirs = exact_bank.start_training("a", init=start)
    exact(x, experts=["a", None, "a"]).logits.double().square().mean().backward()
    assert rel(torch.cat([g.flatten() for g in grads]), torch.cat([p.grad.flatten() for p in theirs])) < 0.1
    with torch.no_grad():
        trained = model(x, experts="a").logits
    expert = bank.stop_training("a")
    with torch.no_grad():
        assert rel(model(x, experts="a").logits, trained) < 1e-5
    exact_bank.add("trained-on-int8", expert)
    with torch.no_grad():
        assert rel(model(x, experts="a").logits, exact(x, experts="trained-on-int8").logits) < LIMIT["int8"]


def test_only_the_factored_form_is_compensated():
    """The rows of the delta form leave components out that would have to make good what rounding did to others."""
    plain = build("llama")
    for form, compensate in (("factored", True), ("delta", False)):
        for layer, (name,) in _patch(plain, factors="int8", form=form)[1].layers:
            want = quantise(*svd(find_matrices(plain)[name].read()), compensate=compensate).factor
            assert torch.equal(layer.U, want.U)
            assert torch.equal(layer.V, want.V)


def test_sigmoid_training_on_int8_factors():
    _, model, bank = patched(factors="int8", form="factored")
    params = bank.start_training("a", "sigmoid")
    x = prompts()
    model(x, experts="a").logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in params)
    with torch.no_grad():
        assert rel(model(x, experts="a").logits, model(x).logits) < 0.2  # p is nearly uniform, which is the base model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixture_of_experts_stacks_in_int8(family):
    plain = build(family)
    model, bank = _patch(plain, factors="int8", form="delta", max_error=0.006)
    assert any(
        len(set(layer.source.reshape(-1, layer.scale.shape[-1])[0].tolist())) < layer.scale.shape[-1]
        for layer, _ in bank.layers
    )
    assert {layer.U.dtype for layer, _ in bank.layers} == {torch.int8}
    expert = draw(bank)
    bank.add("a", expert)
    x = prompts()
    with torch.no_grad():
        exact_bank = _patch(plain, form="delta")[1]
        exact_bank.add("a", expert)
        # Routers decide discretely, and near ties flip: what each slice adds is compared, not logits.
        for (layer, names), (theirs, _) in zip(bank.layers, exact_bank.layers, strict=True):
            if len(names) == 1:
                continue
            for e in range(len(names)):
                row = bank.ids("a")
                mine = (layer.U[e].float() * layer.scale[int(row), e]) @ layer.Vt[e].float()
                want = (theirs.U[e] * theirs.scale[int(exact_bank.ids("a")), e]) @ theirs.Vt[e]
                assert rel(mine, want) < 0.03
        assert not torch.equal(model(x, experts="a").logits, plain(x).logits)
        assert torch.equal(model(x, experts=None).logits, plain(x).logits)
        assert torch.equal(t2.unpatch_model(model)(x).logits, plain(x).logits)


def test_saving_dense_unpatch_and_merge(tmp_path):
    plain, model, bank = patched(factors="int8", form="factored")
    expert = draw(bank)
    bank.add("a", expert)
    x, want = prompts(), find_matrices(plain)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for n, m in want.items():
        layer = model.get_submodule(n)
        W = m.read()
        assert state[f"{n}.weight"].dtype == layer.weight.dtype == W.dtype
        assert rel(layer.weight, W) < 0.02
        assert torch.equal(state[f"{n}.weight"], layer.dense())
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    with torch.no_grad():
        served = model(x, experts="a").logits
        assert rel(again(x).logits, model(x).logits) < 1e-5
        merged = t2.unpatch_model(copy.deepcopy(model), "a")
        assert rel(merged(x).logits, served) < 1e-5
        assert rel(merged(x).logits, dense(plain, expert)(x).logits) < LIMIT["int8"]
        assert not any(isinstance(m, SVFLinear) for m in merged.modules())
        delta, other = _patch(plain, factors="int8", form="delta")
        other.add("a", expert)
        assert rel(t2.unpatch_model(copy.deepcopy(delta), "a")(x).logits, delta(x, experts="a").logits) < 1e-4
        assert torch.equal(t2.unpatch_model(delta)(x).logits, plain(x).logits)


@pytest.mark.parametrize("factors", ["int8", "fp16"])
def test_casting_a_model_leaves_its_factors_as_they_are(factors):
    _, model, bank = patched(factors=factors, form="factored")
    bank.add("a", draw(bank))
    x = prompts()
    with torch.no_grad():
        before = model(x, experts="a").logits
        kept = [{n: b.clone() for n, b in m.named_buffers()} for m in model.modules() if isinstance(m, FactoredLinear)]
        model.to(torch.bfloat16)
        for m, old in zip([m for m in model.modules() if isinstance(m, FactoredLinear)], kept, strict=True):
            assert m.dtype == m.weight.dtype == torch.bfloat16
            assert all(torch.equal(b, old[n]) and b.dtype == old[n].dtype for n, b in m.named_buffers())
        assert rel(model(x, experts="a").logits, before) < 5e-2
        bank.add("b", draw(bank))  # and its tables are still written in place
        model.float()
        assert rel(model(x, experts="a").logits, before) < 5e-2
        assert not torch.equal(model(x, experts="b").logits, model(x, experts="a").logits)
        fresh = copy.deepcopy(model)
        assert torch.equal(fresh(x, experts="a").logits, model(x, experts="a").logits)


def test_which_factors_are_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = build("llama")
    exact = decompose(plain)
    decompose(plain, out="int8", format="fp16")  # a directory of that name
    kinds = lambda **kw: {layer.U.dtype for layer, _ in _patch(plain, **kw)[1].layers}  # noqa: E731
    assert kinds(factors="int8") == {torch.int8}
    assert kinds(factors="./int8") == {torch.float32}  # floats are cast to the layer's dtype
    exact.to_format("int8", "eight")
    assert kinds(factors="eight") == kinds(factors=dict(exact.to_format("int8"))) == {torch.int8}
    assert kinds(factors="eight", rank=5, form="delta") == {torch.int8}
    assert all(isinstance(f, Int8Factor) for f in t2.Factors.load("eight").values())
    with pytest.raises(FileNotFoundError, match="no directory of factors at int4"):
        t2.patch_model(copy.deepcopy(plain), factors="int4")
    with pytest.raises(ValueError, match="limits what a format loses"):
        t2.patch_model(copy.deepcopy(plain), factors="eight", max_error=0.1)
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: int8 factors of this \[32, 32\] matrix reach"):
        t2.patch_model(model, factors="int8", max_error=1e-9)
    x = prompts()
    assert torch.equal(model(x).logits, plain(x).logits)
    with pytest.raises(ValueError, match="these factors are of other weights"):
        t2.patch_model(build("llama"), factors="eight")


def test_auto_counts_bytes():
    plain = build("llama").to(torch.bfloat16)
    forms = lambda **kw: {f for f, _ in _patch(plain, **kw)[1].plan.values()}  # noqa: E731
    assert forms(rank=4) == {"delta"}  # of 16 or 32: bf16 factored reads 1.5 times and more, delta at most 1.4 times
    assert forms(rank=4, factors="int8") == {"factored"}  # up to once
    bank = _patch(plain, factors="int8")[1]
    read = sum(layer.scale.shape[1] * (layer.in_features + layer.out_features) for layer, _ in bank.layers)
    dense = sum(2 * layer.in_features * layer.out_features for layer, _ in bank.layers)
    assert bank.describe().endswith(f"reads {read / dense:.2f}x the dense layers (factors in int8)")
