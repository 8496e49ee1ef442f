"""What is hooked, in the vLLM that is installed. No engine."""

import subprocess
import sys

import pytest

from t2kernels.integrations.vllm import support


def test_importing_and_registering_start_nothing():
    code = (
        "import sys, t2kernels.integrations.vllm as plugin\n"
        "assert not any(n.split('.')[0] == 'vllm' for n in sys.modules)\n"
        "import vllm.v1.worker.lora_model_runner_mixin as m, torch; own = m.LRUCacheWorkerLoRAManager\n"
        "plugin.register(); ours = m.LRUCacheWorkerLoRAManager; plugin.register()\n"
        "assert ours is not own and m.LRUCacheWorkerLoRAManager is ours and not torch.cuda.is_initialized()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config, QUANTIZATION_METHODS\n"
        "assert get_quantization_config('svf').__name__ == 'SVFQuantization' and QUANTIZATION_METHODS.count('svf') == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_hooks_are_those_that_were_tested(monkeypatch):
    import vllm.v1.core.kv_cache_utils as cache
    import vllm.v1.worker.lora_model_runner_mixin as mixin
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.worker_manager import WorkerLoRAManager

    support.check_hooks()
    changes = {
        "set_active_adapters takes": (
            WorkerLoRAManager,
            "set_active_adapters",
            lambda self, requests, mapping, more: None,
        ),
        "pin_adapter takes None": (WorkerLoRAManager, "pin_adapter", None),
        "makes another manager": (mixin.LoRAModelRunnerMixin, "load_lora_model", lambda self, model: None),
        "calls another method": (mixin.LoRAModelRunnerMixin, "_set_active_loras", lambda self: None),
        "prefix cache does not tell": (
            cache,
            "_gen_lora_extra_hash_keys",
            lambda request: [request.lora_request.lora_name],
        ),
        "; ".join(
            f"OpenAIServingModels has no {n}" for n in ("lora_id_counter", "lora_requests", "base_model_paths")
        ): (
            OpenAIServingModels,
            "__init__",
            lambda self: None,
        ),
        "is_base_model takes None": (OpenAIServingModels, "is_base_model", None),
    }
    for match, (owner, name, other) in changes.items():
        with monkeypatch.context() as patch:
            if other is None:
                patch.delattr(owner, name)
            else:
                patch.setattr(owner, name, other)
            with pytest.raises(support.UnsupportedVllm, match=match):
                support.check_hooks()
    support.check_hooks()
