"""`open_vllm`: the engine "vllm" of `SVFConfig.rollout`, found by the entry point of that name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from t2kernels import InputError, tiny
from t2kernels.rollout.engines import EngineContext, RolloutEngine
from t2kernels.rollout.patched import bank_of

from .memory import WORKER
from .replicas import ReplicaEngine

SHARE = 0.4
"""The part of a GPU's memory that the engine takes by default; the trainer has the rest."""


def open_vllm(context: EngineContext) -> RolloutEngine:
    """A `ReplicaEngine` for an address, else a `ColocatedEngine` with an engine that is started here.

    context.options: "timeout" for servers. For an engine of its own: "model", the checkpoint (by default the model's
        name), "factors", a directory of `t2 decompose` (by default made in a temporary one), "rows", and arguments of
        vLLM's LLM
    Raises InputError for options that do not fit, and as `engine_args`.
    """
    options: dict[str, Any] = dict(context.options)
    if context.address is not None:
        timeout = options.pop("timeout", None)
        if options:
            raise InputError(
                f"rollout_options={sorted(options)} with servers: they were started with settings of their own; only "
                "'timeout' can be given"
            )
        more = {} if timeout is None else {"timeout": float(timeout)}
        return ReplicaEngine(context.address, context.sampler, **more)
    return _colocated(context, options)


def _colocated(context: EngineContext, options: dict[str, Any]) -> RolloutEngine:
    from t2kernels.factors.decomposition import decompose
    from t2kernels.integrations.vllm.api import engine_args
    from t2kernels.integrations.vllm.engine.model_folder import is_factored

    from .colocated import ColocatedEngine

    model: Any = context.model
    place = options.pop("model", None) or getattr(model.config, "_name_or_path", "")
    if not place:
        raise InputError(
            'rollout="vllm" loads the checkpoint of the model, and this model has no name: pass '
            'rollout_options={"model": DIRECTORY}'
        )
    place = tiny.path() if place == tiny.NAME else place
    factors, folder = options.pop("factors", None), None
    widest = max(bank_of(model).matrices.values())
    if factors is None and not is_factored(place):
        folder = tempfile.TemporaryDirectory(prefix="t2kernels-factors-")
        factors = Path(folder.name) / "factors"
        decompose(str(place), factors, rank=widest)
    settings: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": context.seed,
        "rank": None if factors is None else widest,
        "rows": max(4, context.experts + 2),
        "worker_extension_cls": WORKER,
    }
    if model.device.type == "cuda":
        settings["gpu_memory_utilization"] = SHARE
    elif not {"enable_chunked_prefill", "max_num_batched_tokens"} & set(options):
        settings["enable_chunked_prefill"] = False  # else vLLM takes no seeds on a CPU: see `takes_seeds`
    arguments = engine_args(factors=factors, **{**settings, **options})

    from vllm import LLM

    return ColocatedEngine(LLM(str(place), **arguments), context.sampler, folder)
