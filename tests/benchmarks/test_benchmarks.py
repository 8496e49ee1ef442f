"""benchmarks/: every arm runs and is right on small sizes, a wrong result gets no time, and pages follow from rows."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import t2kernels as t2

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_arms_of_the_op(capsys):
    import ops

    a = ops.arguments([])
    a.models, a.tokens, a.ranks, a.each, a.groups, a.mixes, a.backward = (
        ["nano"],
        [1, 9],
        [8],
        0.0,
        ["qkv", "down"],
        ["all distinct", "half base"],
        24,
    )
    rows = list(ops.run(CPU, a))
    arms = {r["arm"] for r in rows}
    assert {
        "dense, no expert",
        "t2 auto",
        "two matmuls, eager",
        "W' rebuilt an expert",
        "W' kept an expert",
        "PEFT LoRA r=16",
    } <= arms
    assert {r["group"] for r in rows} == {"qkv", "down", "layer"}
    assert all(r["us"] > 0 for r in rows)
    assert all(r["error"] < 1e-5 for r in rows if r["arm"] == "t2 auto" and r["dtype"] == r.get("factors"))
    assert "wrong" not in capsys.readouterr().out
    assert ops.table(rows).row_count > 10


def test_a_wrong_result_gets_no_time(capsys, monkeypatch):
    import cases
    import ops

    right = cases.ours
    monkeypatch.setattr(cases, "ours", lambda impl: lambda x, ids, w: [y * 1.01 for y in right(impl)(x, ids, w)])
    a = ops.arguments([])
    a.models, a.tokens, a.ranks, a.each, a.groups, a.mixes, a.backward, a.forms = (
        ["nano"],
        [5],
        [8],
        0.0,
        ["o"],
        ["one"],
        0,
        ["delta"],
    )
    rows = list(ops.run(CPU, a))
    assert rows
    assert not any(r["arm"].startswith("t2") for r in rows)
    assert "not timed" in capsys.readouterr().out


def test_generate_with_every_arm():
    import generation
    import measure

    arms = list(generation.ARMS)
    field = generation.Field("nano", 4, 6, 3, arms, 4, torch.float32, CPU)
    rows = list(generation.measure(field, arms, [1, 4], 1, 1))
    assert len(rows) == 1 + 2 * (len(arms) - 1)
    assert all(r["error"] < (0.2 if "int8" in r["arm"] else 1e-4) for r in rows)
    assert all(r["over_dense"] > 0 for r in rows)
    # The same tokens as weights that were rebuilt for each expert.
    assert field.run("delta R/16", 4).tokens.equal(field.run(generation.PEERS[0], 4).tokens)
    with torch.no_grad():
        next(iter(field.banks["delta R"].layers))[0].scale[1:] += 0.5
    with pytest.raises(measure.WrongResult, match="delta R"):
        field.check("delta R")


def test_rows_are_loaded_and_take_turns():
    import experts

    rows = [*experts.switching("nano", torch.float32, CPU, 2), experts.many("nano", 40, 8, torch.float32, CPU)]
    assert {r["question"] for r in rows} == {"switch", "many"}
    assert experts.table(rows).row_count == len(rows)


@pytest.mark.parametrize("arm", ["SVF, R/16", "PEFT LoRA r=16"])
def test_a_training_step(arm):
    import training

    row = training.one("nano", arm, torch.float32, CPU, 0.0)
    assert row["last_loss"] < row["first_loss"] + 1e-3
    assert row["optimiser_bytes"] >= 8 * row["numbers"]


def test_batches_with_a_common_prefix():
    import shared_prefix

    from t2kernels.train.policy.shared import divide

    batch = shared_prefix.group(4, 4, 30, 6, 60)
    divided = divide(batch, [0] * 16)
    assert len(divided.first) == 4
    tickets = shared_prefix.tickets(SimpleNamespace(tokenizer=t2.tiny.load()[1]))
    assert len(divide(tickets, [0] * 32).first) == 1


@pytest.mark.parametrize("dtype, checkpointing", [("float32", False), ("bfloat16", True)])
def test_training_steps_in_turn(dtype, checkpointing):
    import training_turns

    args = SimpleNamespace(model="nano", dtype=dtype, factors=None, batch=[2, 8], checkpointing=checkpointing)
    arms = training_turns.build(args, list(training_turns.ARMS))
    assert training_turns.check(arms["svf"], dtype) < training_turns.ALLOWED[dtype]
    for arm in arms.values():
        losses = [arm.step() for _ in range(2)]
        assert losses[1] < losses[0] + 1e-2
        assert all(p.grad is not None for p in arm.parameters)
        assert [len(parts) for parts in arm.seconds] == [3, 3]


@pytest.mark.parametrize("rank", [None, 16])
def test_decomposing_a_layer(rank):
    import decomposition

    row = decomposition.one("nano", 1, rank, torch.float32, CPU)
    assert row["error"] < 1e-6
    assert row["matrices"] == 7


def test_claims_are_judged():
    import suite

    rows = [{"arm": "delta R/16", "experts": 8, "over_one": v} for v in (1.0, 1.3)]
    wanted, found, verdict = suite.CLAIMS[0].judge(rows)
    assert (wanted, verdict) == ("at most 1.15x", "DOES NOT HOLD")
    assert "1.30x" in found
    assert suite.CLAIMS[0].judge(rows[:1])[2] == "holds"
    assert suite.CLAIMS[0].judge([])[2] == "not measured"
    peer = [
        {"arm": "PEFT LoRA r=16", "subject": "s", "batch": 8, "experts": 8, "step_s": 3.0},
        {"arm": "delta R/16", "subject": "s", "batch": 8, "experts": 8, "step_s": 1.0},
    ]
    claim = next(c for c in suite.CLAIMS if c.what.startswith("PEFT"))
    assert claim.judge(peer)[1:] == ("3.00x", "holds")
    assert {c.part for c in suite.CLAIMS} <= set(suite.PARTS)


def test_the_page_follows_from_the_rows(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    before = (plot.DOCS / "benchmarks.md").read_text()
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    monkeypatch.setattr(plot, "HERE", BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(plot, "save", lambda fig, name: BENCHMARKS.parent / name)
    plot.main()
    assert (tmp_path / "benchmarks.md").read_text() == before, "run python benchmarks/plot.py"


def test_the_page_of_real_models_is_that_of_the_rows(monkeypatch, tmp_path):
    import real_tables

    before = real_tables.OUT.read_text()
    monkeypatch.setattr(real_tables, "OUT", tmp_path / "real-models.md")
    real_tables.main()
    assert real_tables.OUT.read_text() == before, "run python benchmarks/real_tables.py"
    assert "{{" not in before


def test_committed_rows_say_where_they_are_from():
    for path in (BENCHMARKS / "results").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {"machine", "versions", "commit", "command"} <= row.keys(), path
            assert not {"/work", "/tmp", "/home"} & set(row["command"].split()), path


@pytest.mark.parametrize("kind", ["power", "spikes", "flat"])
def test_leading_components_beside_the_exact_path(kind, monkeypatch):
    import leading

    monkeypatch.setattr(leading, "RANK", 32)
    row = leading.one(1100, 1024, kind)
    assert row["algorithm"] == "block-lanczos-fp64"
    assert row["exact_algorithm"] == "gram-eigh-fp64"
    assert row["off_fp32"] < 1e-7
    assert row["cpu_ratio"] > 0


@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]])
def test_a_large_layer(targets):
    import large_layer

    row = large_layer.one("nano", 1 / 4, targets)
    assert row["matrices"] == (len(targets) or 7)
    assert row["off_experts"] <= 1.5 * row["off_base"] < row["experts_move"]


def test_a_whole_model(tmp_path):
    import whole_model

    row = whole_model.one(tmp_path, "nano", 16)
    assert (row["matrices"], row["parameters"]) == (14, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128))
    assert row["factors_bytes"] > 4 * 16 * 2 * (2 * 256 + 2 * 192 + 3 * 512)  # fp32 numbers of U and V
    assert row["worst_residual"] < 1e-6
    factors, name = t2.Factors.load(tmp_path / "factors"), row["drawn"][0]
    assert whole_model.off(tmp_path, factors, name, 16) < 1e-6
    weights = load_file(tmp_path / f"layer-{name.split('.')[2]}.safetensors")
    weights[f"{name}.weight"] += 0.01 * torch.randn_like(weights[f"{name}.weight"])
    save_file(weights, tmp_path / f"layer-{name.split('.')[2]}.safetensors")
    assert whole_model.off(tmp_path, factors, name, 16) > 1e-3  # of another weight


def test_experts_on_mixed_traffic_and_unseen_tasks(tmp_path, monkeypatch):
    """Every part, on the built-in model: an expert of a task takes no part in its search, one in other words does."""
    import real_adapt

    monkeypatch.chdir(tmp_path)
    for name, expert in (("parity", "math"), ("size", "code")):
        labels = ("even", "odd") if name == "parity" else ("large", "small")
        splits = ["train"] * 12 + ["test"] * 8
        texts = [f"{i}+{i},{labels[i % 2]},{split}\n" for i, split in enumerate(splits)]
        (tmp_path / f"{name}.csv").write_text("text,label,split\n" + "".join(texts))
        t2.Expert.load(t2.tiny.experts()[expert]).save(tmp_path / f"{name}-0")
    command = (
        "real_adapt.py --model tiny --experts . --trained parity.csv size.csv --seeds 0 1 --shots 4 --out out.jsonl"
    )
    monkeypatch.setattr(
        sys, "argv", [*command.split(), "--routers", "nearest", "--unseen", "parity.csv", "size.csv=a,b"]
    )
    real_adapt.main()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    routed = {r["arm"]: r for r in rows if r["part"] == "routing"}
    assert set(routed) == {
        "base",
        "own",
        "nearest",
        "parity",
        "size",
    }  # the question of `prompt` is too long for this model
    few = {(r["task"], r["seed"], r["arm"]): r for r in rows if r["part"] == "few-shot"}
    assert {key[:2] for key in few} == {(t, s) for t in ("parity", "size_reworded") for s in (0, 1)}
    assert few["parity", 0, "base"]["unseen_for"] == ["size"]
    assert few["size_reworded", 0, "base"]["unseen_for"] == ["parity", "size"]
    assert few["parity", 1, "base"]["N"] == 16  # 20 rows less the examples
    for (task, seed, arm), row in few.items():
        if arm in ("single", "cautious"):
            assert row["accuracy"] == few[task, seed, row["note"]]["accuracy"]
