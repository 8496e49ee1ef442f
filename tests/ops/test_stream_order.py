"""No kernel reads factors before the kernel that wrote them has ended. A stand-in for a stream notes the order."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2
from t2kernels.layers import groups, linear
from t2kernels.ops.stream_order import capturing, finish
from tests.helpers.families import build

GPU = torch.device("cuda", 1)
WRITES = {"aten.cat.default", "aten._to_copy.default"}


class Order(TorchDispatchMode):
    """Notes what runs, in order: what a stream is given, and what is waited for."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def order(monkeypatch):
    order = Order()
    for module in (groups, linear):
        monkeypatch.setattr(module, "finish", lambda device: order.ran.append("finish"))
    return order


@pytest.mark.parametrize("form, rank", [("delta", 6), ("factored", None)])
def test_the_first_forward_after_a_move_waits_for_what_it_wrote(form, rank, order):
    model = build("llama")
    bank = t2.patch_model(model, form=form, rank=rank, rows=3)
    bank.add("a", bank.expert({n: torch.rand(k) for n, k in bank.matrices.items()}))
    model.double()  # the factors of a group no longer lie side by side
    order.ran.clear()
    ids = torch.randint(0, 60, (2, 3))
    with torch.no_grad(), order:
        model(ids, experts="a")
    assert order.ran.count("finish") == len({id(layer.group) for layer, _ in bank.layers if layer.group})
    for at, name in enumerate(order.ran):
        if name == "finish":
            since = max(i for i, n in enumerate(order.ran[:at]) if n == "aten.cat.default")
            assert not [n for n in order.ran[since:at] if n.startswith("t2kernels") or "mm" in n]  # no product between
    order.ran.clear()
    with torch.no_grad(), order:
        model(ids, experts="a")
    assert "finish" not in order.ran  # once a move


def test_a_move_of_a_layer_waits_for_it(order):
    model = build("llama")
    bank = t2.patch_model(model, rank=6, rows=3)
    order.ran.clear()
    with order:
        model.double()
    last = len(order.ran) - 1 - order.ran[::-1].index("finish")
    assert order.ran.count("finish") == len(bank.layers)
    assert any(n in WRITES for n in order.ran[:last])


def test_a_graph_that_is_recorded_gets_no_copy_of_factors(monkeypatch):
    """A copy in a graph would be empty before the first replay; the group computes one by one instead."""
    model = build("llama")
    bank = t2.patch_model(model, rank=6, rows=3)
    bank.add("a", bank.expert({n: torch.rand(k) for n, k in bank.matrices.items()}))
    ids = torch.randint(0, 60, (2, 3))
    model.double()
    with torch.no_grad():
        with monkeypatch.context() as recording:
            recording.setattr(groups, "capturing", lambda device: True)
            got = model(ids, experts="a").logits
        group = next(layer.group for layer, _ in bank.layers if layer.group)
        assert group._op is None
        want = model(ids, experts="a").logits
        assert group._op is not None
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_what_is_asked_of_torch(monkeypatch):
    asked = []
    stream = SimpleNamespace(synchronize=lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    finish(torch.device("cpu"))
    assert not asked
    finish(GPU)
    assert asked == [GPU, "synchronize"]
    assert capturing(GPU)
    assert not capturing(torch.device("cpu"))
