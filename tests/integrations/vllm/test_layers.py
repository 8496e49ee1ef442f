"""What the vLLM plugin does at a linear layer, on stand-ins for vLLM's layers: every part over 1, 2 and 4 ranks against
W' in fp64.
"""

import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels.experts.table import ScaleTable
from t2kernels.factors.factor import svd
from t2kernels.integrations.vllm.engine.factored import Factored, share
from t2kernels.integrations.vllm.engine.lora_layers import (
    ExpertPath,
    FactoredMember,
    ShardedPath,
    adapt,
    check_weights,
    delta_member,
    members_of,
)
from t2kernels.integrations.vllm.settings import Settings
from t2kernels.layers.linear import DeltaLinear
from t2kernels.layers.routing.active import Routing
from t2kernels.layers.scale import make_scale

N, HEAD, T, E = 48, 8, 13, 4
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def layer_of(kind, rank, ranks, n=N, sizes=(), replicas=1):
    """A layer as vLLM makes it, as far as the plugin looks at it. sizes: of the whole matrices"""
    layer = type(kind, (nn.Module,), {})()
    layer.tp_rank, layer.tp_size, layer.input_size = rank, ranks, n
    if kind == "RowParallelLinear":
        layer.output_size, layer.output_partition_sizes = sizes[0], [sizes[0]]
        return layer
    shares = [ranks, *[ranks // replicas] * 2] if kind == "QKVParallelLinear" else [ranks] * len(sizes)
    shares = [1] * len(sizes) if kind == "ReplicatedLinear" else shares
    layer.output_partition_sizes = [m // s for m, s in zip(sizes, shares, strict=True)]
    layer.num_kv_head_replicas = replicas
    return layer


CASES = {
    "o_proj": ("RowParallelLinear", (40,), 1),
    "down": ("RowParallelLinear", (64,), 1),
    "qkv_proj": ("QKVParallelLinear", (8 * HEAD, 4 * HEAD, 4 * HEAD), 1),
    "one_head": ("QKVParallelLinear", (8 * HEAD, HEAD, HEAD), None),  # each key and value head is on several ranks
    "gate_up_proj": ("MergedColumnParallelLinear", (64, 64), 1),
    "fused": ("MergedColumnParallelLinear", (64, 32), 1),  # the checkpoint holds it as one matrix
    "up": ("ColumnParallelLinear", (72,), 1),
    "whole": ("ReplicatedLinear", (24,), 1),
}


def names_of(case):
    leaf = "qkv_proj" if case == "one_head" else case
    return f"model.layers.3.{leaf}", {**PACKED, "fused": ["fused"]}


def world(case, ranks, form, rank_k=None):
    """Weights, factors and z of a case, and each rank's layer with its members' tables. z of row 0 is 1."""
    kind, sizes, replicas = CASES[case]
    replicas = ranks if replicas is None else replicas
    path, packed = names_of(case)
    count = 1 if case == "fused" else len(sizes)
    shapes = [(sum(sizes), N)] if count == 1 else [(m, N) for m in sizes]
    Ws = [torch.randn(s) for s in shapes]
    factors = [svd(W, rank_k) for W in Ws]
    zs = [torch.cat([torch.ones(1, f.rank), 1 + 0.7 * torch.randn(E - 1, f.rank)]) for f in factors]
    ranked = []
    for r in range(ranks):
        layer = layer_of(kind, r, ranks, sizes=sizes, replicas=replicas)
        members = members_of(path, layer, packed)
        assert [m.shape for m in members] == shapes
        ranked.append((layer, members))
    return Ws, factors, zs, ranked


def tables(made, zs):
    ScaleTable([(m, (str(i),)) for i, m in enumerate(made)], E)
    for m, z in zip(made, zs, strict=True):
        for e in range(E):
            m.scale[e].copy_(m.columns(make_scale(z[e], m.sigma, m.form)))


def dense(Ws, factors, zs, x, ids):
    """[x W'ᵀ of every matrix] in fp64, W' = W + U diag(sigma (z - 1)) Vᵀ."""
    out = []
    for W, f, z in zip(Ws, factors, zs, strict=True):
        U, sigma, V = (t.double() for t in f)
        per = [x.double() @ (W.double() + (U * sigma * (z[e].double() - 1)) @ V.t()).t() for e in range(E)]
        out.append(torch.stack(per)[ids.long(), torch.arange(len(x))])
    return out


def together(case, parts, ranks, sizes):
    """What vLLM makes of the ranks' outputs: their sum, or their parts side by side in the order of the matrices."""
    kind, whole, _ = CASES[case]
    if kind == "RowParallelLinear":
        return [torch.stack(parts).sum(0)]
    if kind == "ReplicatedLinear":
        return [parts[0]]
    outputs = []
    for i, m in enumerate(whole):
        pieces = [p.split(sizes[r], -1)[i] for r, p in enumerate(parts)]
        step = ranks * pieces[0].shape[-1] // m  # ranks that share a head hold the same
        for r, p in enumerate(pieces):
            assert torch.equal(p, pieces[r // step * step])
        outputs.append(torch.cat(pieces[::step], -1))
    return [torch.cat(outputs, -1)] if case == "fused" else outputs


def x_of(layer, x):
    if type(layer).__name__ != "RowParallelLinear":
        return x
    width = layer.input_size // layer.tp_size
    return x[:, layer.tp_rank * width : (layer.tp_rank + 1) * width]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("rank_k", [None, 5])
def test_delta_over_ranks(case, ranks, rank_k):
    Ws, factors, zs, ranked = world(case, ranks, "delta", rank_k)
    x, ids = torch.randn(T, N), torch.randint(0, E, (T,), dtype=torch.int32)
    token_rows = torch.zeros(32, dtype=torch.int32)
    token_rows[:T] = ids
    parts = []
    for layer, members in ranked:
        made = [
            delta_member(f, m, E, torch.float32, Routing(), torch.device("cpu"))
            for f, m in zip(factors, members, strict=True)
        ]
        tables(made, zs)
        local = [torch.cat([W[s] for s in m.out])[:, m.take] for W, m in zip(Ws, members, strict=True)]
        layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias=None, W=torch.cat(local): x @ W.t())
        adapt(layer, ExpertPath(members, made, layer.output_partition_sizes, token_rows))
        parts.append(layer.quant_method.apply(layer, x_of(layer, x)))
        twice = layer.quant_method.apply(layer, x_of(layer, x)[None])  # any leading sizes
        torch.testing.assert_close(twice[0], parts[-1])
    found = together(case, parts, ranks, [layer.output_partition_sizes for layer, _ in ranked])
    for y, wanted in zip(found, dense(Ws, factors, zs, x, ids), strict=True):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def test_matrices_of_a_merged_layer_that_have_no_factors_are_left_alone():
    Ws, factors, zs, ((layer, members),) = world("qkv_proj", 1, "delta")
    made = [delta_member(factors[i], members[i], E, torch.float32, Routing(), torch.device("cpu")) for i in (0, 2)]
    tables(made, [zs[0], zs[2]])
    token_rows = torch.full((T,), 2, dtype=torch.int32)
    x = torch.randn(T, N)
    base = x @ torch.cat(Ws).t()
    y = ExpertPath([members[0], members[2]], made, layer.output_partition_sizes, token_rows).add(base, x)
    q, k, v = y.split(layer.output_partition_sizes, -1)
    assert torch.equal(k, base.split(layer.output_partition_sizes, -1)[1])
    wanted = dense(Ws, factors, zs, x, token_rows)
    torch.testing.assert_close(q.double(), wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v.double(), wanted[2], rtol=1e-4, atol=1e-4)


def test_the_base_model_is_bitwise_what_it_was():
    Ws, factors, zs, ((layer, members),) = world("gate_up_proj", 1, "delta")
    made = [
        delta_member(f, m, E, torch.float32, Routing(), torch.device("cpu"))
        for f, m in zip(factors, members, strict=True)
    ]
    tables(made, zs)
    x = torch.randn(T, N)
    base = x @ torch.cat(Ws).t()
    path = ExpertPath(members, made, layer.output_partition_sizes, torch.zeros(T, dtype=torch.int32))
    assert torch.equal(path.add(base, x), base)


class Ranks:
    """`vllm.distributed` for ranks that are threads of this process."""

    def __init__(self, count):
        self.count, self.here, self.sent = count, threading.local(), {}
        self.barrier = threading.Barrier(count, timeout=30)

    def exchange(self, t):
        self.sent[self.here.rank] = t
        self.barrier.wait()
        everyone = [self.sent[r] for r in range(self.count)]
        self.barrier.wait()
        return everyone

    def tensor_model_parallel_all_gather(self, t, dim=-1):
        return torch.cat(self.exchange(t), dim)

    def tensor_model_parallel_reduce_scatter(self, t, dim=-1):
        return torch.stack(self.exchange(t)).sum(0).chunk(self.count, dim)[self.here.rank]

    def tensor_model_parallel_all_reduce(self, t):
        return torch.stack(self.exchange(t)).sum(0)

    def run(self, work):
        out, errors = [None] * self.count, []

        def one(rank):
            self.here.rank = rank
            try:
                out[rank] = work(rank)
            except BaseException as e:
                errors.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.count)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))
        return out


@pytest.fixture
def distributed(monkeypatch):
    def of(count):
        ranks, module = Ranks(count), ModuleType("vllm.distributed")
        for name in dir(ranks):
            if name.startswith("tensor_model"):
                setattr(module, name, getattr(ranks, name))
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.distributed", module)
        return ranks

    return of


@pytest.mark.parametrize("ranks, shard", [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("case", ["o_proj", "qkv_proj", "one_head", "gate_up_proj", "up"])
@pytest.mark.parametrize("biased", [False, True])
def test_factored_over_ranks(distributed, case, ranks, shard, biased):
    Ws, factors, zs, ranked = world(case, ranks, "factored")
    group = distributed(ranks)
    x, ids = torch.randn(T, N), torch.randint(0, E, (T,), dtype=torch.int32)
    token_rows = torch.zeros(32, dtype=torch.int32)
    token_rows[:T] = ids
    paths, biases = [], []
    row_parallel = CASES[case][0] == "RowParallelLinear"
    whole = [torch.randn(W.shape[0]) for W in Ws]
    for r, (layer, members) in enumerate(ranked):
        local = [m.cut(f) for f, m in zip(factors, members, strict=True)]
        local = [share(f, r, ranks, row_parallel) for f in local] if shard else local
        made = [FactoredMember(f, f.rank, E, torch.float32, Routing()) for f in local]
        tables(made, zs)
        arguments = members, made, layer.output_partition_sizes, token_rows
        paths.append(
            ShardedPath(*arguments, row_parallel=row_parallel, ranks=ranks) if shard else ExpertPath(*arguments)
        )
        mine = torch.cat([torch.cat([b[s] for s in m.out]) for b, m in zip(whole, members, strict=True)])
        biases.append((mine if not row_parallel or r == 0 else None) if biased else None)
        if shard and row_parallel:
            assert made[0].U.shape == (CASES[case][1][0], factors[0].rank // ranks)
        elif shard:
            assert made[0].Vt.shape == (factors[0].rank // ranks, N)
    parts = group.run(lambda r: paths[r].make(x_of(ranked[r][0], x), biases[r]))
    found = together(case, parts, ranks, [layer.output_partition_sizes for layer, _ in ranked])
    for y, wanted, b in zip(found, dense(Ws, factors, zs, x, ids), whole, strict=True):
        torch.testing.assert_close(y.double(), wanted + b if biased else wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ["o_proj", "qkv_proj", "one_head", "fused"])
def test_factors_of_other_weights_are_found_out(distributed, case, ranks):
    Ws, factors, _, ranked = world(case, ranks, "delta")
    group = distributed(ranks)
    for layer, members in ranked:
        local = [torch.cat([W[s] for s in m.out])[:, m.take] for W, m in zip(Ws, members, strict=True)]
        layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias=None, W=torch.cat(local): x @ W.t())

    def check(of, quantised):
        def one(rank):
            layer, members = ranked[rank]
            for m, factor in zip(members, of, strict=True):
                check_weights(layer, m, factor, torch.float32, torch.device("cpu"), quantised)

        group.run(one)

    rounded = [svd(W + 0.1 * torch.randn_like(W)) for W in Ws]
    check(factors, False)
    check(rounded, True)
    for of, quantised in (
        (rounded, False),
        ([svd(torch.randn_like(W)) for W in Ws], False),
        ([svd(torch.randn_like(W)) for W in Ws], True),
    ):
        group = distributed(ranks)  # the threads of the last one stopped in the middle
        with pytest.raises(ValueError, match="other weights"):
            check(of, quantised)


def test_layers_that_are_not_known():
    with pytest.raises(ValueError, match="DCPGroupColumnParallelLinear, whose partition"):
        members_of("a.b", layer_of("DCPGroupColumnParallelLinear", 0, 1, sizes=(8,)), {})
    with pytest.raises(ValueError, match="which is which"):
        members_of("a.in_proj", layer_of("MergedColumnParallelLinear", 0, 1, sizes=(8, 8, 8)), {"in_proj": ["x", "y"]})


def test_a_layer_that_sees_other_tokens_than_the_step():
    _, factors, zs, ((_, members),) = world("up", 1, "delta")
    made = [DeltaLinear(factors[0], 5, E, torch.float32, Routing())]
    tables(made, zs)
    path = ExpertPath(members, made, [72], torch.zeros(8, dtype=torch.int32))
    path.step = SimpleNamespace(tokens=4, rows=path.token_rows[:4], plain=False)
    path.add(torch.zeros(6, 72), torch.randn(6, N))  # padded
    for count in (3, 9):
        with pytest.raises(RuntimeError, match="other tokens than the step's"):
            path.add(torch.zeros(count, 72), torch.randn(count, N))


@torch.no_grad()
def test_steps_after_the_first_ask_nothing_again_and_use_their_own_rows(monkeypatch):
    Ws, factors, zs, ((_, members),) = world("gate_up_proj", 1, "delta")
    made = [DeltaLinear(f, f.rank, E, torch.float32, Routing()) for f in factors]
    tables(made, zs)
    path, asked = ExpertPath(members, made, [W.shape[0] for W in Ws], torch.zeros(8, dtype=torch.int32)), []
    real = path._op.prepared
    monkeypatch.setattr(path._op, "prepared", lambda x, rows: asked.append(x) or real(x, rows))
    for tokens in (4, 4, 1, 4, 1, 4):
        path.step = SimpleNamespace(tokens=tokens, rows=torch.randint(0, E, (tokens,), dtype=torch.int32), plain=True)
        x = torch.randn(tokens, N)
        y = torch.cat([x @ W.t() for W in Ws], -1)
        wanted = torch.cat(dense(Ws, factors, zs, x, path.step.rows), -1)
        torch.testing.assert_close(path.add(y, x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert len(asked) == 2  # once for each number of tokens
    path.step.plain = False
    path.add(y, x)
    assert len(asked) == 3
    with pytest.raises(RuntimeError, match="other tokens than the step's"):
        path.add(torch.zeros(3, y.shape[1]), torch.randn(3, N))


def factored(case, ranks, layout="auto", dtype=torch.float32, rank=0, names=None, cut=None, format=None):
    """What a factored layer reads and lays out."""
    kind, sizes, _ = CASES[case]
    path, packed = names_of(case)
    layer = layer_of(kind, rank, ranks, sizes=sizes)
    members = members_of(path, layer, packed)
    factors = t2.Factors(
        {m.name: svd(torch.randn(m.shape), cut) for m in members if names is None or m.name.endswith(names)}
    )
    factors = factors if format is None else factors.to_format(format)
    quantization = SimpleNamespace(names={n: n for n in factors}, packed_modules_mapping=packed)
    method = SimpleNamespace(
        quantization=quantization, prefix=path, factors=factors, settings=Settings(layout=layout), dtype=dtype
    )
    return Factored(method, layer, 3, torch.device("cpu"))


def test_layouts_are_chosen_by_size(monkeypatch):
    assert not factored("qkv_proj", 2).shard
    assert factored("qkv_proj", 2, "shard").shard
    assert not factored("qkv_proj", 1, "shard").shard
    copied = N * (N + 2 * 4 * HEAD) * 4  # V of q [48, 48] and of k and v [48, 32], in fp32
    monkeypatch.setattr("t2kernels.integrations.vllm.engine.factored.SHARD_BYTES", copied)
    assert factored("qkv_proj", 2).shard
    assert not factored("qkv_proj", 2, "replicate").shard
    assert not factored("qkv_proj", 2, dtype=torch.bfloat16).shard  # half of it
    assert not factored("fused", 2).shard  # one matrix in two places
    monkeypatch.setattr("t2kernels.integrations.vllm.engine.factored.SHARD_BYTES", 0)
    assert factored("o_proj", 4).shard
    assert not factored("o_proj", 4, format="int8").shard
    for bad in (dict(case="fused", ranks=2), dict(case="o_proj", ranks=2, format="int8"), dict(case="o_proj", ranks=3)):
        with pytest.raises(ValueError, match="layout='shard' needs"):
            factored(layout="shard", **bad)


def test_factored_layers_that_cannot_be():
    with pytest.raises(ValueError, match=r"k_proj is not among the factored matrices.*merges it"):
        factored("qkv_proj", 1, names=("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="5 of 40 components"):
        factored("o_proj", 1, cut=5)


def test_factors_keep_the_dtype_of_the_model():
    made = factored("qkv_proj", 2, "shard", torch.bfloat16)
    assert {m.Vt.dtype for m, _ in made.pairs} | {m.U.dtype for m, _ in made.pairs} == {torch.bfloat16}
    assert {m.scale.dtype for m, _ in made.pairs} == {torch.float32}
    assert {m.U.dtype for m, _ in factored("o_proj", 2, format="int8").pairs} == {torch.int8}
