"""The work of one layer, op by op: shapes of known models, weights, which token has which expert, and every way to
compute it that is compared.

y_i = base_i + ((x V) * scale[ids])_i U_iᵀ for the members i of a group (q, k, v; gate, up). In delta form base = x Wᵀ
and scale = sigma (z - 1), in factored form there is no W and scale = sigma z. All arms are given the same W, U, V and
experts; LoRA arms have adapters of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2kernels.factors.int8 import round_columns
from t2kernels.ops import planner, svf_linear_group
from t2kernels.ops.dispatch import shrink
from t2kernels.ops.tuning import sizes

# hidden, intermediate, width of k and v
MODELS = {
    **{n: (hidden, inner, hidden // heads * kv) for n, (hidden, inner, _, heads, kv, _) in sizes.MODELS.items()},
    "small": (1024, 2816, 256),
    "nano": (128, 320, 64),
}
GROUPS = ("qkv", "o", "gate+up", "down")
MIXES = ("one", "8 sorted", "8 random", "half base", "all distinct")
TABLE = 128  # rows of the table
LORA_RANK = 16


def shapes(model: str, group: str) -> tuple[int, tuple[int, ...]]:
    """(N, M of each member)"""
    hidden, inner, kv = MODELS[model]
    return {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate+up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }[group]


def mixed(mix: str, T: int, device) -> Tensor:
    """[T] int32 rows: one expert for all; 8 in runs; 8 at random; half the tokens on the base model; every token
    another one, as far as rows last."""
    g = torch.Generator().manual_seed(0)
    ids = {
        "one": lambda: torch.ones(T, dtype=torch.long),
        "8 sorted": lambda: 1 + torch.arange(T) * 8 // T,
        "8 random": lambda: 1 + torch.randint(8, (T,), generator=g),
        "half base": lambda: torch.where(torch.arange(T) % 2 == 0, 0, 1 + torch.randint(8, (T,), generator=g)),
        "all distinct": lambda: 1 + torch.arange(T) % (TABLE - 1),
    }[mix]()
    return ids.int().to(device)


class Weights(NamedTuple):
    """One copy of a group. W: [M_i, N]; V [N, C], U [M_i, C_i]; scale [E, C] of the form; lora: PEFT's layers over the
    same W."""

    W: list[Tensor]
    V: Tensor
    U: list[Tensor]
    scale: Tensor
    delta: bool
    lora: list[nn.Module] | None = None

    @property
    def parts(self) -> list[int]:
        return [U.shape[1] for U in self.U]


def weights(
    N: int,
    Ms: tuple[int, ...],
    form: str,
    k: int | None,
    format: torch.dtype,
    dtype: torch.dtype,
    device,
    lora: int = 0,
) -> Weights:
    """Random weights of the right sizes. k: components in delta form. format: of U and V; int8 with 3 % residual
    columns. lora: adapters."""

    def factor(rows: int, columns: int) -> Tensor:
        w = torch.randn(rows, columns, device=device) / columns**0.5
        return (w * (127 / w.abs().amax())).round().to(torch.int8) if format == torch.int8 else w.to(format)

    delta = form == "delta"
    ranks = [min(M, N) if k is None else min(k, M, N) for M in Ms]
    if format == torch.int8 and not delta:
        ranks = [R + -(-R // 1024) * 32 for R in ranks]
    V, U = factor(sum(ranks), N).t(), [factor(M, R) for M, R in zip(Ms, ranks, strict=True)]
    scale = torch.rand(TABLE, sum(ranks), device=device) + 0.5
    if format == torch.int8:
        scale /= V.float().norm(dim=0).mean() * U[0].float().norm(dim=0).mean()
    if delta:
        scale[0] = 0
    W = [(torch.randn(M, N, device=device) / N**0.5).to(dtype) for M in Ms]
    if not delta:  # W is what row 0 makes of the factors, as in a model; peers then compute the same function
        W = [((u.float() * s) @ v.float()).to(dtype) for u, s, v in _members(U, scale[0], V)]
    return Weights(W, V, U, scale, delta, [_lora(w, lora) for w in W] if lora else None)


def _members(U: list[Tensor], row: Tensor, V: Tensor):
    parts = [u.shape[1] for u in U]
    return zip(U, row.split(parts), V.t().split(parts), strict=True)


def _lora(W: Tensor, count: int) -> nn.Module:
    """PEFT's layer over nn.Linear with `count` adapters whose B is not zero."""
    layer = copy.deepcopy(_lora_layer(*W.shape, count))
    layer.base_layer.weight = nn.Parameter(W, requires_grad=False)
    return layer.to(W.device, W.dtype).requires_grad_(False)


@functools.cache
def _lora_layer(M: int, N: int, count: int) -> nn.Module:
    import peft

    holder = nn.ModuleDict({"m": nn.utils.skip_init(nn.Linear, N, M, bias=False)})
    config = peft.LoraConfig(r=LORA_RANK, target_modules=["m"], init_lora_weights=False)
    model = peft.LoraModel(holder, {"1": config}, "1")
    for i in range(2, count + 1):
        model.peft_config[str(i)] = config
        model.inject_adapter(holder, str(i))
    layer = holder["m"]
    layer.base_layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # each copy has its own
    return layer


Arm = Callable[[Tensor, Tensor, Weights], list[Tensor]]


def dense(x, ids, w):
    """One model without experts: what is paid today."""
    return [F.linear(x, W) for W in w.W]


def ours(impl: str) -> Arm:
    def run(x, ids, w):
        return svf_linear_group(x, w.V, w.U, w.scale, ids, dense(x, ids, w) if w.delta else None, None, impl)

    return run


def two_matmuls(x, ids, w):
    """The same equation in plain torch."""
    g = ((x @ w.V.to(x.dtype)) * w.scale[ids]).to(x.dtype)
    ys = [g_i @ U.to(x.dtype).t() for g_i, U in zip(g.split(w.parts, 1), w.U, strict=True)]
    return [b + y for b, y in zip(dense(x, ids, w), ys, strict=True)] if w.delta else ys


def made(w: Weights, row: int) -> list[Tensor]:
    """W' of one expert for every member, in W's dtype."""
    dtype = w.W[0].dtype
    new = [(u.to(dtype) * s.to(dtype)) @ v.to(dtype) for u, s, v in _members(w.U, w.scale[row], w.V)]
    return [W + n for W, n in zip(w.W, new, strict=True)] if w.delta else new


def _by_expert(
    x: Tensor, ids: Tensor, w: Weights, Ws_of: Callable[[int], list[Tensor]], rows: dict[int, Tensor]
) -> list[Tensor]:
    ys = [x.new_empty(len(x), W.shape[0]) for W in w.W]
    for row, mine in rows.items():
        for y, W in zip(ys, Ws_of(row), strict=True):
            y[mine] = F.linear(x[mine], W)
    return ys


def rebuilt(rows: dict[int, Tensor]) -> Arm:
    """W' made anew for each expert of the batch, as the authors' release does it (it keeps all components: here as many
    as the form has)."""
    return lambda x, ids, w: _by_expert(x, ids, w, lambda row: made(w, row), rows)


def copies(rows: dict[int, Tensor]) -> Arm:
    """W' of each expert kept in memory."""
    kept: dict[int, dict[int, list[Tensor]]] = {}

    def run(x, ids, w):
        mine = kept.setdefault(id(w.W), {})
        for row in rows:
            if row not in mine:
                mine[row] = made(w, row)
        return _by_expert(x, ids, w, mine.__getitem__, rows)

    return run


def peft_lora(names: list[str]) -> Arm:
    """PEFT's mixed batch: adapter_names, one a token; base where "__base__"."""
    return lambda x, ids, w: [layer(x, adapter_names=names) for layer in w.lora]


def dense_int8() -> Arm:
    """W in int8 as the only factor, by the kernel that reads V: separates the gain of the format from that of
    factoring. No experts."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x, ids, w):
        if id(w.W) not in kept:
            rounded = [round_columns(W.float().t()) for W in w.W]
            V = torch.cat([q for q, _ in rounded], 1).to(torch.int8)
            kept[id(w.W)] = V.t().contiguous().t(), torch.cat([step for _, step in rounded]).reshape(1, -1)
        V, scale = kept[id(w.W)]
        return list(shrink(x, V, scale, ids.new_zeros(())).split([len(W) for W in w.W], 1))

    return run


def lora_names(ids: Tensor, count: int) -> list[str]:
    return ["__base__" if i == 0 else str((i - 1) % count + 1) for i in ids.tolist()]


def rows_of(ids: Tensor) -> dict[int, Tensor]:
    """{row: positions of its tokens}, known before the clock starts."""
    return {int(r): (ids == r).nonzero()[:, 0] for r in ids.unique()}


def exact(x: Tensor, ids: Tensor, w: Weights) -> list[Tensor]:
    """The equation in fp64."""
    g = (x.double() @ w.V.double()) * w.scale.double()[ids]
    ys = [g_i @ U.double().t() for g_i, U in zip(g.split(w.parts, 1), w.U, strict=True)]
    return [y + x.double() @ W.double().t() for y, W in zip(ys, w.W, strict=True)] if w.delta else ys


def exact_dense(x, ids, w):
    return [x.double() @ W.double().t() for W in w.W]


def exact_lora(names: list[str]) -> Arm:
    def run(x, ids, w):
        ys = []
        for layer in w.lora:
            y = x.double() @ layer.weight.double().t()
            for i, name in enumerate(names):
                if name != "__base__":
                    A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
                    y[i] += layer.scaling[name] * (x[i].double() @ A.t()) @ B.t()
            ys.append(y)
        return ys

    return run


def error(ys: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative error of a member."""
    return max(((y.double() - t).norm() / t.norm()).item() for y, t in zip(ys, truth, strict=True))


def call_of(x: Tensor, w: Weights, one: bool) -> planner.Call:
    """The same work as the planner sees it, for its counts of bytes and operations."""
    return planner.Call(
        len(x), x.shape[1], tuple(U.shape[0] for U in w.U), tuple(w.parts), x.dtype, w.V.dtype, one, base=w.delta
    )
