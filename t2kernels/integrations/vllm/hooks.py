"""`register`: what vLLM calls in each of its processes. It replaces two names of vLLM's and adds a quantization method.

| hooked | instead |
|---|---|
| `lora_model_runner_mixin.LRUCacheWorkerLoRAManager` | `EngineManager`, for engines with experts |
| `InputProcessor._validate_lora` | vLLM's own check, then `check_request` |

This file stands above the engine: nothing here is imported by it.
"""

from __future__ import annotations

import logging
from typing import Any

from .support import asks_for_experts

logger: logging.Logger = logging.getLogger(__name__)


def register() -> None:
    """The entry point of `vllm.general_plugins`. Idempotent. It starts no CUDA and allocates nothing.

    It never raises, because vLLM calls it for engines without experts too: a vLLM that cannot be hooked is logged here,
    and an engine with experts then refuses to start (`check_hooks`).
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


def _hook_manager(mixin: Any) -> None:
    """Replace the class that `load_lora_model` instantiates by a function that looks at the configuration first."""
    original = mixin.LRUCacheWorkerLoRAManager
    if getattr(original, "of_t2kernels", False):
        return

    def make(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if not asks_for_experts(vllm_config):
            return original(vllm_config, device, *args, **kwargs)
        from .engine.engine_manager import EngineManager

        return EngineManager(vllm_config, device)

    hooked: Any = make
    hooked.of_t2kernels = True
    mixin.LRUCacheWorkerLoRAManager = hooked


def _hook_validation(processor: Any) -> None:
    """Check an expert where its request comes in, after vLLM's own check."""
    original = processor._validate_lora
    if getattr(original, "of_t2kernels", False):
        return

    def validate(self: Any, lora_request: Any) -> None:
        original(self, lora_request)
        if lora_request is not None and asks_for_experts(self.vllm_config):
            from .engine.check import check_request

            check_request(self.vllm_config, lora_request)

    hooked: Any = validate
    hooked.of_t2kernels = True
    processor._validate_lora = hooked
