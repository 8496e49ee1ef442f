"""`write_checkpoint` (`t2 decompose --format vllm`): a checkpoint in factored form, which vLLM serves as it is.

| file | content |
|---|---|
| config.json | the model's, with quantization_config {"quant_method": "svf", "format": 1, "matrices": [...]} |
| model*.safetensors | every tensor but the factored weights |
| t2kernels/ | the factors, as `t2 decompose` writes them |
| all others | tokenizer, generation config, chat template: copies |
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from t2kernels import InputError
from t2kernels.factors.checkpoint import INDEX, Checkpoint
from t2kernels.factors.decomposition import decompose
from t2kernels.factors.matrices import Targets
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.constants import FACTS, FORMAT, QUANTIZATION
from t2kernels.storage import read_json, write_json, write_tensors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
"""Endings of files that are not copied: they hold the dense weights."""


def write_checkpoint(model: str | Path, out: str | Path, targets: Targets = "all", **options: Any) -> Factors:
    """Write a checkpoint in factored form. Returns its factors.

    model: directory of a checkpoint, or its id on the hub; out: directory. A run that was interrupted continues where
        it stopped
    targets, options: as for `decompose` (dtype, format, max_error, device, workers, progress); every component is kept
    Raises ValueError for mixture-of-experts stacks among the targets and for a checkpoint that is quantised or factored
    already; the errors of `decompose`; OSError.
    """
    out = Path(out)
    if is_factored(model):
        raise InputError(f"{model} is factored already; decompose the original checkpoint")
    source = Checkpoint(model, targets)
    stacks = [m.name for m in source.matrices.values() if m.index is not None]
    if stacks:
        raise InputError(
            f"{stacks[0]} is part of a mixture-of-experts stack, which vLLM does not serve in factored form; "
            "choose targets without it"
        )
    config = read_json(source.directory / "config.json", "a model's config")
    if config.get("quantization_config"):
        raise InputError(f"{source.directory} is quantised already; decompose the original checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() == source.directory.resolve():
        raise InputError(f"{out} is the checkpoint itself; write to another directory")
    (out / "config.json").unlink(missing_ok=True)  # written last, so a directory that has it is complete
    factors = decompose(str(source.directory), out / FACTS, targets=targets, **options)
    dropped = {source.key(m) for m in source.matrices.values()}
    files: dict[str, str] = {}
    for file in sorted(set(source.files.values())):
        with safe_open(source.directory / file, framework="pt") as f:
            kept = {k: f.get_tensor(k) for k in f.keys() if k not in dropped}  # noqa: SIM118 (safe_open is no mapping)
        if kept:
            write_tensors(out / file, kept)
            files |= dict.fromkeys(kept, file)
        else:
            (out / file).unlink(missing_ok=True)
    if len(set(files.values())) > 1 or (source.directory / INDEX).is_file():
        write_json(out / INDEX, {"metadata": {}, "weight_map": files})
    for path in source.directory.iterdir():
        if (
            path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith(WEIGHTS)
            and path.name != "config.json"
        ):
            shutil.copy2(path, out / path.name)
    config["quantization_config"] = {"quant_method": QUANTIZATION, "format": FORMAT, "matrices": list(factors)}
    write_json(out / "config.json", json.loads(json.dumps(config)))
    return factors


def is_factored(model: str | Path) -> bool:
    """True if `model` is the directory of a checkpoint in factored form."""
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        return False
    config = read_json(path, "a model's config").get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANTIZATION
