"""The folder of a LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2kernels import InputError, MissingFileError
from t2kernels.factors.matrices import base_name
from t2kernels.storage import read_json, why_unreadable, write_json, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What PEFT may put into an adapter that is no change B A of a matrix, by its key in the config.
OTHER_PARTS: tuple[str, ...] = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def write_adapter(
    folder: str | Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    base_model: str | None,
    whole: frozenset[str],
    dtype: torch.dtype,
) -> Path:
    """Write an adapter with scaling 1.

    pairs: {matrix: (B [M, r], A [r, N])}
    whole: leaves of names that stand for all their matrices in target_modules; other matrices stand there by full name
    """
    folder, ranks = Path(folder), {name: A.shape[0] for name, (_, A) in pairs.items()}
    most = max(ranks.values())
    # A leaf that is a number is the name of a block as well.
    targets = {n if (leaf := n.rpartition(".")[2]) not in whole or leaf.isdigit() else leaf for n in pairs}
    others = {re.escape(n): r for n, r in ranks.items() if r != most}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, (B, A) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A.to(dtype), B.to(dtype)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], str | None]:
    """({matrix: (scaling * B [M, r], A [r, N])} in fp32, name of the base model) from a folder of PEFT.

    Raises MissingFileError without the two files; InputError for another method than LoRA, and for parts that are no
    change of a matrix (DoRA, biases, layers that are trained whole, embeddings).
    """
    folder = folder.expanduser()
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise MissingFileError(f"{folder} holds no {file}; wanted the folder of a LoRA adapter that PEFT saved")
    config = read_json(folder / CONFIG, "the config of an adapter")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder} is an adapter of type {config.get('peft_type')!r}; only LORA can be read")
    others = [key for key in OTHER_PARTS if config.get(key)]
    others += ["bias"] if config.get("bias", "none") != "none" else []
    if others:
        raise InputError(
            f"{folder} has {', '.join(others)}, which is more than a change B A of matrices; merge it instead"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {why_unreadable(folder / WEIGHTS)} ({e})") from None
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None or t.dim() != 2 or not t.is_floating_point():
            raise InputError(
                f"{folder / WEIGHTS} holds {key} {list(t.shape)}, which is no part of a pair A, B of a matrix"
            )
        found.setdefault(base_name(match[1]), {})[match[2]] = t.float()
    pairs = {}
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{folder / WEIGHTS}: {name} lacks its {'B' if 'A' in pair else 'A'}")
        pairs[name] = (pair["B"] * _scaling(config, name, pair["A"].shape[0]), pair["A"])
    base = config.get("base_model_name_or_path")
    return pairs, base if isinstance(base, str) else None


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """lora_alpha / r of a matrix, as PEFT finds it: the first pattern that matches the end of the name."""
    try:
        found = (v for key, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = float(next(found, config.get("lora_alpha", 8)))
    except (re.error, AttributeError, TypeError, ValueError) as e:
        raise InputError(f"{CONFIG}: lora_alpha or alpha_pattern is not what PEFT writes ({e})") from None
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
