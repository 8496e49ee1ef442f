"""benchmarks/paper.py: the protocol runs on any checkpoint and trains its own experts; the tables follow from rows."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2kernels as t2

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def paper(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper

    return paper


@pytest.mark.slow
def test_the_protocol_on_a_random_model(paper, tmp_path, monkeypatch, capsys):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    t2.tiny.load()[1].save_pretrained(tmp_path / "model")
    for name in ("math", "code", "sub"):
        rows = [
            row | {"split": split}
            for split in ("train", "validation", "test")
            for row in t2.tasks.load(name).split(split, 6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("math", "code", "sub")}
    tasks = ["--trained", files["math"], files["code"], "--unseen", files["sub"], "--related", files["math"]]
    small = ["--n", "2", "--shots", "3", "--steps", "1", "--iterations", "1", "--seeds", "0", "--jobs", "1", "--parts"]
    out = tmp_path / "rows.jsonl"
    where = ["--model", str(tmp_path / "model"), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    parts = ["experts", "lora", "few", "routes"]
    monkeypatch.setattr(sys, "argv", ["paper.py", *where, *tasks, *small, *parts])
    paper.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["experts"] * 3 + ["lora"] * 2 + ["few", "routes"]
    assert {"base", "math", "code", "prompt", "classifier", "lora"} <= rows[-1]["accuracy"].keys()
    assert {"cem", "shuffled", "lora on the shots"} <= rows[-2]["accuracy"].keys()
    expert = t2.Expert.load(tmp_path / "cache" / "experts" / "classify")
    assert expert.manifest["parametrisation"] == "sigmoid"
    assert all(".mlp." in name for name in expert.z)
    before = out.read_text()
    paper.main()  # everything is there
    assert out.read_text() == before
    monkeypatch.setattr(sys, "argv", ["paper.py", *where, "--trained", "nowhere.jsonl", *small, *parts])
    with pytest.raises(SystemExit):
        paper.main()
    assert "no file 'nowhere.jsonl'" in capsys.readouterr().err


def test_the_rows_are_of_the_model_that_is_shipped_and_complete(paper):
    """Other weights than today's are another model: then every cell waits to be measured, and so does each of rl.py."""
    setup = paper.Setup()
    wanted = {
        ("tiny", part, paper.label(part, task), seed)
        for stage in paper.cells(setup, list(paper.PARTS), [0, 1, 2], ["web"])
        for part, task, seed in stage
    }
    assert wanted <= paper.measured(setup, paper.RESULTS / "paper.jsonl")
    assert {row["weights"] for row in paper.read(paper.RESULTS / "rl.jsonl")} == {paper.weights()}


def test_cells_of_other_weights_or_settings_are_measured_again(paper, tmp_path, monkeypatch):
    setup, row = paper.Setup(), {"model": "tiny", "part": "few", "task": "sub", "seed": 1}
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    gain = {"task": "code", "arm": "svf R/8", "seed": 2, "steps": setup.steps, "weights": paper.weights()}
    others = [gain | {"weights": "0" * 12, "seed": 0}, gain | {"steps": 1, "seed": 1}]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (gain, *others)))
    now = paper.settings(setup)
    rows = [
        row | {"settings": now},
        row | {"seed": 0, "settings": now | {"weights": "0" * 12}},
        row | {"seed": 2, "settings": now | {"n": 5}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert paper.measured(setup, tmp_path / "rows.jsonl") == {
        ("tiny", "few", "sub", 1),
        ("tiny", "trained", "code:svf R/8", 2),
    }


def test_the_unseen_tasks_are_those_that_were_fixed(paper):
    assert (
        paper.Setup().unseen
        == tuple(t2.tasks.tiny.UNSEEN)
        == ("sub", "digits", "lookadd", "lookops", "add6", "ops5", "hop5", "revadd")
    )
    assert len(paper.Setup().related) == 8


def test_arms_of_the_tables(paper):
    import paper_tables

    fact = {"cem": {"gain": 0.3, "error": 0.1}, "shuffled": {"gain": 0.1, "error": 0.1}, "best_single": "math"}
    rows = [{"part": "routes", "task": "sub", "accuracy": {"base": 0.4, "math": 0.9}}]
    rows += [
        {"part": "few", "task": "sub", "seed": s, "accuracy": {"cem": 0.8 + s / 10, "shuffled": 0.2}, "facts": fact}
        for s in (0, 1)
    ]
    found = paper_tables.Unseen(rows)
    assert found.arm("sub", "cautious cem") == [0.8, 0.9]
    assert found.arm("sub", "cautious shuffled") == [0.4, 0.4]  # a gain of one standard error keeps the base model
    assert found.arm("sub", "best single") == [0.9, 0.9]
    assert found.line("CEM", "cem") == ["CEM", "0.850 ± 0.050", "0.850"]
    torch.testing.assert_close(found.mean("shuffled"), 0.2)


def test_the_page_follows_from_the_rows(paper, tmp_path, monkeypatch):
    import paper_tables

    page = paper_tables.OUT.read_text()
    monkeypatch.setattr(paper_tables, "OUT", tmp_path / "paper.md")
    paper_tables.main()
    assert (tmp_path / "paper.md").read_text() == page
