"""The quantization method "svf", as vLLM wants one. Imported by `hooks.register`, in vLLM's processes only.

A checkpoint names it in config.json, so vLLM picks it up by itself.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from t2kernels.experts.table import ScaleTable
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.hooks import QUANTIZATION, check_hooks
from t2kernels.integrations.vllm.settings import Settings

from .check import FACTS
from .factored import FORMAT, Factored
from .manager import most_tokens


class SVFQuantization(QuantizationConfig):
    """matrices: names of those that are factored; all others stay dense."""

    def __init__(self, matrices: list[str]):
        super().__init__()
        check_hooks()
        self.names = {n: n for n in matrices}  # as vLLM calls a matrix -> as the checkpoint does

    def get_name(self) -> str:
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SVFQuantization:
        if config.get("format") != FORMAT:
            raise ValueError(
                f"a factored checkpoint of format {config.get('format')!r}; this version reads {FORMAT}: write it again"
            )
        return cls(config["matrices"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        mapper = hf_to_vllm_mapper.get_rename_mapper()
        self.names = {mapper.map_name(f"{n}.weight").removesuffix(".weight"): n for n in self.names.values()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{n}" for n in self.packed_modules_mapping.get(leaf, [leaf])]
        if not any(n in self.names for n in names):
            return UnquantizedLinearMethod()
        return SVFMethod(self, prefix, get_current_vllm_config())


class SVFMethod(LinearMethodBase):
    """y = ((x V) * scale[rows]) Uᵀ + bias of one layer; its tables have the base model's row until the manager takes them over."""

    def __init__(self, quantization: SVFQuantization, prefix: str, config: Any):
        self.quantization, self.prefix, self.config = quantization, prefix, config
        self.settings = Settings.of(config) or Settings()

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ):
        self.dtype = params_dtype  # nothing is loaded from the checkpoint's own tensors

    @cached_property
    def factors(self) -> Factors:
        return Factors.load(Path(self.config.model_config.model) / FACTS)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        lora = self.config.lora_config
        device = torch.device(self.config.device_config.device)
        layer.svf_made = Factored(self, layer, 1 + (lora.max_loras if lora else 0), device)
        token_rows = torch.zeros(most_tokens(self.config), dtype=torch.int32, device=device)
        ScaleTable(layer.svf_made.pairs, layer.svf_made.rows)
        layer.svf = layer.svf_made.path(layer, token_rows)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.svf.make(x, bias)


def register() -> None:
    """Make the method known to vLLM. Idempotent."""
    if QUANTIZATION not in QUANTIZATION_METHODS:
        register_quantization_config(QUANTIZATION)(SVFQuantization)
