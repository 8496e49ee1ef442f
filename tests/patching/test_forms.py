"""How many components an expert may rescale, and in which form, when the user says nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2kernels as t2
from t2kernels.factors.matrices import WIDE


def llama(width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_a_large_model_gets_a_sixteenth_in_delta_form():
    model = llama(WIDE)
    ids = torch.randint(50, (2, 5))
    before = model(ids).logits
    bank = t2.patch_model(model)
    assert bank.matrices == {name: min(layer.U.shape[0], layer.Vt.shape[1]) // 16 for layer, (name,) in bank.layers}
    assert set(bank.matrices.values()) == {16, 32}  # the key and value projections are 256 wide
    assert {layer.form for layer, _ in bank.layers} == {"delta"}
    assert torch.equal(model(ids).logits, before)


def test_a_small_model_and_the_factored_form_get_every_component():
    assert set(t2.patch_model(llama(WIDE - 8)).matrices.values()) == {WIDE // 2 - 4, WIDE - 8}
    bank = t2.patch_model(llama(WIDE), form="factored")
    assert set(bank.matrices.values()) == {WIDE // 2, WIDE}


@pytest.mark.parametrize("width", [64, WIDE])
def test_given_factors_decide(width, tmp_path):
    model = llama(width)
    t2.decompose(model, tmp_path / "f", rank=24)
    bank = t2.patch_model(model, factors=tmp_path / "f")
    assert set(bank.matrices.values()) == {24}
    assert {layer.form for layer, _ in bank.layers} == {"delta"}, "the factored form would need every component"


def test_whole_factors_of_a_large_model_are_cut(tmp_path):
    model = llama(WIDE)
    t2.decompose(model, tmp_path / "f")
    assert set(t2.patch_model(model, factors=tmp_path / "f").matrices.values()) == {16, 32}


def test_an_expert_with_more_components_is_refused_with_the_way_out():
    model = llama(WIDE)
    bank = t2.patch_model(model, rank=None, form="delta")
    for p in bank.start_training("whole"):
        p.data.add_(torch.rand_like(p))
    expert = bank.stop_training("whole")
    t2.unpatch_model(model)
    with pytest.raises(ValueError, match="larger rank"):
        t2.patch_model(model).add("whole", expert)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="'auto', a number"):
        t2.patch_model(llama(64), rank="some")
