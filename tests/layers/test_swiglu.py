"""The MLP's activation inside the kernel: only for the formula, only if the planner picks it, with the same answers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels.layers import swiglu
from t2kernels.layers.swiglu import FusedMLP
from t2kernels.ops import dispatch
from t2kernels.ops.device import Device
from tests.helpers.families import build

CHECKED = Device("cpu", "a machine where Triton was checked", (("cuda", "not built"),), pair_tokens=16)
FORMS = [("delta", 6), ("factored", None)]
needs_triton = pytest.mark.skipif(
    dispatch.device_of(torch.device("cpu")).unsupported("triton") is not None, reason="no Triton interpreter here"
)


def patched(family="llama", form="delta", rank=6):
    model = build(family)
    bank = t2.patch_model(model, form=form, rank=rank, rows=4)
    for name in "ab":
        bank.add(name, bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}))
    return model


def fused(model):
    return [m for m in model.modules() if isinstance(m, FusedMLP)]


@pytest.fixture
def launches(monkeypatch):
    """Triton is trusted, and what the fused kernel is called with is kept."""
    launch = pytest.importorskip("t2kernels.ops.impls.triton.launch_pair")
    ran, real = [], launch.forward_swiglu
    monkeypatch.setattr(dispatch, "device_of", lambda device: CHECKED)
    monkeypatch.setattr(launch, "forward_swiglu", lambda *a: ran.append(a) or real(*a))
    return ran


@pytest.mark.parametrize("form, rank", FORMS)
def test_which_models(form, rank):
    for family, count in (
        ("llama", 2),
        ("qwen3", 2),
        ("stablelm", 2),
        ("gemma2", 0),
        ("opt", 0),
        ("phi3", 0),
    ):  # gemma's activation is GELU
        model = patched(family, form, rank)
        assert len(fused(model)) == count, family
        t2.unpatch_model(model)
        assert not fused(model)


def test_a_forward_that_is_another_formula_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                nn.Linear(16, 24),
                nn.Linear(16, 24),
                nn.Linear(24, 16),
                nn.SiLU(),
            )

        def forward(self, x):
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.ModuleDict({"layers": nn.ModuleList([Twice()])})
    t2.patch_model(model, rank=4)
    assert not fused(model)


@needs_triton
@pytest.mark.parametrize("form, rank", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_same_answers(family, form, rank, launches):
    model = patched(family, form, rank)
    ids = torch.randint(0, 60, (3, 4))
    with torch.no_grad():
        got = model(ids, experts=["a", None, "b"]).logits
        assert len(launches) == 2
        swiglu.remove(model)
        want = model(ids, experts=["a", None, "b"]).logits
        assert len(launches) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, model(ids).logits)


@needs_triton
@pytest.mark.parametrize("form, rank", FORMS)
def test_where_it_does_not_run(form, rank, launches):
    model = patched(form=form, rank=rank)
    ids = torch.randint(0, 60, (3, 4))
    model(ids, experts="a")  # gradients
    with torch.no_grad():
        model(torch.randint(0, 60, (3, 9)), experts="a")  # more tokens than the skinny kernels take
        seen = []
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: seen.append(y))
        model(ids, experts="a")
        assert len(launches) == 1  # the other block's: whoever hooks into up_proj sees its output
        assert len(seen) == 1
        handle.remove()
        model(ids, experts="a")
        assert len(launches) == 3


def test_auto_on_this_machine_is_the_modules_own_forward():
    model = patched()
    plain = copy.deepcopy(model)
    swiglu.remove(plain)
    ids = torch.randint(0, 60, (3, 4))
    with torch.no_grad():
        assert torch.equal(model(ids, experts="a").logits, plain(ids, experts="a").logits)


@needs_triton
def test_copied_and_pickled(launches):
    model = patched()
    ids = torch.randint(0, 60, (2, 4))
    with torch.no_grad():
        want = model(ids, experts="a").logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(fused(other)) == 2
            other.t2_bank.add("c", other.t2_bank["b"])  # a pickled table is in pieces until a row of it is written
            launches.clear()
            torch.testing.assert_close(other(ids, experts="a").logits, want, rtol=1e-4, atol=1e-4)
            assert len(launches) == 2


def test_installing_twice_is_installing_once():
    model = patched()
    assert not swiglu.install(model)
    swiglu.remove(model)
    assert not fused(model)
