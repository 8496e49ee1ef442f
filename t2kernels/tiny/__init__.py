"""The built-in tiny model: a Llama of 1.06 M parameters that knows how to work step by step and seldom does (docs/explanation/tiny.md)."""

from pathlib import Path

__all__ = ["experts", "load", "path"]


NAME = "t2kernels-tiny"


def path() -> Path:
    """The directory of the checkpoint, for anything that takes a model by path: `AutoModelForCausalLM.from_pretrained(tiny.path())`."""
    return Path(__file__).parent / "model"


def load(dtype=None):
    """(model, tokenizer), on the CPU in eval mode. dtype: a torch dtype; None means float32 (the file holds bfloat16)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype or torch.float32, local_files_only=True)
    model.config._name_or_path = NAME  # what experts say they were trained on, wherever the package lies
    return model.eval(), AutoTokenizer.from_pretrained(path(), local_files_only=True)


def experts() -> dict[str, Path]:
    """The experts that come with the model: name -> file."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "experts").glob("*.safetensors"))}
