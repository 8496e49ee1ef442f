"""Factors at vLLM's linear layers: a layer's matrices, this rank's part of them, and the forward in both forms.

    delta     y = base(x) + ((x V) * scale[rows]) Uᵀ
    factored  y = ((x V) * scale[rows]) Uᵀ + bias

base is the layer's own quant method, whatever format its weight has.

vLLM merges matrices with the same input (q, k, v; gate, up) into one layer. Each of them is a `Member` here, and they
are one group of the op.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels import InputError, StateError
from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import check_weight, leading_pair
from t2kernels.factors.int8 import Int8Factor
from t2kernels.layers.groups import Group
from t2kernels.layers.linear import DeltaLinear, SVFLinear
from t2kernels.layers.routing.active import Routing
from t2kernels.ops.dispatch import expand, shrink
from t2kernels.ops.impls.implementation import InPlace
from t2kernels.ops.op import call, call_group
from t2kernels.ops.prepared import KEPT, Prepared

from .adapter_path import AdapterPath

SHARD_BYTES = 64 << 20
"""Factors of at least this size are sharded by layout="auto".

Replicated factors cost no communication. Sharded ones cost 1/tp of the bytes and a collective of T x R numbers a layer.
An estimate, not a measurement: an H200 reads a bf16 factor of 4096 x 4096 in about 7 us, the time of a small
collective. One of 8192 x 8192 takes 28 us.
"""
KINDS = (
    "ReplicatedLinear",
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
)
"""vLLM's linear layers whose division over ranks is known here."""


class FactoredMember(SVFLinear):
    """The table and this rank's factors of one matrix in factored form."""

    form = "factored"


@dataclass(frozen=True)
class Member:
    """One matrix W [M, N] of a layer.

    name: in vLLM's model; shape: (M, N) of the whole matrix
    out: the rows of W that this rank has; take: the columns of W that this rank has
    parts: the indices of the layer's outputs that this matrix computes
    """

    name: str
    shape: tuple[int, int]
    out: tuple[slice, ...]
    take: slice
    parts: tuple[int, ...]

    def cut(self, factor: Factor | Int8Factor) -> Factor | Int8Factor:
        """This rank's part of the factors: rows of U (column-parallel layers), rows of V (row-parallel ones)."""
        U = factor.U[self.out[0]] if len(self.out) == 1 else torch.cat([factor.U[s] for s in self.out])
        return factor._replace(U=U.contiguous(), V=factor.V[self.take].t().contiguous().t())


def members_of(name: str, layer: Any, packed: Mapping[str, Sequence[str]]) -> list[Member]:
    """The matrices of a vLLM linear layer, and this rank's part of each.

    name: the layer's path; packed: {merged layer: names of its matrices}, `packed_modules_mapping` of the model
    Raises ValueError for a kind of layer whose division over ranks is not known here.
    """
    kind = type(layer).__name__
    if kind not in KINDS:
        raise InputError(
            f"{name} is a {kind}, whose partition over ranks is not known; known are {', '.join(KINDS)}. "
            "Leave it out of the factors"
        )
    parent, _, leaf = name.rpartition(".")
    names = [f"{parent}.{n}" if parent else n for n in packed.get(leaf, [leaf])]
    rank, ranks, sizes = layer.tp_rank, layer.tp_size, list(layer.output_partition_sizes)
    if kind == "RowParallelLinear":
        width = layer.input_size // ranks
        return [
            Member(
                names[0],
                (layer.output_size, layer.input_size),
                (slice(None),),
                slice(rank * width, (rank + 1) * width),
                (0,),
            )
        ]
    replicas = [1, *[layer.num_kv_head_replicas] * 2] if kind == "QKVParallelLinear" else [1] * len(sizes)
    ranks = 1 if kind == "ReplicatedLinear" else ranks
    rank = 0 if kind == "ReplicatedLinear" else rank
    whole = [size * ranks // r for size, r in zip(sizes, replicas, strict=True)]
    local = [slice(rank // r * size, (rank // r + 1) * size) for size, r in zip(sizes, replicas, strict=True)]
    every = slice(None)
    if len(names) == len(sizes):
        return [
            Member(n, (m, layer.input_size), (s,), every, (i,))
            for i, (n, m, s) in enumerate(zip(names, whole, local, strict=True))
        ]
    if len(names) == 1:  # the checkpoint holds one merged matrix, and this rank has rows from several places of it
        starts = [sum(whole[:i]) for i in range(len(whole))]
        rows = tuple(slice(a + s.start, a + s.stop) for a, s in zip(starts, local, strict=True))
        return [Member(names[0], (sum(whole), layer.input_size), rows, every, tuple(range(len(sizes))))]
    raise InputError(
        f"{name} has {len(sizes)} parts for the matrices {', '.join(names)}; which is which is not known. "
        "Leave it out of the factors"
    )


class ExpertPath(nn.Module):
    """((x V) * scale[rows]) Uᵀ of the members of one layer. A child of the layer, without entries in its state dict.

    members: the layer's matrices; layers: their factors and tables, after the bank has laid the tables side by side
    sizes: of the layer's outputs on this rank; token_rows: [most tokens of a step] int32, the manager's buffer
    Raises ValueError if the members' factors have different dtypes.
    """

    Vt: Tensor
    scale: Tensor
    token_rows: Tensor
    U0: Tensor
    count: int
    widths: list[int]
    places: list[int]
    starts: list[int]

    def __init__(
        self, members: Sequence[Member], layers: Sequence[SVFLinear], sizes: Sequence[int], token_rows: Tensor
    ):
        super().__init__()
        found = Group(layers).tensors()
        if found is None:
            raise InputError(
                f"{members[0].name}: the factors of its layer have several dtypes; decompose them in one format"
            )
        Vt, scale = found[0].t(), found[1]
        self.register_buffer("Vt", Vt, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("token_rows", token_rows, persistent=False)
        self.count = len(layers)
        for i, layer in enumerate(layers):
            self.register_buffer(f"U{i}", layer.U, persistent=False)
        # The layer's output in pieces: those of the members (`places`), and others.
        first = {m.parts[0]: m.parts for m in members}
        inner = {p for parts in first.values() for p in parts[1:]}
        pieces = [first.get(p, (p,)) for p in range(len(sizes)) if p not in inner]
        self.widths = [sum(sizes[p] for p in piece) for piece in pieces]
        self.places = [pieces.index(m.parts) for m in members]
        self.starts = [sum(self.widths[:i]) for i in self.places]
        self.adapters: AdapterPath | None = None
        for m, layer in zip(members, layers, strict=True):
            layer.member = m
        self._layers, self._laid = list(layers), [None] * len(layers)  # in a list: no children of this module
        self.step: Any | None = None  # the manager: `step.tokens` is the number of tokens of the running step
        self._op: Prepared = Prepared(Vt.t(), self.Us, scale)  # on a CPU factors and tables stay where they are
        self._runs: dict[tuple[int, torch.dtype], InPlace] = {}  # what `add` ran for so many tokens

    @property
    def Us(self) -> list[Tensor]:
        """U [M, R] of each member."""
        return [getattr(self, f"U{i}") for i in range(self.count)]

    def rows_of(self, x: Tensor) -> Tensor:
        """The row of each token of x [T, N], [T] int32. Raises RuntimeError if x cannot be the tokens of this step."""
        T, step = x.shape[0], self.step
        if torch.compiler.is_compiling():
            return self.token_rows[:T]
        if step is not None and step.tokens == T:
            return step.rows
        if not (0 if step is None else step.tokens) <= T <= len(self.token_rows):
            raise StateError(
                f"a layer got {T} tokens in a step of {step.tokens}: it sees other tokens than the step's, and "
                "their experts are not known; leave its matrices out of the factors"
            )
        return self.token_rows[:T]

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y + ((x V) * scale[rows]) Uᵀ of y [..., sum of sizes] and x [..., N]. The memory of y may be used for it:
        nobody else may hold y."""
        # The usual step of a CPU first: this code runs between two products that push it out of the caches.
        step = self.step
        if step is not None and step.plain and self.adapters is None and not torch.compiler.is_compiling():
            run = self._runs.get((step.tokens, x.dtype)) if x.shape[0] == step.tokens and x.dtype is y.dtype else None
            if run is not None and run(x, step.rows, [y], self.starts):
                return y
        if x.dtype is not y.dtype:
            x = x.to(y.dtype)
        x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        rows = self.rows_of(x2)
        run = self._op.prepared(x2, rows) if y.is_cpu and y.is_contiguous() else None
        if run is None or not run(x2, rows, [y], self.starts):
            y = self._added(y, x2, rows)
        elif len(self._runs) < KEPT:
            self._runs[x2.shape[0], x2.dtype] = run
        return y if self.adapters is None else self.adapters.add(y, x2, rows)

    def _added(self, y: Tensor, x2: Tensor, rows: Tensor) -> Tensor:
        pieces = list(y.reshape(-1, y.shape[-1]).split(self.widths, -1))
        made = self._new(x2, rows, [pieces[i] for i in self.places], None)
        if len(pieces) == 1:
            return made[0].reshape(y.shape)
        for i, new in zip(self.places, made, strict=True):
            pieces[i] = new
        return torch.cat(pieces, -1).reshape(y.shape)

    def make(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """((x V) * scale[rows]) Uᵀ + bias, [..., sum of sizes]."""
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        rows = self.rows_of(x)
        y = self._made(x, rows, bias)
        y = y if self.adapters is None else self.adapters.add(y, x, rows)
        return y.reshape(*lead, y.shape[-1])

    def lay_adapters(self) -> None:
        """Take what the bank has laid at the layer's matrices: the adapters that it holds now."""
        now = [getattr(layer, "lora", None) for layer in self._layers]
        if all(a is b for a, b in zip(now, self._laid, strict=True)):
            return
        found = [
            (layer, start)
            for layer, start, lora in zip(self._layers, self.starts, now, strict=True)
            if lora is not None
        ]
        layers, starts = zip(*found, strict=True) if found else ((), ())
        self.adapters = AdapterPath(layers, starts, sum(self.widths)) if found else None
        self._laid = now

    def _made(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """`make` of the factors alone."""
        if self.count == 1:
            return self._new(x, rows, [], bias)[0]
        y = torch.cat(self._new(x, rows, [], None), -1)
        return y if bias is None else y.add_(bias)

    def _new(self, x: Tensor, rows: Tensor, bases: list[Tensor], bias: Tensor | None) -> list[Tensor]:
        """base + ((x V) * scale[rows]) Uᵀ of each member in new memory; bias: of a single member."""
        V = self.Vt.t()
        if self.count == 1:
            return [call(x, V, self.U0, self.scale, rows, bases[0] if bases else None, bias)]
        return call_group(x, V, self.Us, self.scale, rows, bases, [])


class ShardedPath(ExpertPath):
    """`ExpertPath` in factored form with R divided over the ranks as well (S-LoRA, arXiv 2311.03285, section 6).

    | layer | first | between | then |
    |---|---|---|---|
    | column-parallel | V [N, R/tp] and its scale | all-gather of g | U [M/tp, R] |
    | row-parallel | V [N/tp, R] | reduce-scatter of g | U [M, R/tp], and the layer's own all-reduce |
    """

    row_parallel: bool
    ranks: int

    def __init__(
        self,
        members: Sequence[Member],
        layers: Sequence[SVFLinear],
        sizes: Sequence[int],
        token_rows: Tensor,
        *,
        row_parallel: bool,
        ranks: int,
    ):
        super().__init__(members, layers, sizes, token_rows)
        self.row_parallel, self.ranks = row_parallel, ranks

    def _made(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_reduce_scatter

        g = shrink(x, self.Vt.t(), self.scale, rows)
        if self.row_parallel:
            g = tensor_model_parallel_reduce_scatter(g.contiguous(), -1)
        else:
            # all_gather returns rank after rank, each with its share of every member: bring those of a member together.
            g = tensor_model_parallel_all_gather(g.contiguous(), -1).reshape(x.shape[0], self.ranks, -1)
            shares = g.split([U.shape[1] // self.ranks for U in self.Us], -1)
            g = torch.cat([s.reshape(x.shape[0], -1) for s in shares], -1)
        y = torch.cat(expand(g, self.Us, [None] * self.count, [None] * self.count, x.dtype, x.shape[:-1]), -1)
        return y if bias is None else y.add_(bias)


def adapt(layer: Any, path: ExpertPath) -> None:
    """Make a layer add `path` to the output of its own quant method, which keeps its format."""
    base = layer.quant_method
    # A copy keeps the method's class and its other methods, which vLLM asks for.
    method = copy.copy(base)
    of_base, add = base.apply, path.add  # not `layer.svf`: a module is slow to look up its children

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return add(of_base(layer, x, bias), x)

    method.apply = apply
    layer.svf = path
    layer.quant_method = method


def delta_member(
    factor: Factor | Int8Factor, member: Member, rows: int, dtype: torch.dtype, routing: Routing, device: torch.device
) -> DeltaLinear:
    """The table and this rank's factors of one matrix in delta form. rows: of the table; dtype: of the activations."""
    local = member.cut(factor)
    return DeltaLinear(local.to(device), factor.rank, rows, dtype, routing)


def check_weights(
    layer: nn.Module,
    member: Member,
    factor: Factor | Int8Factor,
    dtype: torch.dtype,
    device: torch.device,
    quantised: bool,
) -> None:
    """W v_1 = sigma_1 u_1, by the layer itself, in whatever format it holds W. Raises ValueError where the factors are
    of other weights."""
    u, v = leading_pair(factor)
    y = layer.quant_method.apply(layer, v[member.take].to(device, dtype)[None], None)
    if type(layer).__name__ == "RowParallelLinear" and layer.tp_size > 1:
        from vllm.distributed import tensor_model_parallel_all_reduce

        y = tensor_model_parallel_all_reduce(y)
    mine = torch.cat([y[0].split(list(layer.output_partition_sizes))[i] for i in member.parts]).float().cpu()
    wanted = torch.cat([u[s] for s in member.out])
    check_weight(member.name, factor, mine, wanted, quantised)
