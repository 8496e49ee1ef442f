"""`EngineManager`: an `ExpertManager` with the constructor of vLLM's own manager.

It builds its bank once the model has been loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2kernels import InputError, T2Error
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.expert import Expert
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.constants import QUANTIZATION
from t2kernels.integrations.vllm.requests import files, state_of
from t2kernels.integrations.vllm.settings import Settings
from t2kernels.integrations.vllm.support import check_hooks, refuse

from .adapter_path import cut
from .build import build_delta
from .manager import ExpertManager, most_tokens


class EngineManager(ExpertManager):
    """config: `VllmConfig`; device: of the worker.

    Raises UnsupportedVllm for a version or a configuration that is not supported.
    """

    def __init__(self, config: Any, device: torch.device):
        check_hooks()
        refuse(config)
        self.config: Any = config
        self.device: torch.device = torch.device(device)
        self.settings: Settings = Settings.of(config) or Settings()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any = None) -> nn.Module:
        """Give the loaded model its tables, and return it.

        Raises ValueError if factors are missing or do not fit the model.
        """
        lora, config = self.config.lora_config, self.config
        rows, dtype = lora.max_loras + 1, config.model_config.dtype
        token_rows = torch.zeros(most_tokens(config), dtype=torch.int32, device=self.device)
        if config.model_config.quantization == QUANTIZATION:
            from .factored import build_factored

            bank = build_factored(model, rows, token_rows)
        else:
            if self.settings.factors is None:
                raise InputError(
                    "no factors: neither the engine's settings nor the checkpoint has any; "
                    "start it with engine_args(factors=...)"
                )
            bank = build_delta(model, Factors.load(self.settings.factors), self.settings, rows, token_rows, dtype)
        super().__init__(bank, token_rows, lora.max_cpu_loras, self.settings.max_error)
        for module in model.modules():
            if hasattr(module, "svf"):
                module.svf.step = self
        model.lora_manager = self
        return model

    def read(self, name: str, where: str) -> Expert | LoraAdapter:
        """The expert, or this rank's part of the adapter, at an address.

        Raises ExpertError, or vLLM's LoRAAdapterNotFoundError (404) if a file is missing.
        """
        try:
            found = super().read(name, where)
            return cut(found, self.bank) if isinstance(found, LoraAdapter) else found
        except T2Error:
            from vllm.exceptions import LoRAAdapterNotFoundError

            try:
                for file in files(where):
                    state_of(Path(file))
            except FileNotFoundError as e:
                raise LoRAAdapterNotFoundError(name, where) from e
            raise
