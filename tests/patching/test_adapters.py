"""LoRA adapters of PEFT on the same model: no write is lost, and matrices keep the names of the base model."""

import copy

import pytest
import torch

import t2kernels as t2
from tests.helpers.families import build

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def with_lora(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def random_expert(bank):
    return bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()})


@pytest.mark.parametrize("form", ["auto", "delta"])
@pytest.mark.parametrize("what", ["whole", "inner"])
def test_a_merged_adapter_is_in_the_model(form, what):
    torch.manual_seed(0)
    lora, x = with_lora(build("llama")), torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        want, base = lora(x).logits, lora.get_base_model()
        with lora.disable_adapter():
            plain = lora(x).logits
        assert not torch.allclose(want, plain, atol=1e-2)
        bank = t2.patch_model(lora if what == "whole" else base, form=form)
        adapted = [n for n in bank.matrices if n.endswith(("q_proj", "down_proj"))]
        assert {bank.plan[n][0] for n in adapted} == {"delta"}
        torch.testing.assert_close(lora(x).logits, want, **CLOSE)
        lora.merge_adapter()
        torch.testing.assert_close(lora(x).logits, want, **CLOSE)
        lora.unmerge_adapter()
        torch.testing.assert_close(lora(x).logits, want, **CLOSE)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, want, **CLOSE)


def test_factored_form_is_refused_beneath_an_adapter():
    with pytest.raises(ValueError, match=r"q_proj carries another adapter.*form='delta'"):
        t2.patch_model(with_lora(build("llama")), form="factored")


def test_experts_of_the_base_fit_a_model_with_an_adapter_and_the_other_way_round():
    torch.manual_seed(0)
    base, x = build("llama"), torch.randint(3, 60, (2, 6))
    lora = with_lora(copy.deepcopy(base))
    bank, other = t2.patch_model(base, form="delta"), t2.patch_model(lora, form="delta")
    assert list(bank.matrices) == list(other.matrices)
    bank.add("a", random_expert(bank))
    other.add("a", bank["a"])
    other.add("b", random_expert(other))
    bank.add("b", other["b"])
    with torch.no_grad(), lora.disable_adapter():
        for name in ("a", "b"):
            torch.testing.assert_close(lora(x, experts=name).logits, base(x, experts=name).logits, **CLOSE)
            with other.use(name):
                torch.testing.assert_close(lora(x).logits, base(x, experts=name).logits, **CLOSE)
    with torch.no_grad():
        mixed = lora(x, experts=["a", None]).logits
        torch.testing.assert_close(mixed[:1], lora(x[:1], experts="a").logits, **CLOSE)
        torch.testing.assert_close(mixed[1:], lora(x[1:]).logits, **CLOSE)


WRITES = {
    "add": lambda layer: layer.weight.data.add_(1),
    "add without gradients": lambda layer: layer.weight.add_(1),
    "augmented data": lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    "copy": lambda layer: layer.weight.copy_(torch.ones_like(layer.weight)),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "a view": lambda layer: layer.weight[0].mul_(2),
    "a transposed view": lambda layer: layer.weight.t().zero_(),
    "init": lambda layer: torch.nn.init.normal_(layer.weight),
    "out": lambda layer: torch.add(torch.ones_like(layer.weight), 1, out=layer.weight),
    "setting data": lambda layer: setattr(layer.weight, "data", torch.ones_like(layer.weight)),
    "detach": lambda layer: layer.weight.detach().add_(1),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
    "a new parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.ones_like(layer.weight))),
    "a registered parameter": lambda layer: layer.register_parameter("weight", torch.nn.Parameter(torch.ones(3))),
    "requiring gradients": lambda layer: layer.weight.requires_grad_(True),
    "weight norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "pruning": lambda layer: __import__("torch.nn.utils.prune").nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "numpy": lambda layer: layer.weight.numpy().__setitem__(0, 1.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_write_to_a_factored_weight_vanishes(write):
    model = build("llama")
    t2.patch_model(model, form="factored")
    layer, x = model.model.layers[0].mlp.up_proj, torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        before, weight = model(x).logits, layer.weight.clone()
        with pytest.raises((RuntimeError, ValueError, AttributeError, KeyError, TypeError)):
            write(layer)
        assert torch.equal(model(x).logits, before)
        assert torch.equal(layer.weight.clone(), weight)


def test_a_factored_weight_can_be_read():
    torch.manual_seed(0)
    model = build("llama")
    dense = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    t2.patch_model(model, form="factored")
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight.clone(), dense, **CLOSE)
    assert type(weight + 1) is torch.Tensor
    assert weight.shape == dense.shape
    assert weight.dtype == dense.dtype
    assert weight.device == dense.device
    torch.testing.assert_close(copy.deepcopy(weight).mul_(2), 2 * dense, **CLOSE)
    torch.testing.assert_close(torch.nn.functional.linear(torch.eye(dense.shape[1]), weight).t(), dense, **CLOSE)
    torch.testing.assert_close(weight.to(torch.float64), dense.double(), **CLOSE)
    torch.testing.assert_close(model.state_dict()["model.layers.0.mlp.up_proj.weight"], dense, **CLOSE)
