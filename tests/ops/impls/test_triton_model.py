"""A whole model on the Triton kernels, in their interpreter, as `auto` runs it on a GPU where they have been
checked."""

import pytest
import torch

import t2kernels as t2
from t2kernels.ops import dispatch
from t2kernels.ops.device import Device
from tests.helpers.families import build

CHECKED = Device("cpu", "a machine where Triton was checked", (("cuda", "not built"),), pair_tokens=16)

pytestmark = pytest.mark.skipif(
    dispatch.device_of(torch.device("cpu")).unsupported("triton") is not None, reason="no Triton interpreter here"
)


@pytest.fixture(params=[("delta", 6), ("factored", None)], ids=["delta", "factored"])
def model(request):
    form, rank = request.param
    made = build("llama")
    bank = t2.patch_model(made, form=form, rank=rank, rows=4)
    for name in "ab":
        bank.add(name, bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}))
    return made


def paths(monkeypatch):
    ran = []
    dispatch.planned.cache_clear()  # what was asked before would not be asked again
    monkeypatch.setattr(dispatch, "device_of", lambda device: CHECKED)
    real = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: ran.append(real(*a)) or ran[-1])
    return ran


@pytest.mark.parametrize("S", [4, 11])  # 12 and 33 tokens: the skinny pair, and matmuls around the row scaling
def test_a_mixed_batch_gives_what_torch_gives(model, S, monkeypatch):
    ids = torch.randint(0, 60, (3, S))
    with torch.no_grad():
        want = model(ids, experts=["a", None, "b"]).logits
        ran = paths(monkeypatch)
        got = model(ids, experts=["a", None, "b"]).logits
    assert {c.impl for c in ran} == {"triton"}
    assert {c.path for c in ran} == {"pair" if S == 4 else "mm"}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert {x.choice.path for x in t2.explain(model, ids, machine=CHECKED).lines} == {c.path for c in ran}


def test_training_gives_the_gradients_that_torch_gives(model, monkeypatch):
    bank = model.t2_bank
    parameters = bank.start_training("t")
    ids = torch.randint(0, 60, (3, 7))

    def gradients():
        model(ids, experts=["t", None, "t"]).logits.square().mean().backward()
        found = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    want = gradients()
    ran = paths(monkeypatch)
    got = gradients()
    assert {c.impl for c in ran} == {"triton"}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
