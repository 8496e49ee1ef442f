"""SVF experts in vLLM: a plugin that it finds by itself, experts as its LoRA requests. Nothing of vLLM is imported here.

from t2kernels.integrations.vllm import engine_args, expert, few_shot

llm = LLM("meta-llama/Llama-3.1-8B", **engine_args(factors="factors/llama", rank=256, rows=8))
llm.generate(prompts, lora_request=[expert("math", "experts/math"), None, expert("both", {"experts/math": 0.7, "experts/code": 0.3})])
mine = few_shot(llm, {"math": "experts/math", "code": "experts/code"}, rows, reward, out="experts/mine")
"""

from typing import TYPE_CHECKING, Any

from .hooks import register
from .requests import expert
from .settings import engine_args

if TYPE_CHECKING:
    from .search import few_shot

__all__ = ["engine_args", "expert", "few_shot", "register"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in each of its processes, and few need what a search needs.
    if name != "few_shot":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .search import few_shot

    return few_shot
