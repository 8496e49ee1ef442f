"""`--worker-cls t2kernels.integrations.vllm.worker.ExpertWorker`: experts without replacing anything of vLLM's.

The worker is vLLM's own of the platform, whose model runner gets another `load_lora_model`; for engines where no plugin may be loaded
(VLLM_PLUGINS="").
"""

from __future__ import annotations

import types
from typing import Any


def __getattr__(name: str) -> Any:
    # Made when vLLM asks for it by its name: it derives from a class of vLLM's, and importing this module imports nothing of that.
    if name != "ExpertWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _worker()
    return found


def _worker() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base

    class ExpertWorker(Base):
        """vLLM's worker with SVF experts in place of LoRA adapters."""

        def init_device(self):
            super().init_device()
            self.model_runner.load_lora_model = types.MethodType(_load, self.model_runner)

    ExpertWorker.__module__ = __name__
    ExpertWorker.__qualname__ = "ExpertWorker"
    return ExpertWorker


def _load(runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
    from .engine_manager import EngineManager

    runner.lora_manager = EngineManager(vllm_config, device)
    return runner.lora_manager.create_lora_manager(model, vllm_config)
