"""Models that transformers read from a GGUF file: plain numbers, still marked as quantised."""

from __future__ import annotations

from torch import nn


def unmark(model: nn.Module) -> None:
    """Take the mark of a quantised model off a model whose GGUF weights were turned into plain numbers.

    transformers turns them into plain numbers while it loads. It leaves the mark, and would refuse to train the model
    and to save it. Models that are quantised otherwise, and models without the mark, stay as they are.
    """
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) != "gguf":
        return
    for name, plain in (("hf_quantizer", None), ("quantization_method", None), ("is_quantized", False)):
        setattr(model, name, plain)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
