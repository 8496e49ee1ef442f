"""SVF experts in vLLM: a plugin that vLLM finds by itself, with experts as its LoRA requests.

README.md says which file does what.

from t2kernels.integrations.vllm import engine_args, expert, few_shot

llm = LLM("meta-llama/Llama-3.1-8B", **engine_args(factors="factors/llama", rank=256, rows=8))
both = expert("both", {"experts/math": 0.7, "experts/code": 0.3})
llm.generate(prompts, lora_request=[expert("math", "experts/math"), None, both])
mine = few_shot(llm, {"math": "experts/math", "code": "experts/code"}, rows, reward, out="experts/mine")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import engine_args
from .hooks import register
from .requests import expert

if TYPE_CHECKING:
    from .engine.model_folder import write_checkpoint
    from .search import few_shot
    from .server.launch import serve

__all__ = ["engine_args", "expert", "few_shot", "register", "serve", "write_checkpoint"]

# vLLM imports this package in each of its processes, and few of them need what these import.
_LAZY = {"few_shot": "search", "serve": "server.launch", "write_checkpoint": "engine.model_folder"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
