"""What `explain` says is what the op runs."""

import pytest
import torch

import t2kernels as t2
from t2kernels.factors.matrices import stored_bytes
from t2kernels.layers.linear import DeltaLinear
from t2kernels.ops import dispatch, plan
from t2kernels.ops.device import Device
from t2kernels.ops.impls import cpp_kernels
from t2kernels.ops.prepared import Prepared
from tests.helpers.families import build

PLAIN = Device("cpu", "CPU", (("cpp", "not built"), ("cuda", "not built"), ("triton", "needs a GPU")))
GPU = Device("cuda", "a GPU", (("cuda", "not built"),))


def test_every_matrix_is_in_it_and_the_bytes_are_counted():
    model = build("llama").bfloat16()
    bank = t2.patch_model(model, rank=4)
    found = t2.explain(model, 3, machine=PLAIN)
    assert sum(line.count * len(line.M) for line in found.lines) == len(bank.matrices)
    qkv, o = found.lines[:2]
    layers = [layer for layer, _ in bank.layers[:4]]
    assert (qkv.kind, qkv.form, qkv.N, qkv.C) == ("q_proj + k_proj + v_proj", "delta", layers[0].Vt.shape[1], (4, 4, 4))
    assert qkv.M == tuple(layer.U.shape[0] for layer in layers[:3])
    N, M = o.N, sum(o.M)
    assert o.dense == 2 * M * N + 2 * 3 * (M + N)
    assert o.moved == o.dense + 2 * 4 * (M + N) + 2 * 3 * (N + 2 * M) + 4 * 2 * 3 * 4
    N, M = qkv.N, sum(qkv.M)
    assert qkv.dense == 2 * M * N + 2 * 3 * (M + 3 * N)
    assert (
        qkv.moved == qkv.dense + 2 * 4 * (M + 3 * N) + 2 * 3 * (N + 2 * M) + 4 * 2 * 3 * 12
    )  # x is read once for the three
    assert found.moved == sum(x.count * x.moved for x in found.lines)
    text = str(found)
    assert "3 tokens" in text
    assert "q_proj" in text
    assert "torch mm" in text


def test_it_says_what_runs(monkeypatch):
    model = build("llama")
    bank = t2.patch_model(model, form="factored")
    bank.add("a", bank.expert({n: torch.rand(k) + 0.5 for n, k in bank.matrices.items()}))
    ran = []
    monkeypatch.setattr(dispatch, "plan", lambda *a, **k: ran.append(plan(*a, **k)) or ran[-1])
    few = "stream" if dispatch.device_of(torch.device("cpu")).isa.startswith("avx512") else "mm"
    for experts, S, path in (
        ("a", 150, "dense"),
        (["a", None], 150, "dense"),
        ("a", 10, few),
        (["a", None], 10, few),
    ):
        ids = torch.randint(0, 9, (2, S))
        ran.clear()
        said = t2.explain(model, ids, experts)
        with torch.no_grad():
            model(ids, experts=experts)
        assert [c.path for c in ran] == [path] * sum(x.count for x in said.lines)
        assert [x.choice.path for x in said.lines] == [path] * len(said.lines)


def test_another_machine_can_be_asked_about():
    model = build("llama")
    t2.patch_model(model, rank=4)
    assert {x.choice.impl for x in t2.explain(model, 4, machine=GPU).lines} == {"triton"}
    assert {x.choice.path for x in t2.explain(model, 4, machine=GPU).lines} == {"pair"}


def test_advice():
    model = build("llama")
    t2.patch_model(model, form="factored")
    assert "merges it" in str(t2.explain(model, 1, None))
    assert "form='delta'" in str(t2.explain(model, 1))
    t2.unpatch_model(model)
    t2.patch_model(model, rank=2)
    assert not t2.explain(model, 1).advice


def test_stacks_are_counted_as_they_are_kept():
    model = build("mixtral")
    bank = t2.patch_model(model)
    found = t2.explain(model, 5)
    assert sum(x.count * len(x.M) for x in found.lines) == len(bank.matrices)
    stack = next(x for x in found.lines if "gate_up_proj" in x.kind)
    assert stack.dense == 4 * stack.M[0] * stack.N + 4 * 5 * (stack.M[0] + stack.N)


def test_quantised_bases_are_counted_as_they_are_kept():
    q = pytest.importorskip("torchao.quantization")
    packed = torch.nn.Linear(64, 64)
    q.quantize_(packed, q.Int8WeightOnlyConfig())
    assert 64 * 64 < stored_bytes(packed.weight) < 64 * 64 * 2
    assert stored_bytes(torch.empty(3, 5, dtype=torch.bfloat16)) == 30


def test_bad_questions():
    model = build("llama")
    with pytest.raises(ValueError, match="patch_model"):
        t2.explain(model)
    t2.patch_model(model, rank=2)
    for batch in (0, True, "text", torch.zeros(3), {}):
        with pytest.raises(ValueError, match="number of tokens"):
            t2.explain(model, batch)
    with pytest.raises(ValueError, match="2 experts for 3 sequences"):
        t2.explain(model, torch.zeros(3, 4), ["a", "b"])


def calls(model, monkeypatch):
    """(members, whether y is the memory of the products) of each call of a forward; and the matrices called alone."""
    made, alone, add, add_to = [], [], Prepared.add, DeltaLinear.add_to

    def watched(op, x, ids, bases):
        ys = add(op, x, ids, bases)
        made.append((len(op.Us), all(y.data_ptr() == b.data_ptr() for y, b in zip(ys, bases, strict=True))))
        return ys

    with monkeypatch.context() as here, torch.no_grad():
        here.setattr(Prepared, "add", watched)
        here.setattr(DeltaLinear, "add_to", lambda layer, y, x: alone.append(layer.path) or add_to(layer, y, x))
        model(torch.randint(0, 9, (3, 1)), experts="a")
    return made, alone


def patched_with_an_expert(model):
    bank = t2.patch_model(model, form="delta", rank=4)
    bank.add("a", bank.expert({n: torch.rand(k) + 0.5 for n, k in bank.matrices.items()}))
    return bank


@pytest.mark.skipif(cpp_kernels.CPP.unsupported_device(torch.device("cpu")) is not None, reason="not built")
def test_it_says_in_how_many_calls(monkeypatch):
    model = build("llama")
    model.model.layers[0].self_attn.k_proj.forward = model.model.layers[0].self_attn.k_proj.forward  # as accelerate
    bank = patched_with_an_expert(model)
    said = t2.explain(model, 3)
    made, alone = calls(model, monkeypatch)
    assert sorted(made) == sorted((len(x.M), True) for x in said.lines if "call" in x.way for _ in range(x.count))
    (apart,) = [x for x in said.lines if x.way == "after each layer"]
    assert [path.rpartition(".")[2] for path in alone] == [apart.kind] == ["k_proj"]
    assert "the forward of a dense layer was replaced" in apart.why_way
    without = [x for x in said.lines if x.way == "one call, in place" and "alone: the forward" in x.why_way]
    assert [x.kind for x in without] in (["q_proj, v_proj"], ["q_proj", "v_proj"])
    assert "one call, in place: " in str(said)
    assert "after each layer: the forward" in str(said)
    bank.start_training("new")
    assert {x.way for x in t2.explain(model, 3).lines} == {"each matrix"}


def test_it_says_what_is_not_in_place(monkeypatch):
    monkeypatch.setattr(dispatch, "device_of", lambda device: PLAIN)
    model = build("llama")
    patched_with_an_expert(model)
    made, alone = calls(model, monkeypatch)
    assert {in_place for _, in_place in made} == {True}  # torch does it too, on a CPU
    assert not alone
    assert {x.way for x in t2.explain(model, 3).lines} == {"one call, in place"}
    assert {x.way for x in t2.explain(model, 3, machine=GPU).lines} == {"one call"}
    assert "triton writes y into a new tensor" in str(t2.explain(model, 3, machine=GPU))

    class Kept(torch.nn.Linear):
        pass

    other = build("llama")
    other.model.layers[0].mlp.down_proj.__class__ = Kept
    patched_with_an_expert(other)
    assert "a dense layer may keep what it returns" in str(t2.explain(other, 3))
    made, _ = calls(other, monkeypatch)
    assert (
        sorted(made) == [(1, True)] * 3 + [(2, True)] * 2 + [(3, True)] * 2
    )  # `add` was not asked for the other layer


def test_a_group_that_gave_up_and_forms_without_a_dense_layer(monkeypatch):
    model = build("llama")
    bank = patched_with_an_expert(model)
    bank.layers[0][0].group.wasted = 9
    apart = [x for x in t2.explain(model, 3).lines if "alone: the members got different inputs" in x.why_way]
    made, _ = calls(model, monkeypatch)
    assert sum(x.count for x in apart) == 3
    assert [members for members, _ in made] == [1, 1, 1, 1, 2, 1, 3, 1, 2, 1]
    for family, form, way in (("llama", "factored", "one call"), ("mixtral", "delta", "each matrix")):
        model = build(family)
        t2.patch_model(model, form=form)
        assert any(x.way == way and x.form == form for x in t2.explain(model, 3).lines)
