"""The quantization method "svf", as subclasses of vLLM's. Only `hooks.register` imports this file, in vLLM's processes.

The config.json of a factored checkpoint names the method, so vLLM picks it by itself.
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

from t2kernels import InputError
from t2kernels.experts.table import ScaleTable
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.constants import FACTS, FORMAT, QUANTIZATION
from t2kernels.integrations.vllm.settings import Settings
from t2kernels.integrations.vllm.support import check_hooks

from .factored import Factored
from .manager import most_tokens


class SVFQuantization(QuantizationConfig):
    """matrices: names of the factored matrices; all others stay dense. Raises UnsupportedVllm."""

    def __init__(self, matrices: list[str]):
        super().__init__()
        check_hooks()
        self.names: dict[str, str] = {n: n for n in matrices}  # vLLM's name of a matrix -> the checkpoint's

    def get_name(self) -> str:
        """The method's name in config.json."""
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json, so there are no further files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SVFQuantization:
        """From `quantization_config` of config.json. Raises ValueError for another format."""
        if config.get("format") != FORMAT:
            raise InputError(
                f"this factored checkpoint has format {config.get('format')!r}, and this version reads {FORMAT}: "
                "write it again"
            )
        return cls(config["matrices"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM calls this if its model names matrices otherwise than the checkpoint."""
        mapper = hf_to_vllm_mapper.get_rename_mapper()
        self.names = {mapper.map_name(f"{n}.weight").removesuffix(".weight"): n for n in self.names.values()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """`SVFMethod` for a layer with a factored matrix, vLLM's plain method for other linear layers, else None."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{n}" for n in self.packed_modules_mapping.get(leaf, [leaf])]
        if not any(n in self.names for n in names):
            return UnquantizedLinearMethod()
        return SVFMethod(self, prefix, get_current_vllm_config())


class SVFMethod(LinearMethodBase):
    """y = ((x V) * scale[rows]) Uᵀ + bias of one layer.

    quantization: the method's settings; prefix: the layer's path in the model; config: `VllmConfig`
    Until `build_factored` gives the layer the manager's buffer of rows, every token uses row 0, the base model.
    """

    quantization: SVFQuantization
    prefix: str
    config: Any

    def __init__(self, quantization: SVFQuantization, prefix: str, config: Any):
        self.quantization, self.prefix, self.config = quantization, prefix, config
        self.settings: Settings = Settings.of(config) or Settings()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Create no weights: the factors come from their own directory, not from the checkpoint's tensors."""
        self.dtype = params_dtype

    @cached_property
    def factors(self) -> Factors:
        """The checkpoint's factors."""
        return Factors.load(Path(self.config.model_config.model) / FACTS)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read this rank's part of the layer's factors."""
        lora = self.config.lora_config
        device = torch.device(self.config.device_config.device)
        layer.svf_made = Factored(self, layer, 1 + (lora.max_loras if lora else 0), device)
        token_rows = torch.zeros(most_tokens(self.config), dtype=torch.int32, device=device)
        ScaleTable(layer.svf_made.pairs, layer.svf_made.rows)
        layer.svf = layer.svf_made.path(layer, token_rows)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's forward. x: [..., N]; bias: [M] or None."""
        return layer.svf.make(x, bias)


def register() -> None:
    """Register the method with vLLM. Idempotent."""
    if QUANTIZATION not in QUANTIZATION_METHODS:
        register_quantization_config(QUANTIZATION)(SVFQuantization)
