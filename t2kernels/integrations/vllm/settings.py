"""What an engine is told of its experts: where the factors are, and how they are laid out. It travels in vLLM's `additional_config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from t2kernels.factors.factor import resolve_rank
from t2kernels.factors.store import Factors

KEY = "t2kernels"
FORMS = ("delta", "factored")
LAYOUTS = ("auto", "replicate", "shard")
HOST = 1024  # experts kept in host memory by default: 3 GB of Llama-3-8B's at every component, 180 MB at 256


@dataclass(frozen=True)
class Settings:
    """factors: directory that `t2 decompose` wrote (delta form), or None: they stand in the checkpoint (factored form)
    rank: leading components that an expert may rescale, as in `patch_model`; max_error: as in `ExpertBank.add`
    layout: of factors over tensor-parallel ranks: "replicate", "shard" or "auto" (factored form; delta form replicates)
    fingerprint: of the factors. vLLM's compile cache hashes these settings: other factors under the same path are another graph
    """

    factors: str | None = None
    rank: int | float | None = None
    max_error: float = 0.1
    layout: str = "auto"
    fingerprint: str | None = None

    def __post_init__(self):
        resolve_rank(self.rank, 1)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}; wanted one of {', '.join(map(repr, LAYOUTS))}")

    @classmethod
    def of(cls, config: Any) -> Settings | None:
        """Those of a `VllmConfig`; None where it has none. Raises ValueError for what is not settings."""
        given = config.additional_config
        if not isinstance(given, Mapping) or KEY not in given:
            return None
        known = {f.name for f in fields(cls)}
        if not isinstance(given[KEY], Mapping) or not known.issuperset(given[KEY]):
            raise ValueError(
                f"additional_config[{KEY!r}] is {given[KEY]!r}; wanted a mapping with {', '.join(sorted(known))}"
            )
        return cls(**given[KEY])


def engine_args(
    factors: str | os.PathLike | None = None,
    rows: int = 8,
    form: str | None = None,
    rank: int | float | None = None,
    max_error: float = 0.1,
    layout: str = "auto",
    host: int = HOST,
    **others: Any,
) -> dict[str, Any]:
    """Arguments for `vllm.LLM` or `AsyncEngineArgs`: LLM(model, **engine_args(factors="factors/llama", rows=8)).

    factors: directory that `t2 decompose` wrote for this model; with it the form is "delta": the model is served as it is, in any format, and
        experts add to its layers. None: "factored", for a checkpoint that `t2 decompose --format vllm` wrote
    rows: of the tables, row 0 (the base model) included: rows - 1 experts take part in one step; more take turns
    rank, max_error: as in `patch_model` and `ExpertBank.add`; layout: as in `Settings`
    host: experts kept in host memory, at least rows - 1; others are read from their files again
    others: further arguments of the engine, passed through

    Raises ValueError for a form that does not fit, FileNotFoundError or ValueError for a directory without factors,
    UnsupportedVllm for a version that was not tested, or where vLLM would not load the plugin.
    """
    from .hooks import check_plugin, check_version

    check_version()
    if "worker_cls" not in others:
        check_plugin()
    form = form or ("factored" if factors is None else "delta")
    if form not in FORMS:
        raise ValueError(f"form={form!r}; wanted 'delta' or 'factored'")
    if (form == "delta") != (factors is not None):
        need = (
            "needs the directory of factors"
            if form == "delta"
            else "has its factors in the checkpoint; leave factors out"
        )
        raise ValueError(f"form={form!r} with factors={factors!r}: this form {need}")
    if rows < 2:
        raise ValueError(f"rows={rows}: row 0 is the base model, so at least 2 are needed")
    place, fingerprint = None, None
    if factors is not None:
        place, fingerprint = (
            str(Path(factors).expanduser().resolve()),
            Factors.load(Path(factors).expanduser()).fingerprint,
        )
    settings = Settings(place, rank, max_error, layout, fingerprint)
    extra = {KEY: asdict(settings), **others.pop("additional_config", {})}
    return {
        "enable_lora": True,
        "max_loras": rows - 1,
        "max_cpu_loras": max(host, rows - 1),
        "additional_config": extra,
        **others,
    }
