"""What is hooked, in the vLLM that is installed. No engine."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import t2kernels.integrations.vllm as plugin
from t2kernels.integrations.vllm import support

SOURCES = sorted(Path(plugin.__file__).parent.rglob("*.py"))


def imported() -> set[tuple[str, str]]:
    """(module, name) of everything that the plugin's files import from vLLM; the name is "" for a whole module."""
    found = set()
    for node in (n for file in SOURCES for n in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and not node.level:
            found |= {(node.module or "", a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {(a.name, "") for a in node.names if a.name.split(".")[0] == "vllm"}
    return found


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


def test_every_name_that_is_imported_is_there():
    names = imported()
    assert ("vllm.lora.request", "LoRARequest") in names
    assert ("vllm.v1.worker.lora_model_runner_mixin", "") in names
    line = support.release().command_line
    names |= {(line, "make_arg_parser"), (line, "validate_parsed_serve_args")}
    assert [(m, n) for m, n in sorted(names) if n and not hasattr(import_module(m), n)] == []
    for module, _ in names:
        import_module(module)


def test_the_servers_command_line_knows_the_arguments(world):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from t2kernels.integrations.vllm.server.launch import command

    line = import_module(support.release().command_line)
    given = command(str(world.model), "127.0.0.1", 81, "key", 4, world.factors, ["--seed", "7"])
    args = line.make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    line.validate_parsed_serve_args(args)
    assert (args.max_loras, args.port, args.seed, args.served_model_name[-1]) == (3, 81, 7, "base")
    assert args.additional_config["t2kernels"]["factors"] == str(world.factors)


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
