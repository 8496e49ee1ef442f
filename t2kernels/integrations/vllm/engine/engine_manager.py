"""`EngineManager`: an `ExpertManager` that is made as vLLM makes its own, and builds its bank when the model has been loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.hooks import QUANTIZATION, check_hooks, refuse
from t2kernels.integrations.vllm.settings import Settings

from . import build
from .manager import ExpertManager, most_tokens


class EngineManager(ExpertManager):
    """config: `VllmConfig`; device: of the worker. Raises UnsupportedVllm for a version or a configuration that is not covered."""

    def __init__(self, config: Any, device: torch.device):
        check_hooks()
        refuse(config)
        self.config, self.device = config, torch.device(device)
        self.settings = Settings.of(config) or Settings()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any = None) -> nn.Module:
        """Give the loaded model its tables. Returns it."""
        lora, config = self.config.lora_config, self.config
        rows, dtype = lora.max_loras + 1, config.model_config.dtype
        token_rows = torch.zeros(most_tokens(config), dtype=torch.int32, device=self.device)
        if config.model_config.quantization == QUANTIZATION:
            from .factored import build_factored

            bank = build_factored(model, rows, token_rows)
        else:
            if self.settings.factors is None:
                raise ValueError("no factors were named, and the checkpoint holds none: engine_args(factors=...)")
            bank = build.build_delta(model, Factors.load(self.settings.factors), self.settings, rows, token_rows, dtype)
        super().__init__(bank, token_rows, lora.max_cpu_loras, self.settings.max_error)
        for module in model.modules():
            if hasattr(module, "svf"):
                module.svf.step = self
        model.lora_manager = self
        return model

    def read(self, name: str, where: str) -> Expert:
        try:
            return super().read(name, where)
        except ExpertError as e:
            from vllm.exceptions import LoRAAdapterNotFoundError

            if "does not exist" in str(e):
                raise LoRAAdapterNotFoundError(name, where) from e  # the server answers 404 to it
            raise
