"""`engine_args`: the arguments that make a vLLM engine serve SVF experts."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t2kernels import InputError
from t2kernels.factors.store import Factors

from .settings import FORMS, KEY, Settings
from .support import check_plugin, release

HOST = 1024
"""Experts in host memory by default: 3 GB of Llama-3-8B's with every component, 180 MB with 256 components."""


def engine_args(
    factors: str | os.PathLike[str] | None = None,
    rows: int = 8,
    form: str | None = None,
    rank: int | float | None = None,
    max_error: float = 0.1,
    layout: str = "auto",
    host: int = HOST,
    **others: Any,
) -> dict[str, Any]:
    """Arguments for `vllm.LLM` or `AsyncEngineArgs`: LLM(model, **engine_args(factors="factors/llama", rows=8)).

    factors: directory that `t2 decompose` wrote for this model. With it the form is "delta": the model is served as it
        is, in any format, and experts add to its layers. None: the form is "factored", for a checkpoint that
        `t2 decompose --format vllm` wrote
    rows: of the tables; row 0 is the base model, so rows - 1 experts take part in one step, and more take turns
    form: "delta" or "factored"; None: the one that `factors` asks for
    rank: leading components that an expert may rescale, as in `patch_model`
    max_error: as in `ExpertBank.add`; layout: as in `Settings`
    host: experts kept in host memory, at least rows - 1; others are read from their files again
    others: further arguments of the engine, passed through

    Raises ValueError for a form that does not go with `factors`, FileNotFoundError or ValueError for a directory
    without factors, ModuleNotFoundError without vLLM, UnsupportedVllm for a version that was not tested or if vLLM
    would not load the plugin.
    """
    release()
    check_plugin()
    form = form or ("factored" if factors is None else "delta")
    if form not in FORMS:
        raise InputError(f"form={form!r}; wanted 'delta' or 'factored'")
    if form == "delta" and factors is None:
        raise InputError("form='delta' with factors=None: this form needs the directory of factors")
    if form == "factored" and factors is not None:
        raise InputError(
            f"form='factored' with factors={factors!r}: this form has its factors in the checkpoint; leave factors out"
        )
    if rows < 2:
        raise InputError(f"rows={rows}: row 0 is the base model, so at least 2 are needed")
    place = None if factors is None else Path(factors).expanduser()
    settings = Settings(
        factors=None if place is None else str(place.resolve()),
        rank=rank,
        max_error=max_error,
        layout=layout,
        fingerprint=None if place is None else Factors.load(place).fingerprint,
    )
    extra = {KEY: asdict(settings), **others.pop("additional_config", {})}
    return {
        "enable_lora": True,
        "max_loras": rows - 1,
        "max_cpu_loras": max(host, rows - 1),
        "additional_config": extra,
        **others,
    }
