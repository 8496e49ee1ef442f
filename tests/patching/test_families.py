"""A mixed batch is what each expert's materialised weights give, row by row, for every model family, in both forms."""

import copy

import pytest
import torch

import t2kernels as t2
from t2kernels.factors.matrices import find_matrices
from tests.helpers.families import CONFIGS, DENSE_FAMILIES, MOE_FAMILIES, build


def materialise(model, expert, dtype=torch.float32):
    """A dense copy with W' = U diag(sigma z) Vᵀ, from a decomposition of its own: independent of the code tested."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, m in find_matrices(dense).items():
            stored = dense.get_parameter(m.tensor)
            W = m.orient(stored).double()
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            z = torch.ones_like(S)
            z[: len(expert.z[name])] = expert.z[name].double()
            new = (U * (S * z)) @ Vh
            target = stored if m.index is None else stored[m.index]
            target.copy_(new.t() if m.transposed else new)
    return to(dense, dtype)


def to(model, dtype):
    if dtype == torch.float64 and hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped matmul knows no fp64
    return model.to(dtype)


def draw(bank, size=0.4):
    return bank.expert({n: 1 + size * torch.randn(k) for n, k in bank.matrices.items()})


def rms(x):
    return x.double().square().mean().sqrt()


def typical(t):
    """The median over tokens: some norms of olmo2 amplify rounding tenfold, and one such token must not decide."""
    return t.double().pow(2).mean(-1).sqrt().median()


@pytest.mark.parametrize("form", ["factored", "delta"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_mixed_batch_equals_materialised_weights(family, form):
    plain = build(family)
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form="auto" if family in MOE_FAMILIES and form == "factored" else form, rows=4)
    experts = {"a": draw(bank), "b": draw(bank)}
    for name, e in experts.items():
        bank.add(name, e)
    x = torch.randint(3, 60, (3, 6))
    rows = ["a", None, "b"]
    dense = [plain if r is None else materialise(plain, experts[r]) for r in rows]

    with torch.no_grad():
        truth = torch.cat([to(copy.deepcopy(d), torch.float64)(x[i : i + 1]).logits for i, d in enumerate(dense)])
        eager = torch.cat([d(x[i : i + 1]).logits for i, d in enumerate(dense)])
        mixed = model(x, experts=rows).logits
        alone = torch.cat([model(x[i : i + 1], experts=[r]).logits for i, r in enumerate(rows)])
        base = plain(x).logits
        unrouted = model(x).logits
    moved = rms(mixed - base)
    for got in (mixed, alone):
        # The weights of a materialised model are themselves rounded once: that is eager's own error here.
        assert typical(got - truth) <= 2 * typical(eager - truth) + 2e-7 * rms(truth)
        assert rms(got - truth) < 1e-3 * moved  # and nothing beside what the experts do
    for i, r in enumerate(rows):
        if r is not None:
            assert rms(mixed[i] - base[i]) > 0.05 * rms(base[i])  # the experts differ from the base, and visibly
    if bank.plan and {f for f, _ in bank.plan.values()} == {"delta"}:
        assert torch.equal(unrouted, base)
    else:
        assert rms(unrouted - base) <= 2 * rms(eager - truth) + 2e-7 * rms(truth)

    together = model.generate(x, experts=rows, max_new_tokens=5, do_sample=False)
    for i, d in enumerate(dense):
        assert torch.equal(together[i : i + 1], d.generate(x[i : i + 1], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["factored", "delta"])
def test_unpatch_gives_the_base_or_the_expert(family, form):
    plain = build(family)
    x = torch.randint(3, 60, (2, 5))
    form = "auto" if family in MOE_FAMILIES and form == "factored" else form
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form=form)
    expert = draw(bank)
    bank.add("a", expert)
    merged, back = copy.deepcopy(model), model
    assert t2.unpatch_model(back) is back
    t2.unpatch_model(merged, expert="a")
    with torch.no_grad():
        want, got = materialise(plain, expert)(x).logits, merged(x).logits
        assert rms(got - want) < 1e-5 * rms(want)
        if form == "delta":
            assert torch.equal(back(x).logits, plain(x).logits)
            assert all(
                torch.equal(a, b) for a, b in zip(back.state_dict().values(), plain.state_dict().values(), strict=True)
            )
        else:
            assert rms(back(x).logits - plain(x).logits) < 1e-5 * rms(plain(x).logits)
    for m in (merged, back):
        assert type(m) is type(plain)
        assert m.state_dict().keys() == plain.state_dict().keys()
        assert [type(a) for a in m.modules()] == [type(a) for a in plain.modules()]
        assert not hasattr(m, "t2_bank")
        with pytest.raises((TypeError, ValueError)):
            m.generate(x, experts=["a", None])
    t2.patch_model(back)  # and it can be patched again


def test_experts_that_are_one_outside_the_support_are_exact_in_delta_form():
    for family in ("llama", "gpt2", "qwen3_moe"):
        plain = build(family)
        model = copy.deepcopy(plain)
        bank = t2.patch_model(model, rank=0.25, form="delta")
        full = {n: m.rank for n, m in find_matrices(plain).items()}
        assert bank.matrices == {n: max(1, int(0.25 * r)) for n, r in full.items()}
        expert = t2.Expert({n: 1 + 0.5 * torch.randn(k) for n, k in bank.matrices.items()})
        bank.add("a", expert)
        x = torch.randint(3, 60, (2, 5))
        with torch.no_grad():
            want, got = materialise(plain, expert)(x).logits, model(x, experts="a").logits
        assert rms(got - want) < 1e-5 * rms(want)


def test_dense_families_are_at_least_twelve():
    assert len(DENSE_FAMILIES) >= 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["factored", "delta"])
def test_low_precision_is_as_exact_as_eager(dtype, form):
    plain = build("llama")
    for p in plain.parameters():
        p.data = p.data.to(dtype).float()  # one truth for both: the rounded weights
    model = copy.deepcopy(plain).to(dtype)
    bank = t2.patch_model(model, form=form)
    expert = draw(bank, 0.2)
    bank.add("a", expert)
    x = torch.randint(3, 60, (8, 12))
    with torch.no_grad():
        truth = materialise(plain, expert, torch.float64)(x).logits
        eager = materialise(plain, expert, dtype)(x).logits
        got = model(x, experts="a").logits
        base = copy.deepcopy(plain).to(dtype)(x).logits
        unrouted = model(x).logits
    assert got.dtype == dtype
    assert rms(got - truth) <= 2 * rms(eager - truth)
    if form == "delta":
        assert torch.equal(unrouted, base)
