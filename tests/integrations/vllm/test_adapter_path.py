"""LoRA adapters beside experts at the plugin's layers, over ranks, and in its manager, without vLLM."""

from types import SimpleNamespace

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.experts.table import ScaleTable
from t2kernels.integrations.vllm.engine.adapter_path import cut, follow
from t2kernels.integrations.vllm.engine.factored import share
from t2kernels.integrations.vllm.engine.lora_layers import ExpertPath, FactoredMember, ShardedPath, delta_member
from t2kernels.integrations.vllm.engine.manager import ExpertManager
from t2kernels.layers.routing.active import Routing
from tests.integrations.vllm.test_layers import CASES, E, N, T, dense, distributed, together, world, x_of
from tests.integrations.vllm.test_manager import request, run

assert distributed  # a fixture
RANK, ROW = 3, 2


def adapter_for(Ws, which):
    return t2.LoraAdapter({str(i): (torch.randn(len(Ws[i]), RANK), torch.randn(RANK, N)) for i in which})


def banks(ranked, factors, form, ranks, row_parallel, shard):
    """(layer, path, bank) of each rank, with the base model in every row. A bank as far as adapters look at it."""
    ids = torch.tensor([0, 1, ROW, 3], dtype=torch.int32).repeat(T)[:T]
    for r, (layer, members) in enumerate(ranked):
        if form == "delta":
            made = [
                delta_member(f, m, E, torch.float32, Routing(), torch.device("cpu"))
                for f, m in zip(factors, members, strict=True)
            ]
        else:
            local = [m.cut(f) for f, m in zip(factors, members, strict=True)]
            local = [share(f, r, ranks, row_parallel) for f in local] if shard else local
            made = [FactoredMember(f, f.rank, E, torch.float32, Routing()) for f in local]
        pairs = [(m, (str(i),)) for i, m in enumerate(made)]
        table = ScaleTable(pairs, E)
        arguments = members, made, layer.output_partition_sizes, ids
        path = ShardedPath(*arguments, row_parallel=row_parallel, ranks=ranks) if shard else ExpertPath(*arguments)
        bank = SimpleNamespace(table=table, layers=pairs)
        follow(bank, [path])
        yield layer, path, bank


@pytest.mark.parametrize(
    "form, ranks, shard", [("delta", 1, 0), ("delta", 2, 0), ("factored", 2, 0), ("factored", 2, 1)]
)
@pytest.mark.parametrize("case", ["o_proj", "qkv_proj", "one_head", "gate_up_proj", "up"])
def test_an_adapter_at_some_matrices_over_ranks(distributed, case, form, ranks, shard):
    Ws, factors, zs, ranked = world(case, ranks, form)
    x, ids = torch.randn(T, N), torch.tensor([0, 1, ROW, 3], dtype=torch.int32).repeat(T)[:T]
    which = [0, 2] if len(Ws) == 3 else [len(Ws) - 1]
    adapter, other = adapter_for(Ws, which), adapter_for(Ws, range(len(Ws)))
    group, made = distributed(ranks), list(banks(ranked, factors, form, ranks, case == "o_proj", bool(shard)))

    def outputs():
        def one(r):
            layer, path, _ = made[r]
            local = [torch.cat([W[s] for s in m.out])[:, m.take] for W, m in zip(Ws, ranked[r][1], strict=True)]
            mine = x_of(layer, x)
            return path.add(mine @ torch.cat(local).t(), mine) if form == "delta" else path.make(mine, None)

        return together(case, group.run(one), ranks, [layer.output_partition_sizes for layer, _ in ranked])

    def wanted(of):
        base = dense(Ws, factors, [torch.ones_like(z) for z in zs], x, ids)
        change = {int(n): x.double() @ (B.double() @ A.double()).t() for n, (B, A) in of.pairs.items()}
        return [y + (ids == ROW).double()[:, None] * change.get(i, 0) for i, y in enumerate(base)]

    before = outputs()
    for _, _, bank in made:
        bank.table.adapters.add("unused", cut(other, bank))
        bank.table.adapters.add("a", cut(adapter, bank))
    unused = outputs()
    for a, b in zip(before, unused, strict=True):
        assert torch.equal(a, b)  # no row uses them: the bits are those of before
    for _, _, bank in made:
        bank.table.adapters.set(ROW, {"a": 1.0})
    for y, want in zip(outputs(), wanted(adapter), strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    for _, path, bank in made:
        bank.table.adapters.remove("unused")
        assert path.adapters is not None
    for y, want in zip(outputs(), wanted(adapter), strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    for _, path, bank in made:
        bank.table.adapters.remove("a")
        assert path.adapters is None
    for a, b in zip(before, outputs(), strict=True):
        assert torch.equal(a, b)


def test_output_in_pieces_is_output_in_place():
    """What the C++ kernels do not take (a y that is not contiguous) goes the long way."""
    Ws, factors, _, ranked = world("qkv_proj", 1, "delta")
    ((_, path, bank),) = banks(ranked, factors, "delta", 1, False, False)
    bank.table.adapters.add("a", adapter_for(Ws, [0, 2]))
    bank.table.adapters.set(ROW, {"a": 0.5})
    x, base = torch.randn(T, N), torch.randn(T, sum(CASES["qkv_proj"][1]))
    strided = torch.full((T, 2 * base.shape[1]), float("nan"))[:, ::2]
    strided.copy_(base)
    torch.testing.assert_close(path.add(strided, x), path.add(base.clone(), x), rtol=1e-4, atol=1e-4)


# --- the manager


@pytest.fixture
def world_of(tmp_path):
    model, _ = tiny.load()
    bank = t2.patch_model(model, targets="attention", rank=8, form="delta", rows=3)
    manager = ExpertManager(bank, torch.zeros(64, dtype=torch.int32), host=4)
    files = {}
    for e in range(1, 7):
        g = torch.Generator().manual_seed(e)
        if e % 2:
            z = {n: 1 + torch.randn(k, generator=g) for n, k in bank.matrices.items()}
            files[e] = bank.expert(z).save(tmp_path / f"e{e}")
        else:
            pairs = {
                names[0]: (torch.randn(len(layer.U), 2, generator=g), torch.randn(2, layer.Vt.shape[1], generator=g))
                for layer, names in bank.layers
            }
            files[e] = t2.LoraAdapter(pairs).save(tmp_path / f"a{e}")
    return manager, bank, files


def used(manager, bank, start):
    """{adapter: weight} of the row of a token."""
    return bank.table.adapters._weights.get(int(manager.token_rows[start]), {})


def test_steps_with_experts_and_adapters(world_of):
    manager, bank, files = world_of
    for a, b in ((1, 2), (2, 4), (3, 2), (5, 6), (6, 1), (4, 3)):
        run(manager, files, (a, 2), (0, 1), (b, 3))
        for token, number in ((0, a), (2, 0), (3, b)):
            assert used(manager, bank, token) == ({} if number % 2 or not number else {str(number): 1.0})
        assert len(manager.list_adapters()) <= 4
        assert set(bank.adapters) == {str(n) for n in manager.list_adapters() if n % 2 == 0}


def test_an_adapter_of_the_last_step_is_replaced_and_removed(world_of):
    manager, bank, files = world_of
    run(manager, files, (2, 1), (1, 1))
    assert manager.add_adapter(request(2, files[4], inplace=True))
    assert bank.adapter("2").equals(t2.LoraAdapter.load(files[4]))
    manager.set_active_adapters([request(2, files[4])], SimpleNamespace(index_mapping=(2, 2)))
    assert used(manager, bank, 1) == {"2": 1.0}
    assert manager.remove_adapter(2)
    assert bank.adapters == []
    run(manager, files, (1, 1))
    assert used(manager, bank, 0) == {}
    assert manager.remove_adapter(1)
    manager.set_active_adapters([], SimpleNamespace(index_mapping=()))
    assert bank.rows_in_use == 0


def test_an_adapter_of_another_model_is_refused(world_of):
    manager, _, _ = world_of
    with pytest.raises(t2.InputError, match="not patched"):
        manager.bank.add(
            "9", cut(t2.LoraAdapter({"other": (torch.ones(4, 1), torch.ones(1, 4))}), SimpleNamespace(layers=[]))
        )
