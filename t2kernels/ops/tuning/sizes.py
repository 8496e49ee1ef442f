"""Sizes of known models, for a machine that has no config of theirs and no network."""

from __future__ import annotations

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
MODELS: dict[str, tuple[int, int, int, int, int, int]] = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32768),
}
"""hidden and intermediate size, layers, heads, key-value heads, vocabulary. All have the matrices of a Llama."""


def fields(name: str) -> dict[str, int]:
    """The sizes of a known model under the names of transformers' `LlamaConfig`."""
    return dict(zip(_FIELDS, MODELS[name], strict=True))
