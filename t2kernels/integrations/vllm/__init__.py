"""SVF experts in vLLM: a plugin that it finds by itself, experts as its LoRA requests. Nothing of vLLM is imported here.

from t2kernels.integrations.vllm import engine_args, expert

llm = LLM("meta-llama/Llama-3.1-8B", **engine_args(factors="factors/llama", rank=256, rows=8))
llm.generate(prompts, lora_request=[expert("math", "experts/math"), None, expert("both", {"experts/math": 0.7, "experts/code": 0.3})])
"""

from .hooks import register
from .requests import expert
from .settings import engine_args

__all__ = ["engine_args", "expert", "register"]
