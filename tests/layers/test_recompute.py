"""Whatever computes a block again in the backward pass does so with the experts of its forward."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import t2kernels as t2
from t2kernels.layers.routing.scopes import AmbiguousScopeError
from tests.helpers.families import build


@pytest.fixture(params=["factored", "delta"])
def world(request):
    model = build("llama")
    bank = t2.patch_model(model, form=request.param, rows=8)
    bank.add("a", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    for name in "tu":
        bank.start_training(name)
        with torch.no_grad():
            for p in bank.trained_parameters(name).values():
                p.normal_(std=0.3)
    return model.train(), bank, torch.randint(3, 60, (4, 6))


def wrapped(model, kind):
    """A copy of the model whose blocks (or attention and MLP) are computed again, in the given way."""
    model = copy.deepcopy(model)
    block = type(model.model.layers[0])
    parts = type(model.model.layers[0].mlp), type(model.model.layers[0].self_attn)
    if kind in ("block", "part"):
        wanted = (block,) if kind == "block" else parts
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, wanted)
        )
    elif kind == "nested":
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, parts)
        )
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, block)
        )
    else:
        if kind == "reentrant":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    return model


def parameters(model):
    bank = model.t2_bank
    return [p for n in bank.in_training for p in bank.trained_parameters(n).values()]


def two_forwards(model, x, backward=lambda loss: loss.backward()):
    """A policy and a reference in one loss, with other experts in between and none any more at the time of backward."""
    bank = model.t2_bank
    with bank.use("t"):
        policy = model(x).logits
    reference = model(x, experts=["a", "u", None, "t"]).logits
    with bank.use("a"):
        model(x)
        backward(policy.square().mean() + (policy - reference).square().mean())
    return [p.grad.clone() for p in parameters(model)]


@pytest.mark.parametrize("kind", [None, "block", "part", "nested", "transformers", "reentrant"])
def test_one_step_of_autograd_gives_the_gradients_of_separate_ops(kind, monkeypatch):
    """In fp64, several experts in a batch: `ops.joint` against the way that it replaces."""
    model = build("llama")
    bank = t2.patch_model(model.double(), form="delta", rows=8)
    bank.add("a", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    for name in "tu":
        bank.start_training(name)
        for p in bank.trained_parameters(name).values():
            p.data.normal_(std=0.3)
    x = torch.randint(3, 60, (4, 6))
    model = model.train() if kind is None else wrapped(model.train(), kind)
    joint = copy.deepcopy(model)
    got = two_forwards(joint, x)
    assert all(layer.group.hits > 0 for layer, _ in joint.t2_bank.layers if layer.group)
    monkeypatch.setattr("t2kernels.layers.groups.can_join", lambda *args: False)
    want = two_forwards(model, x)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # gradients of p are in fp32


@pytest.mark.parametrize("kind", ["block", "part", "nested", "transformers", "reentrant"])
def test_gradients_are_those_without_checkpointing(world, kind):
    model, _, x = world
    want = two_forwards(copy.deepcopy(model), x)
    assert all(g.abs().max() > 0 for g in want)

    def elsewhere(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    for backward in (lambda loss: loss.backward(), elsewhere):
        for got, w in zip(two_forwards(wrapped(model, kind), x, backward), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_input_through_an_expert_at_rest():
    model = build("llama")
    bank = t2.patch_model(model, form="delta")
    bank.add("a", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    model.requires_grad_(False).train()
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)

    def gradient(model):
        x.grad = None
        with model.t2_bank.use("a"):
            loss = model(inputs_embeds=x).logits.square().mean()
        loss.backward()
        return x.grad.clone()

    torch.testing.assert_close(gradient(wrapped(model, "block")), gradient(model), rtol=1e-4, atol=1e-7)


def test_two_backward_passes_through_one_forward(world):
    model, _, x = world
    model = wrapped(model, "block")
    loss = model(x, experts="t").logits.square().mean()
    parts = parameters(model)
    grads = [torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True) for _ in range(2)]
    for one, two in zip(*grads, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def test_a_block_outside_of_the_model_is_refused(world):
    model, bank, _ = world
    block = model.model.layers[0].mlp
    h = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    with bank.use("t"):
        y = checkpoint(block, h, use_reentrant=False)
    with pytest.raises(AmbiguousScopeError, match="did not go through the patched model"):
        y.sum().backward()


def test_a_base_model_is_not_asked(world):
    model = build("llama")
    t2.patch_model(model, form="delta")
    block = model.model.layers[0].mlp
    h = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    checkpoint(block, h, use_reentrant=False).sum().backward()
    got = h.grad.clone()
    h.grad = None
    block(h).sum().backward()
    assert torch.equal(got, h.grad)
    assert isinstance(block, nn.Module)


def test_nothing_is_kept_after_a_backward_pass(world):
    model, bank, x = world
    model(x, experts="t").logits.square().mean().backward()
    assert not bank.routing.recomputation.running
