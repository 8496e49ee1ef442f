"""Layers that read the same input, computed together: the answers are as alone, and from the very input."""

import copy
import pickle

import pytest
import torch

import t2kernels as t2
from t2kernels.layers.groups import Group
from t2kernels.ops.prepared import Prepared
from tests.helpers.families import build

FORMS = [("delta", 6), ("factored", None)]


def patched(family="llama", form="delta", rank=6, **changes):
    model = build(family, **changes)
    bank = t2.patch_model(model, form=form, rank=rank, rows=5)
    for name in "ab":
        bank.add(name, bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}))
    for group in groups(bank):
        group.hits = 0  # patching tried an MLP
    return model, bank


def groups(bank):
    return list({id(layer.group): layer.group for layer, _ in bank.layers if layer.group}.values())


def alone(bank):
    for layer, _ in bank.layers:
        layer.group = None


def hits(bank):
    return [g.hits for g in groups(bank)]


@pytest.mark.parametrize("form, rank", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "mixtral"])
def test_together_as_alone(family, form, rank):
    if family == "mixtral" and form == "factored":
        form, rank = "auto", None  # its stacks are in delta form, its attention is not
    model, bank = patched(family, form, rank)
    model.double()
    ids = torch.randint(0, 60, (3, 7))
    with torch.no_grad():
        got = model(ids, experts=["a", None, "b"]).logits
        assert hits(bank) == [len(g.layers) - 1 for g in groups(bank)]  # each member but the first found its part ready
        assert groups(bank)
        alone(bank)
        want = model(ids, experts=["a", None, "b"]).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_who_belongs_together():
    for family, sizes in (("llama", [3, 2]), ("opt", [3]), ("gpt2", []), ("phi3", [])):
        _, bank = patched(family)
        assert [len(g.layers) for g in groups(bank)] == sizes * 2, family  # two blocks


@pytest.mark.parametrize("form, rank", FORMS)
def test_only_the_same_unchanged_input_under_the_same_route(form, rank):
    model, bank = patched(form=form, rank=rank)
    attention = model.model.layers[0].self_attn
    q, k, group = attention.q_proj, attention.k_proj, bank.layers[0][0].group
    x = torch.randn(2, 4, 32)
    with torch.no_grad(), bank.use("a"):
        q(x)
        want_other = _alone(k, x + 1, bank)
        torch.testing.assert_close(k(x + 1), want_other)  # another tensor
        q(x)
        x.add_(1)
        torch.testing.assert_close(k(x), want_other)  # the same, changed in place
        assert group.hits == 0
        group.wasted = 0  # or it would give up by now
        x = torch.randn(2, 4, 32)
        q(x)
        with bank.use("b"):
            torch.testing.assert_close(k(x), _alone(k, x, bank))  # another route
        assert group.hits == 0
        want_other = _alone(k, x, bank)
        first = k(x)
        assert group.hits == 1
        k(x)  # what was kept is given once
        assert group.hits == 1
        torch.testing.assert_close(first, want_other)


def _alone(module, x, bank):
    layer = getattr(module, "svf", module)
    kept, layer.group = layer.group, None
    try:
        return module(x)
    finally:
        layer.group = kept


@pytest.mark.parametrize("form, rank", FORMS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_is_shared_with_and_without_gradients(form, rank, context):
    model, bank = patched(form=form, rank=rank)
    model.double()
    ids = torch.randint(0, 60, (2, 5))
    once = [len(g.layers) - 1 for g in groups(bank)]
    model(ids, experts=["a", "b"])
    assert not any(hits(bank))  # nothing wants a gradient
    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=leaf, experts=["a", "b"])
    assert hits(bank) == (once if form == "delta" else [0] * len(once))  # delta form alone shares under autograd
    with context():
        got = model(ids, experts=["a", "b"]).logits
        base = model(ids).logits
        # the base model adds nothing in delta
        assert hits(bank) == [2 * n for n in once]
        alone(bank)
        torch.testing.assert_close(got, model(ids, experts=["a", "b"]).logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(base, model(ids).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, base)


@pytest.mark.parametrize("form, rank", FORMS)
def test_a_model_that_was_moved_under_inference_mode_can_still_be_trained(form, rank):
    model, bank = patched(form=form, rank=rank)
    ids = torch.randint(0, 60, (2, 5))
    model.double()  # the factors are in pieces until the next forward
    with torch.inference_mode():
        model(ids, experts="a")
    assert all(hits(bank))
    parameters = bank.start_training("t")
    model(ids, experts="t").logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in parameters)


@pytest.mark.parametrize("form, rank", FORMS)
def test_experts_may_change_between_forwards(form, rank):
    model, bank = patched(form=form, rank=rank)
    model.double()
    ids = torch.randint(0, 60, (2, 5))
    parameters = bank.start_training("t")
    with torch.no_grad():
        before = model(ids, experts="t").logits
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.3)
        after = model(ids, experts="t").logits
        bank.add("a", bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}), replace=True)
        replaced = model(ids, experts="a").logits
        assert all(hits(bank))
        alone(bank)
        torch.testing.assert_close(after, model(ids, experts="t").logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(replaced, model(ids, experts="a").logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: copy.deepcopy(m.double()), lambda m: pickle.loads(pickle.dumps(m.double()))],
)
@pytest.mark.parametrize("form, rank", FORMS)
def test_after_moving_copying_and_pickling(form, rank, change):
    model, _ = patched(form=form, rank=rank)
    ids = torch.randint(0, 60, (2, 5))
    with torch.no_grad():
        model(ids, experts="a")
        model = change(model)
        bank = model.t2_bank
        assert all(layer in layer.group.layers for layer, _ in bank.layers if layer.group)
        bank.add("c", bank["b"])  # a pickled table is in pieces until a row of it is written
        before = hits(bank)
        got = model(ids, experts=["a", "c"]).logits
        assert [a - b for a, b in zip(hits(bank), before, strict=True)] == [len(g.layers) - 1 for g in groups(bank)]
        alone(bank)
        torch.testing.assert_close(got, model(ids, experts=["a", "b"]).logits, rtol=1e-10, atol=1e-10)


def test_a_wrong_guess_gives_up_and_is_right_before_and_after():
    _, bank = patched()
    layers = [layer for layer, _ in bank.layers[:3]]
    group = layers[0].group
    with torch.no_grad(), bank.use("a"):
        for _ in range(8):
            for layer in layers:  # as in attention to another sequence: each reads its own input
                x, y = torch.randn(3, 32), torch.randn(3, layer.U.shape[0])
                got = layer.add_to(y, x)
                layer.group = None
                torch.testing.assert_close(got, layer.add_to(y, x))
                layer.group = group
    assert group.hits == 0
    assert group.wasted == 4  # then it stopped trying


def test_what_was_made_does_not_outlive_its_forward():
    _, bank = patched()
    layer = bank.layers[0][0]
    with torch.no_grad(), bank.use("a"):
        layer.add_to(torch.randn(3, layer.U.shape[0]), torch.randn(3, 32))
        assert layer.group in bank.routing.active.cache
    assert not layer.group._base_cache


def test_layers_on_several_devices_or_of_several_dtypes_stay_alone():
    _, bank = patched()
    layers = [layer for layer, _ in bank.layers[:3]]
    layers[1].Vt = layers[1].Vt.double()
    assert Group(layers).tensors() is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_compiled_model_has_one_op_a_group(context):
    model, bank = patched()
    ids, rows, ops = torch.randint(0, 60, (2, 5)), bank.ids(["a", None]), []

    def backend(graph, inputs):
        called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        ops.extend(target for target in called if "t2kernels" in str(target))
        return graph.forward

    torch._dynamo.reset()
    with context():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(ids, expert_ids=rows).logits, model(ids, expert_ids=rows).logits)
        assert len(ops) == 8  # two blocks of q k v, o, gate up, down
        swapped = bank.ids(["b", "a"])
        torch.testing.assert_close(compiled(ids, expert_ids=swapped).logits, model(ids, expert_ids=swapped).logits)
        assert len(ops) == 8
    assert not any(layer.group._traced for layer, _ in bank.layers if layer.group)
    torch._dynamo.reset()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_decoding_step_makes_one_call_a_group(context, monkeypatch):
    model, _ = patched()
    calls, add = [], Prepared.add
    monkeypatch.setattr(Prepared, "add", lambda op, *rest: calls.append(len(op.Us)) or add(op, *rest))
    with context():
        model(torch.randint(0, 60, (3, 1)), experts=["a", None, "b"])
    assert calls == [3, 1, 2, 1] * 2


def test_a_dense_layer_whose_output_is_another_tensor_is_not_written_into():
    class Slice(torch.nn.Linear):
        def forward(self, x):
            return x[..., :16]

    model = build("llama")
    model.model.layers[0].self_attn.k_proj.__class__ = Slice
    bank = t2.patch_model(model, form="delta", rank=6)
    bank.add("a", bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}))
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 4, 32)
    with torch.no_grad(), bank.use("a"):
        kept = x.clone()
        attention.q_proj(x)
        y = attention.k_proj(x)
        assert torch.equal(x, kept)
        torch.testing.assert_close(y, _alone(attention.k_proj, x, bank))


def test_a_layer_that_was_dispatched_after_patching_can_be_unpatched():
    model, _ = patched()
    ids = torch.randint(0, 60, (2, 5))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        want, base = model(ids, experts="a").logits, model(ids).logits
        layer._old_forward = layer.forward  # as accelerate does
        layer.forward = lambda x: layer._old_forward(x)
        torch.testing.assert_close(model(ids, experts="a").logits, want)
        t2.unpatch_model(model)
        assert torch.equal(model(ids).logits, base)
    assert type(layer) is torch.nn.Linear
