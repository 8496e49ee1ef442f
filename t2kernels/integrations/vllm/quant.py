"""Factored form in vLLM: the quantization method "svf", for checkpoints that `t2 decompose --format vllm` wrote (`checkpoint.py`).

Such a checkpoint names it in config.json, so vLLM picks it up by itself. A factored layer has no weight to load: when the rest has been
loaded it reads its rank's part of its factors from the directory beside, cut and laid out as for the delta form.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bank import ExpertBank
from ...factors import Factor, Factors
from ...int8 import Int8Factor
from ...layer import SVFLinear
from ...routing import Routing
from ...table import ScaleTable
from .build import origin_of
from .check import FACTS
from .hooks import QUANTIZATION, check_hooks
from .layers import SHARD_BYTES, ExpertPath, FactoredMember, Member, ShardedPath, members_of
from .settings import Settings

FORMAT = 1


def register() -> None:
    """Make the method known to vLLM. Idempotent."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANTIZATION not in QUANTIZATION_METHODS:
        register_quantization_config(QUANTIZATION)(_config_class())


def _config_class() -> type:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

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
                raise ValueError(f"a factored checkpoint of format {config.get('format')!r}; this version reads {FORMAT}: write it again")
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

        def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra):
            self.dtype = params_dtype  # nothing is loaded from the checkpoint's own tensors

        @cached_property
        def factors(self) -> Factors:
            return Factors.load(Path(self.config.model_config.model) / FACTS)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            lora = self.config.lora_config
            device = torch.device(self.config.device_config.device)
            layer.svf_made = _Made(self, layer, 1 + (lora.max_loras if lora else 0), device)
            token_rows = torch.zeros(_most_tokens(self.config), dtype=torch.int32, device=device)
            ScaleTable(layer.svf_made.pairs, layer.svf_made.rows)
            layer.svf = layer.svf_made.path(layer, token_rows)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return layer.svf.make(x, bias)

    return SVFQuantization


def _most_tokens(config: Any) -> int:
    return max(config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0)


class _Made:
    """The members of one factored layer on this rank, and how they are laid out."""

    def __init__(self, method: Any, layer: nn.Module, rows: int, device: torch.device):
        names = method.quantization.names
        self.members = members_of(method.prefix, layer, method.quantization.packed_modules_mapping)
        if missing := [m.name for m in self.members if m.name not in names]:
            raise ValueError(
                f"{missing[0]} is not among the factored matrices, and vLLM merges it with some that are; decompose with targets that hold both"
            )
        self.factors, self.rows, self.method = method.factors, rows, method
        self.row_parallel = type(layer).__name__ == "RowParallelLinear"
        self.ranks = layer.tp_size if type(layer).__name__ != "ReplicatedLinear" else 1
        found = {m: self.factors[names[m.name]] for m in self.members}
        for m, factor in found.items():
            if tuple(self.factors.shape(names[m.name])) != m.shape:
                raise ValueError(
                    f"{m.name}: the factors are of a matrix {list(self.factors.shape(names[m.name]))}, the model has {list(m.shape)}"
                )
            _check_whole(m, factor)
        self.shard = self._shards(list(found.values()))
        routing = Routing()
        self.pairs: list[tuple[SVFLinear, tuple[str, ...]]] = []
        for m, factor in found.items():
            local = m.cut(factor)
            if self.shard:
                local = _share(local.to(method.dtype), layer.tp_rank, layer.tp_size, self.row_parallel)
            support = self.factors.cut(method.settings.rank).ranks[names[m.name]]
            self.pairs.append((FactoredMember(local.to(device), support, rows, method.dtype, routing), (names[m.name],)))

    def path(self, layer: nn.Module, token_rows: Tensor) -> ExpertPath:
        arguments = self.members, [made for made, _ in self.pairs], layer.output_partition_sizes, token_rows
        return ShardedPath(*arguments, row_parallel=self.row_parallel, ranks=self.ranks) if self.shard else ExpertPath(*arguments)

    def _shards(self, found: list[Factor | Int8Factor]) -> bool:
        """Whether R is divided over the ranks too: where asked for, or where what would be replicated is large."""
        layout, parts = self.method.settings.layout, [m for m in self.members if len(m.parts) > 1]
        able = self.ranks > 1 and not parts and all(not isinstance(f, Int8Factor) and f.rank % self.ranks == 0 for f in found)
        if layout == "shard" and self.ranks > 1 and not able:
            raise ValueError(
                f"{self.members[0].name}: layout='shard' needs floating-point factors whose rank {self.ranks} divides; use 'auto'"
            )
        copied = sum((f.U if self.row_parallel else f.V).numel() for f in found) * self.method.dtype.itemsize
        return able and (layout == "shard" or (layout == "auto" and copied >= SHARD_BYTES))


def _check_whole(member: Member, factor: Factor | Int8Factor) -> None:
    if factor.rank < min(member.shape):
        raise ValueError(
            f"{member.name}: its factors have {factor.rank} of {min(member.shape)} components; the factored form needs all of them"
        )


def _share(local: Factor, rank: int, ranks: int, row_parallel: bool) -> Factor | Int8Factor:
    """This rank's components: of U for a row-parallel layer, whose g is scaled before it is shared out; else of V, with their scale."""
    width = local.rank // ranks
    mine = slice(rank * width, (rank + 1) * width)
    if row_parallel:
        return local._replace(U=local.U[:, mine].contiguous())
    # Columns that belong to some of the components, which is what int8 factors have; here with steps of 1.
    source = torch.arange(rank * width, (rank + 1) * width)
    return Int8Factor(local.U, local.sigma, local.V[:, mine].t().contiguous().t(), source, torch.ones(width), (width,))


def build_factored(model: nn.Module, settings: Settings, rows: int, token_rows: Tensor, dtype: torch.dtype) -> ExpertBank:
    """One bank over the factored layers of a loaded model, with one buffer of rows for all. Raises ValueError where there is none."""
    found = [layer for layer in model.modules() if hasattr(layer, "svf_made")]
    if not found:
        raise ValueError(f"the checkpoint of {type(model).__name__} names quantization {QUANTIZATION!r}, but no layer of it is factored")
    made = [layer.svf_made for layer in found]
    pairs = [pair for m in made for pair in m.pairs]
    origin = origin_of(made[0].factors)
    bank = ExpertBank(pairs, rows, origin, Routing(), {n: ("factored", "vLLM") for _, (n,) in pairs})
    for layer, m in zip(found, made, strict=True):
        layer.svf = m.path(layer, token_rows)
        del layer.svf_made
    return bank
