"""LoRA adapters of PEFT on the same model: no write is lost, and matrices keep the names of the base model."""

import copy

import numpy as np
import pytest
import torch

import t2kernels as t2
from t2kernels.layers.dense.readonly import ReadOnlyWeightError
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_served_through_the_wrapper_and_without_it(family):
    torch.manual_seed(0)
    x, names = torch.randint(3, 60, (2, 6)), {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    lora = peft.get_peft_model(build(family), config).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = lora(input_ids=x).logits
        bank = t2.patch_model(lora)
        bank.add("a", random_expert(bank))
        want = lora(input_ids=x, experts="a").logits
        assert not torch.allclose(want, plain, atol=1e-2)
        text = lora.generate(input_ids=x, experts=["a", None], **options)
        for i, name in enumerate(["a", None]):
            assert torch.equal(text[i : i + 1], lora.generate(input_ids=x[i : i + 1], experts=name, **options))
        assert "delta" in str(t2.explain(lora, 4))
        merged = lora.merge_and_unload()
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(merged(x).logits, plain, **close)
        torch.testing.assert_close(merged(x, experts="a").logits, want, **close)
        assert torch.equal(merged.generate(x, experts=["a", None], **options), text)
        t2.unpatch_model(merged, expert="a")
        torch.testing.assert_close(merged(x).logits, want, **close)
        assert not hasattr(merged, "t2_bank")


def test_a_wrapped_model_is_unpatched_whole():
    torch.manual_seed(0)
    lora, x = with_lora(build("llama")), torch.randint(3, 60, (2, 6))
    base = lora.get_base_model()
    with torch.no_grad():
        plain, before = lora(x).logits, [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lora.modules()]
        t2.patch_model(lora)
        t2.unpatch_model(base)
        torch.testing.assert_close(lora(x).logits, plain, **CLOSE)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lora.modules()] == before
    assert not hasattr(lora, "t2_bank")
    t2.patch_model(lora)


def test_layers_that_peft_trains_whole_are_left_out():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"], init_lora_weights=False)
    lora, x = peft.get_peft_model(build("llama"), config), torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
        want = lora(x).logits
        bank = t2.patch_model(lora)
        assert {n.rpartition(".")[2] for n in bank.matrices} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
        }
        torch.testing.assert_close(lora(x).logits, want, **CLOSE)
        torch.testing.assert_close(lora.merge_and_unload()(x).logits, want, **CLOSE)


def test_a_new_bias_of_a_factored_layer_stays():
    model, x = build("qwen2"), torch.randint(3, 60, (2, 6))
    t2.patch_model(model, form="factored")
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.ones_like(layer.bias))
    with torch.no_grad():
        want = model(x).logits
        t2.unpatch_model(model)
        torch.testing.assert_close(model(x).logits, want, **CLOSE)


SENTENCES = {
    "a parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.ones(2))),
    "a tensor": lambda layer: setattr(layer, "weight", torch.ones(2)),
    "deleting": lambda layer: delattr(layer, "weight"),
    "a buffer": lambda layer: layer.register_buffer("weight", torch.ones(2)),
    "pruning": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "old weight norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "the dictionary": lambda layer: layer._parameters.update(weight=torch.nn.Parameter(torch.ones(2))),
    "its default": lambda layer: layer._parameters.setdefault("weight", torch.nn.Parameter(torch.ones(2))),
    "its union": lambda layer: layer._parameters.__ior__({"weight": torch.nn.Parameter(torch.ones(2))}),
    "a gradient": lambda layer: setattr(layer.weight, "grad", torch.ones(layer.weight.shape)),
    "dlpack": lambda layer: torch.from_dlpack(layer.weight).zero_(),
    "a state dict": lambda layer: layer.state_dict()["weight"].zero_(),
    "functional_call": lambda layer: torch.func.functional_call(layer, {"weight": torch.ones(2)}, torch.ones(1, 32)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", SENTENCES.values(), ids=SENTENCES)
def test_a_write_to_a_factored_weight_is_refused_in_one_sentence(write):

    model = build("llama")
    t2.patch_model(model, form="factored")
    with pytest.raises(ReadOnlyWeightError, match=r"unpatch_model\(model\) first"):
        write(model.model.layers[0].mlp.up_proj)


def test_a_factored_weight_is_not_swapped():
    model = build("llama")
    t2.patch_model(model, form="factored")
    weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="weakref"):  # torch's own check
        torch.utils.swap_tensors(weight, torch.ones(weight.shape))


def test_a_factored_weight_is_read_by_numpy():
    model = build("llama")
    t2.patch_model(model, form="factored")
    weight = model.model.layers[0].mlp.up_proj.weight
    for array in (np.asarray(weight), weight.numpy()):
        assert np.array_equal(array, weight.clone().numpy())
        assert not array.flags.writeable


def test_lora_trains_and_merges_over_delta_form():
    """PEFT's adapter and an expert learn at once, each gets its gradient, and the merge keeps both."""
    torch.manual_seed(0)
    model, x = build("llama"), torch.randint(3, 60, (4, 6))
    bank = t2.patch_model(model, form="delta")
    bank.add("a", random_expert(bank))
    names = list(bank.matrices)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    lora = peft.get_peft_model(model, config)
    assert list(bank.matrices) == names
    z = bank.start_training("new")
    trained = [p for n, p in lora.named_parameters() if "lora_" in n]
    optimizer = torch.optim.SGD([*trained, *z], lr=0.5)
    before = lora(x, experts="new").logits.detach()
    losses = []
    for _ in range(4):
        loss = lora(x, experts="new").logits.square().mean()
        loss.backward()
        assert all(p.grad is not None for p in [*trained, *z])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(p.abs().max() > 0 for n, p in lora.named_parameters() if "lora_B" in n)
    bank.stop_training("new")
    assert (bank["new"].z[names[0]] - 1).abs().max() > 0
    with torch.no_grad():
        want = {name: lora(x, experts=name).logits for name in (None, "a", "new")}
        assert not torch.allclose(want["new"], before, atol=1e-4)
        merged = lora.merge_and_unload()
        for name, logits in want.items():
            torch.testing.assert_close(merged(x, experts=name).logits, logits, **CLOSE)
        mixed = merged(x, experts=["a", None, "new", "a"]).logits
        for i, name in enumerate(["a", None, "new", "a"]):
            torch.testing.assert_close(mixed[i], want[name][i], **CLOSE)


def test_lora_over_factored_form_is_refused_by_peft():
    model = build("llama")
    t2.patch_model(model, form="factored")
    with pytest.raises(ValueError, match=r"(?s)FactoredLinear\(.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_expert_of_a_model_with_an_adapter_is_exported_for_the_base(family, tmp_path):
    """Trained or made under PEFT's wrapper, it is a LoRA file for the base model by the base's names."""
    torch.manual_seed(0)
    base, x = build(family), torch.randint(3, 60, (2, 6))
    leaf = "c_attn" if family == "gpt2" else "q_proj"
    config = peft.LoraConfig(r=4, target_modules=[leaf], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    factors = t2.decompose(base)
    bank = t2.patch_model(wrapped, form="delta", factors=factors)
    expert = random_expert(bank)
    folder = expert.to_lora(factors).save(tmp_path / "lora")
    t2.patch_model(base, form="delta", factors=factors).add("a", expert)
    with torch.no_grad():
        want = base(x, experts="a").logits
        t2.unpatch_model(base)
        found = peft.PeftModel.from_pretrained(base, folder)(x).logits
    torch.testing.assert_close(found, want, **CLOSE)


def test_peft_takes_no_method_that_it_does_not_list():
    """docs/from-peft.md says so. If this fails, PEFT has opened, and SVF can be a method of `get_peft_model`."""
    from peft.utils import register_peft_method

    with pytest.raises(ValueError, match="SVF"):
        register_peft_method(name="svf", config_cls=peft.LoraConfig, model_cls=peft.LoraModel)
