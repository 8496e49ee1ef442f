"""The history file, the curve, and the best expert of a run."""

import builtins
import json
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels import tiny
from t2kernels.storage import write_tensors
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.steering import curve
from t2kernels.train.steering.best import BestExperts
from t2kernels.train.steering.history import read

SCRIPT = [0.25, 0.5, 0.75, 0.5, 0.75, 0.25]  # accuracy at steps 0, 1, ... 5


def run(folder, scripted=(), **changes):
    model, tokenizer = tiny.load()
    t2.patch_model(model, form="delta", rank=4)
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 4, "max_new_tokens": 4, "logging_steps": 1, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, **changes,
    }  # fmt: skip
    task = t2.tasks.load("math")
    trainer = SVFTrainer(
        model, SVFConfig(str(folder), **settings), task, task.split("validation")[:4], experts="mine",
        processing_class=tokenizer,
    )  # fmt: skip
    values, seen = iter(scripted), []
    answer = trainer._answer

    def judged(rows):
        found = answer(rows)
        if not scripted:
            return found
        right = round(4 * next(values))
        if trainer.bank.in_training:
            seen.append([p.detach().clone() for p in trainer.bank.trained_parameters("mine").values()])
        return [(e, 1.0 if i < right else -1.0, n) for i, (e, _, n) in enumerate(found)]

    trainer._answer = judged
    return trainer, seen


def test_the_first_of_the_best_experts_is_kept(tmp_path):
    trainer, seen = run(tmp_path, SCRIPT, keep_best=True)
    trainer.train()
    expert = trainer.experts["mine"]
    for z, p in zip(expert.z.values(), seen[2], strict=True):  # step 2
        torch.testing.assert_close(z.reshape(-1), 1 + p.reshape(-1))
    facts = expert.manifest
    assert (facts["steps"], facts["accuracy_before"], facts["accuracy_after"]) == (2, 0.25, 0.75)
    assert list(tmp_path.iterdir()) == []  # no checkpoint was needed
    last, _ = run(tmp_path, SCRIPT)
    last.train()
    assert last.experts["mine"].manifest["steps"] == 5
    assert last.experts["mine"] != expert


def test_the_last_step_is_looked_at_as_well(tmp_path):
    trainer, _ = run(tmp_path, [0.25, 0.5, 0.75], keep_best=True, eval_steps=2, max_steps=3)
    trainer.train()
    assert trainer.experts["mine"].manifest["steps"] == 3


def test_what_is_kept_when_a_run_is_stopped(tmp_path):
    trainer, _ = run(tmp_path, SCRIPT, keep_best=True)
    rollout, steps = trainer.rollout, []

    def stopping(rows):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return rollout(rows)

    trainer.rollout = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.experts["mine"].manifest["steps"] == 2


def test_keeping_the_best_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="set eval_strategy"):
        SVFConfig(str(tmp_path), keep_best=True)


def test_best_experts_are_copies_and_each_its_own():
    best, p = BestExperts(), nn.Parameter(torch.zeros(3))
    assert best.restore("a", {"m": p}) is None
    best.offer("a", 0.5, 10, {"m": p})
    with torch.no_grad():
        p.fill_(1)
    best.offer("a", 0.5, 20, {"m": p})  # not more
    best.offer("b", 0.1, 20, {"m": p})
    assert best.restore("a", {"m": p}) == 10
    assert p.tolist() == [0, 0, 0]
    assert best.restore("b", {"m": p}) == 20
    assert p.tolist() == [1, 1, 1]


def test_history_has_every_log_and_goes_on_after_a_resume(tmp_path):
    file = tmp_path / "run.jsonl"
    settings = {"history": str(file), "save_strategy": "steps", "save_steps": 2}
    trainer, _ = run(tmp_path / "out", **settings, max_steps=3)
    trainer.train()
    rows = read(file)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 1, 2, 3]
    assert rows[0]["step"] == 0
    assert {"reward", "accuracy", "kl", "entropy", "completion_length", "same_text"} <= rows[1].keys()
    again, _ = run(tmp_path / "out", **settings, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert [row["step"] for row in read(file) if "loss" in row] == [1, 2, 3, 4]
    other, _ = run(tmp_path / "other", history=str(file), max_steps=1)
    other.train()
    assert [row["step"] for row in read(file) if "loss" in row] == [1]


@pytest.mark.parametrize(("line", "message"), [("{", "line 2"), ("[1]", "no step"), ('{"loss": 1}', "no step")])
def test_a_file_that_is_no_history(tmp_path, line, message):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"step": 1}) + f"\n{line}\n")
    with pytest.raises(t2.T2Error, match=message):
        read(file)
    with pytest.raises(t2.T2Error, match="no history"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line", [b"\xff", b'{"step":' + b"[" * 9000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": true}']
)
def test_damage_of_a_history_is_named(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(t2.InputError, match=r"x\.jsonl, line 2"):
        read(file)


def test_a_run_goes_on_after_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "run.jsonl"
    settings = {"history": str(file), "save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "out", **settings, max_steps=1)[0].train()
    file.write_bytes(file.read_bytes() + b'{"step": 2, "lo')  # its process was killed
    with pytest.raises(t2.InputError, match="line"):
        read(file)
    again, _ = run(tmp_path / "out", **settings, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert [row["step"] for row in read(file) if "loss" in row] == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_the_curve_shows_every_number(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": 0, "eval_accuracy": 0.4, "eval_accuracy_se": 0.05}]
    rows += [{"step": k, "accuracy": 0.4 + 0.1 * k, "reward": 0.1 * k, "kl": 0.3 * k} for k in (1, 2, 3)]
    made = curve.plot(rows, tmp_path / "new/run.svg", "SST-2 & more")
    text = "".join(ET.parse(made).getroot().itertext()) + made.read_text()
    assert "KL to the base model" in text
    assert "held out" in text
    without = [{k: v for k, v in row.items() if k != "kl"} for row in rows]
    assert "KL" not in curve.plot(without, tmp_path / "no-kl.svg").read_text()  # no panel without a line
    assert curve.plot(rows, tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(t2.T2Error, match="no step in the history"):
        curve.plot(rows[:1], tmp_path / "run.svg")
    with pytest.raises(t2.T2Error, match=r"\.svg"):
        curve.plot(rows, tmp_path / "run.txt")


def test_without_matplotlib_the_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(t2.T2Error, match="pip install matplotlib"):
        curve.check(tmp_path / "run.svg")


def test_the_best_experts_go_through_a_checkpoint(tmp_path):
    best, p = BestExperts(), torch.nn.Parameter(torch.randn(5))
    best.save(tmp_path)
    assert not list(tmp_path.iterdir())
    wanted = p.detach().clone()
    best.offer("a", 0.25, 7, {"m": p})
    best.save(tmp_path)
    found = BestExperts.load(tmp_path)
    found.offer("a", 0.25, 9, {"m": torch.nn.Parameter(torch.zeros(5))})
    p.data.zero_()
    assert found.restore("a", {"m": p}) == 7
    assert torch.equal(p, wanted)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match="is damaged"):
        BestExperts.load(tmp_path)


@pytest.mark.parametrize("kept", [torch.zeros(1), torch.zeros(4), torch.tensor([1.0, float("nan"), 0.0])])
def test_the_best_experts_of_another_run_are_refused(tmp_path, kept):
    """A tensor of one number would be copied into each of the parameters, without a word."""
    best, p = BestExperts(), nn.Parameter(torch.zeros(3))
    best.offer("a", 0.5, 1, {"m": nn.Parameter(kept)})
    best.save(tmp_path)
    with pytest.raises(t2.ExpertError, match="finite" if kept.isnan().any() else "another rank: m differs"):
        BestExperts.load(tmp_path, {"a": {"m": p}})
    with pytest.raises(t2.ExpertError):
        BestExperts.load(tmp_path, {"b": {"m": p}})


@pytest.mark.parametrize(
    "facts", [{}, {"best": {"a": [1.0]}}, {"best": {"a": [float("nan"), 1]}}, {"best": {"a": [1, -1]}}]
)
def test_an_odd_manifest_of_the_best_experts_is_refused(tmp_path, facts):
    write_tensors(tmp_path / "best.safetensors", {"a/m": torch.zeros(3)}, facts)
    with pytest.raises(t2.ExpertError, match="best"):
        BestExperts.load(tmp_path)


def test_every_file_of_a_checkpoint_is_compared_with_its_digest(tmp_path):
    """Also those that are Trainer's own: the optimiser's state has no checksum that torch compares."""
    settings = {"save_strategy": "steps", "save_steps": 1, "keep_best": True}
    run(tmp_path, **settings, max_steps=1)[0].train()
    place = tmp_path / "checkpoint-1"
    names = {p.name for p in place.rglob("*") if p.is_file()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "best.safetensors"} <= names
    for name in ("optimizer.pt", "rng_state.pth", "best.safetensors"):
        whole = (place / name).read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        (place / name).write_bytes(damaged)
        with pytest.raises(t2.ExpertError, match=f"{name} is damaged or was changed"):
            run(tmp_path, **settings, max_steps=2)[0].train(resume_from_checkpoint=str(place))
        (place / name).unlink()
        with pytest.raises(t2.ExpertError, match=f"{name} is missing"):
            run(tmp_path, **settings, max_steps=2)[0].train(resume_from_checkpoint=str(place))
        (place / name).write_bytes(whole)
    trainer, _ = run(tmp_path, **settings, max_steps=2)
    trainer.train(resume_from_checkpoint=str(place))
    assert trainer.state.global_step == 2
    (place / "digests.json").unlink()  # a checkpoint of an older version
    run(tmp_path, **settings, max_steps=2)[0].train(resume_from_checkpoint=str(place))
