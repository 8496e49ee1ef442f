"""Tiny random models of many families, by name.

Sizes are unequal on purpose: a transposed factor must not fit by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from torch import nn

COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
QUIET = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
GQA = dict(num_key_value_heads=2)
MOE = dict(num_experts_per_tok=2, output_router_logits=False)

CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON, **GQA, **QUIET),
    "mistral": lambda: tf.MistralConfig(**COMMON, **GQA, **QUIET, head_dim=8),
    "qwen2": lambda: tf.Qwen2Config(**COMMON, **GQA, **QUIET),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, **GQA, **QUIET, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, **GQA, **QUIET, head_dim=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**COMMON, **GQA, **QUIET, head_dim=8),
    "phi": lambda: tf.PhiConfig(**COMMON, **QUIET),
    "phi3": lambda: tf.Phi3Config(**COMMON, **GQA, **QUIET),
    "gpt2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, **QUIET),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**COMMON, **QUIET),
    "opt": lambda: tf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=60,
        word_embed_proj_dim=32,
        **QUIET,
    ),
    "falcon": lambda: tf.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60, **QUIET
    ),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60, **QUIET),
    "olmo2": lambda: tf.Olmo2Config(**COMMON, **GQA, **QUIET),
    "stablelm": lambda: tf.StableLmConfig(**COMMON, **GQA, **QUIET),
    "mixtral": lambda: tf.MixtralConfig(**COMMON, **GQA, **QUIET, num_local_experts=4, **MOE),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **COMMON, **GQA, **QUIET, moe_intermediate_size=20, num_experts=4, head_dim=8, **MOE
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**COMMON, **GQA, **QUIET, num_local_experts=4, head_dim=8, **MOE),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **COMMON,
        **QUIET,
        num_key_value_heads=4,
        moe_intermediate_size=20,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}
MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
DENSE_FAMILIES = tuple(f for f in CONFIGS if f not in MOE_FAMILIES)


def build(family: str, **changes: Any) -> nn.Module:
    """A model of a family with random weights, without gradients. changes: to its config."""
    config = CONFIGS[family]()
    for k, v in changes.items():
        setattr(config, k, v)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    # transformers initialises biases to 0 and norms to 1. Noise everywhere makes a lost bias show; larger weights make
    # experts matter.
    for p in model.parameters():
        p.data.mul_(3).add_(p.data.new_empty(p.shape).normal_(std=0.05))
    return model.requires_grad_(False)
