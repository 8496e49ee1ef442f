"""`plan` against the tensors of patched models, and against arithmetic by hand."""

import json

import pytest
import torch
import transformers

import t2kernels as t2
from t2kernels.patching.budget import plan
from t2kernels.patching.hardware import GPUS

QWEN = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tensor_bytes(model):
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("form", ["auto", "factored", "delta"])
@pytest.mark.parametrize("rank", [1 / 16, 8, None])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_patched_model(form, rank, tied):
    config = transformers.Qwen2Config(**QWEN, tie_word_embeddings=tied)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    wanted = plan(config, experts=40, rank=rank, form=form, dtype=torch.bfloat16)
    bank = t2.patch_model(model, rank=rank, form=form, rows=41)
    assert wanted.model == pytest.approx(tensor_bytes(model), rel=0.02)
    assert sum(k.count for k in wanted.kinds) == sum(len(names) for _, names in bank.layers)
    forms = {layer.form for layer, _ in bank.layers}
    assert {k.form for k in wanted.kinds} == forms
    per_expert = sum(k.count * k.rank for k in wanted.kinds)
    assert per_expert == t2.count_parameters(config, rank=rank).svf
    assert wanted.expert_file == 4 * per_expert


def test_bytes_of_the_cache_are_those_of_transformers_cache():
    config = transformers.Qwen2Config(**QWEN)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    cache = model(torch.zeros(2, 30, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert plan(config, context=30, batch=2, dtype=torch.bfloat16).kv_cache == real


def test_more_gpus_split_the_layers_and_not_the_tables():
    config = transformers.LlamaConfig(**QWEN)
    one, two = (plan(config, count=n, experts=1000, form="delta") for n in (1, 2))
    assert (one.base, one.factors, one.rows) == (two.base, two.factors, two.rows)
    for a, b in zip(one.kinds, two.kinds, strict=True):
        assert a.gpu == a.base + a.factors + a.rows
        V_or_U = a.M if a.split == "columns of V" else a.N
        halves = a.base / 2 + a.count * a.columns * (V_or_U + (a.M + a.N - V_or_U) / 2) * 2
        assert b.gpu == pytest.approx(halves + a.rows + 4 * a.count * a.columns, abs=2)


def test_times_are_bytes_over_bandwidth_or_operations_over_peak():
    config = transformers.LlamaConfig(**QWEN, tie_word_embeddings=True)
    card = GPUS["h200"]
    found = plan(config, experts=1, batch=1, context=16, form="delta")
    moved = found.base + found.factors + found.other + found.kv_cache + found.rows / 2
    assert found.decode_seconds == pytest.approx(moved / card.bandwidth, rel=1e-3)
    numbers = (found.base + found.factors + found.other) / 2
    crowd = plan(config, experts=1, batch=100_000, context=16, form="delta")
    pairs = 2 * 2 * 96 * 3
    assert crowd.decode_seconds == pytest.approx(
        max(
            (moved - found.kv_cache + crowd.kv_cache + found.rows / 2) / card.bandwidth,
            100_000 * (2 * numbers + pairs * 16) / card.peak,
        ),
        rel=0.01,
    )
    assert plan(config, experts=1, context=16, gpu="a100").decode_seconds > found.decode_seconds


def test_it_says_what_it_would_take():
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    small = plan(config, gpu="h100", count=1)
    assert not small.fits
    assert "4 h100 hold it" in small.needs[0]
    assert plan(config, gpu="h100", count=4).fits
    assert not plan(config, gpu="h100", count=2).fits
    fits = plan(config, gpu="h200", count=4, experts=10)
    requests = int(fits.needs[0].split()[0])
    assert plan(config, gpu="h200", count=4, experts=10, batch=requests).fits
    assert not plan(config, gpu="h200", count=4, experts=10, batch=requests + 1).fits
    experts = int(fits.needs[1].split()[0])
    assert plan(config, gpu="h200", count=4, experts=experts).fits
    assert not plan(config, gpu="h200", count=4, experts=experts + 2).fits


def test_mixture_of_experts_and_json():
    config = transformers.Qwen3MoeConfig(
        **QWEN, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2, head_dim=16
    )
    found = plan(config)
    assert {k.kind for k in found.kinds} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    }
    assert json.loads(json.dumps(found.to_dict()))["model"] == found.model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpu": "h900"}, "no GPU 'h900'"),
        ({"experts": 0}, "experts=0"),
        ({"form": "x"}, "form='x'"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_what_it_refuses(wrong, message):
    with pytest.raises(t2.T2Error, match=message):
        plan(transformers.LlamaConfig(**QWEN), **wrong)
