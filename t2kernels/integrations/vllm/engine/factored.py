"""Factored form in vLLM: layers whose weights are replaced by factors, which lie in a directory of the checkpoint.

`model_folder.py` writes such a checkpoint, `quantization.py` reads it. A factored layer takes no tensor from the
checkpoint's weight files. Once vLLM has loaded the rest of the model, the layer reads its rank's part of its factors,
cut and laid out as in delta form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.factors.factor import Factor
from t2kernels.factors.int8 import Int8Factor
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.constants import QUANTIZATION
from t2kernels.layers.linear import SVFLinear
from t2kernels.layers.routing.active import Routing

from .adapter_path import follow
from .check import origin_of
from .lora_layers import SHARD_BYTES, ExpertPath, FactoredMember, Member, ShardedPath, members_of


class Factored:
    """The matrices ("members") of one factored layer on this rank, and how their factors are laid out.

    method: the layer's `SVFMethod`; layer: vLLM's linear layer; rows: of the tables
    Raises ValueError if a matrix that vLLM merges into the layer is not factored, if factors have another shape than
    the matrix or lack components, or if the layout that was asked for is impossible.
    """

    members: list[Member]
    factors: Factors
    rows: int
    method: Any
    row_parallel: bool
    ranks: int
    shard: bool

    def __init__(self, method: Any, layer: Any, rows: int, device: torch.device):
        names = method.quantization.names
        self.members = members_of(method.prefix, layer, method.quantization.packed_modules_mapping)
        if missing := [m.name for m in self.members if m.name not in names]:
            raise InputError(
                f"{missing[0]} is not among the factored matrices, and vLLM merges it with some that are; "
                "decompose with targets that include both"
            )
        self.factors, self.rows, self.method = method.factors, rows, method
        self.row_parallel = type(layer).__name__ == "RowParallelLinear"
        self.ranks = layer.tp_size if type(layer).__name__ != "ReplicatedLinear" else 1
        found = [self.factors[names[m.name]] for m in self.members]
        for m, factor in zip(self.members, found, strict=True):
            if tuple(self.factors.shape(names[m.name])) != m.shape:
                raise InputError(
                    f"{m.name}: the factors are of a matrix {list(self.factors.shape(names[m.name]))}, the model has "
                    f"{list(m.shape)}; decompose the checkpoint that is served"
                )
            _check_whole(m, factor)
        self.shard = self._shards(found)
        routing = Routing()
        self.pairs: list[tuple[SVFLinear, tuple[str, ...]]] = []
        for m, factor in zip(self.members, found, strict=True):
            local = m.cut(factor)
            if self.shard:
                local = share(local.to(method.dtype), layer.tp_rank, layer.tp_size, self.row_parallel)
            support = self.factors.cut(method.settings.rank).ranks[names[m.name]]
            self.pairs.append(
                (FactoredMember(local.to(device), support, rows, method.dtype, routing), (names[m.name],))
            )

    def path(self, layer: Any, token_rows: Tensor) -> ExpertPath:
        """The module that computes the layer's output. token_rows: the row of each token."""
        arguments = self.members, [made for made, _ in self.pairs], layer.output_partition_sizes, token_rows
        return (
            ShardedPath(*arguments, row_parallel=self.row_parallel, ranks=self.ranks)
            if self.shard
            else ExpertPath(*arguments)
        )

    def _shards(self, found: list[Factor | Int8Factor]) -> bool:
        """True if R is divided over the ranks too: with layout="shard", or "auto" and large factors."""
        layout, parts = self.method.settings.layout, [m for m in self.members if len(m.parts) > 1]
        able = (
            self.ranks > 1
            and not parts
            and all(not isinstance(f, Int8Factor) and f.rank % self.ranks == 0 for f in found)
        )
        if layout == "shard" and self.ranks > 1 and not able:
            raise InputError(
                f"{self.members[0].name}: layout='shard' needs floating-point factors with a rank that {self.ranks} "
                "divides; use 'auto'"
            )
        copied = sum((f.U if self.row_parallel else f.V).numel() for f in found) * self.method.dtype.itemsize
        return able and (layout == "shard" or (layout == "auto" and copied >= SHARD_BYTES))


def _check_whole(member: Member, factor: Factor | Int8Factor) -> None:
    if factor.rank < min(member.shape):
        raise InputError(
            f"{member.name}: its factors have {factor.rank} of {min(member.shape)} components, and the factored form "
            "needs all; decompose without a rank"
        )


def share(local: Factor, rank: int, ranks: int, row_parallel: bool) -> Factor | Int8Factor:
    """This rank's components of a member's factors.

    Row-parallel layers divide U: g is scaled before it is divided. Column-parallel layers divide V and its scale.
    local: this rank's part of the factors, with all R components; rank, ranks: this rank and how many there are
    """
    width = local.rank // ranks
    mine = slice(rank * width, (rank + 1) * width)
    if row_parallel:
        return local._replace(U=local.U[:, mine].contiguous())
    # V has columns for some of the components only. `Int8Factor` can say which; here its steps are 1.
    source = torch.arange(rank * width, (rank + 1) * width)
    return Int8Factor(local.U, local.sigma, local.V[:, mine].t().contiguous().t(), source, torch.ones(width), (width,))


def build_factored(model: nn.Module, rows: int, token_rows: Tensor) -> ExpertBank:
    """The bank over the factored layers of a loaded model. All layers get `token_rows` as their buffer of rows.

    Raises ValueError if the model has no factored layer.
    """
    found: list[Any] = [layer for layer in model.modules() if hasattr(layer, "svf_made")]
    if not found:
        raise InputError(
            f"the checkpoint of {type(model).__name__} names quantization {QUANTIZATION!r}, but none of its layers is "
            "factored; write it again with `t2 decompose --format vllm`"
        )
    made = [layer.svf_made for layer in found]
    pairs = [pair for m in made for pair in m.pairs]
    origin = origin_of(made[0].factors)
    bank = ExpertBank(pairs, rows, origin, Routing(), {n: ("factored", "vLLM") for _, (n,) in pairs})
    for layer, m in zip(found, made, strict=True):
        layer.svf = m.path(layer, token_rows)
        del layer.svf_made
    follow(bank, [layer.svf for layer in found])
    return bank
