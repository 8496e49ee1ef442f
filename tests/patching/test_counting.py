import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import t2kernels as t2


@pytest.fixture(scope="module")
def llama3_8b():
    """Meta's Llama-3-8B by its published config: shapes only."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("targets", "matrices", "svf", "lora"),
    [
        ("q_proj|v_proj", 64, 163_840, 6_815_744),  # the paper prints 0.16 M and 6.82 M
        ("mlp", 96, 393_216, 28_311_552),  # 0.39 M
        (
            "q_proj|v_proj|mlp",
            160,
            557_056,
            35_127_296,
        ),  # 35.13 M; it prints 0.58 M for SVF, the sum of the two above is 0.56 M
        ("all", 224, 720_896, 41_943_040),
    ],
)
def test_the_papers_counts(llama3_8b, targets, matrices, svf, lora):
    count = t2.count_parameters(llama3_8b, targets)
    assert (count.matrices, count.svf, count.lora) == (matrices, svf, lora)
    assert t2.count_parameters(llama3_8b.config, targets) == count


def test_rank_and_dense(llama3_8b):
    assert t2.count_parameters(llama3_8b, rank=256).svf == 224 * 256
    assert t2.count_parameters(llama3_8b, rank=1 / 16).svf == 720_896 // 16
    assert t2.count_parameters(llama3_8b, lora_rank=1).lora * 16 == 41_943_040
    linear = sum(p.numel() for n, p in llama3_8b.named_parameters() if "proj" in n)
    assert t2.count_parameters(llama3_8b).dense == linear


def test_agrees_with_a_patched_model_and_with_peft():
    from peft import LoraConfig, get_peft_model

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64)
    count = t2.count_parameters(config, "mlp", rank=8, lora_rank=4)
    bank = t2.patch_model(GPT2LMHeadModel(config), "mlp", rank=8)
    assert count.svf == sum(bank.matrices.values())
    assert count.matrices == len(bank.matrices)
    lora = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    )
    assert count.lora == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_bad_input(llama3_8b):
    with pytest.raises(ValueError, match="selects no matrix"):
        t2.count_parameters(llama3_8b, "no_such_matrix")
    with pytest.raises(ValueError, match="lora_rank=0"):
        t2.count_parameters(llama3_8b, lora_rank=0)
    with pytest.raises(ValueError, match="rank=0"):
        t2.count_parameters(llama3_8b, rank=0)
