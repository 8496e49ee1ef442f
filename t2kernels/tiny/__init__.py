"""The built-in tiny model: a Llama of 1.06 M parameters that can work step by step and seldom does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["experts", "load", "path", "tickets"]

NAME = "t2kernels-tiny"
"""The model's name in the experts that are trained on it, wherever the package lies."""


def path() -> Path:
    """The checkpoint's directory, for `AutoModelForCausalLM.from_pretrained` or anything else that takes a path."""
    return Path(__file__).parent / "model"


def load(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load (model, tokenizer), on the CPU in eval mode. dtype: None means float32; the file holds bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype or torch.float32, local_files_only=True)
    model.config._name_or_path = NAME
    return model.eval(), AutoTokenizer.from_pretrained(path(), local_files_only=True)


def tickets() -> Path:
    """96 support tickets in four classes, a CSV file with the columns text, label and split."""
    return Path(__file__).parent / "tickets.csv"


def experts(model: str = "tiny") -> dict[str, Path]:
    """The experts that come with a model: {name: file}, empty for a model that has none.

    model: "tiny", or "smollm2", the model of `t2kernels.tiny.smollm2`
    """
    folder = {"tiny": "experts", "smollm2": "smollm2_experts"}.get(model)
    return {} if folder is None else {f.stem: f for f in sorted((Path(__file__).parent / folder).glob("*.safetensors"))}
