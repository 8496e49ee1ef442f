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
from t2kernels.storage import FileError, read_json, read_tensors, why_unreadable, write_json, write_tensors

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
    *("target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
PLAIN_STARTS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` of adapters of the base model as it is. Others ("pissa", "olora", "corda", "loftq") belong to a
base model that PEFT changes while it adds them."""
SCALING: tuple[str, ...] = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""What the change of a matrix depends on, of the config."""


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
    write_tensors(folder / WEIGHTS, tensors, {key: config[key] for key in SCALING})
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
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{folder} has init_lora_weights={start!r:.40}: its pairs belong to a base model that PEFT changes when it "
            "adds them. Save it with PEFT's path_initial_model_for_weight_conversion, or merge it instead"
        )
    try:
        tensors, written = read_tensors(folder / WEIGHTS)
        if written is None:  # PEFT's own has no digest
            tensors = load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {why_unreadable(folder / WEIGHTS)} ({e})") from None
    except FileError as e:
        raise InputError(f"{folder / WEIGHTS} is damaged: {e}; copy or make it again") from None
    if changed := [key for key in SCALING if written is not None and config.get(key) != written.get(key)]:
        raise InputError(f"{folder / CONFIG}: {changed[0]} is not what {WEIGHTS} was written with; make it again")
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
        rank = pair["A"].shape[0]
        said = _number(config, "r", "rank_pattern", name, rank)
        if not rank or said != rank:
            raise InputError(
                f"{folder / CONFIG} gives {name} the rank {said:g}, its pair has {rank}; one of the files was changed"
            )
        alpha = _number(config, "lora_alpha", "alpha_pattern", name, 8)
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        pairs[name] = (pair["B"] * scaling, pair["A"])
    base = config.get("base_model_name_or_path")
    return pairs, base if isinstance(base, str) else None


def _number(config: Mapping[str, Any], key: str, patterns: str, name: str, default: float) -> float:
    """A number of a matrix, as PEFT finds it: of the first pattern that matches the end of the name, or `key`'s."""
    try:
        found = (v for p, v in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({p})$", name))
        value, number = next(found, config.get(key, default)), math.nan
        if type(value) in (int, float):
            number = float(value)
    except (re.error, AttributeError, TypeError, OverflowError) as e:
        raise InputError(f"{CONFIG}: {key} or {patterns} is not what PEFT writes ({e})") from None
    if not math.isfinite(number):
        raise InputError(f"{CONFIG}: {key} or {patterns} is not what PEFT writes: {value!r:.40} for {name}")
    return number
