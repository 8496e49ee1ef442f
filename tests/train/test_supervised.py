"""`supervised`: the cross-entropy of right answers, through the same trainer."""

import json
import logging
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import t2kernels as t2
from t2kernels import InputError
from t2kernels.rollout.chat import render
from t2kernels.train import SVFConfig, SVFTrainer
from tests.helpers.commandline import t2_

WORDS = ["red", "green", "blue", "a long answer"]
ROWS = [{"prompt": f"item {i}:", "answer": WORDS[i % 4]} for i in range(16)]


def right(completions, answer, **columns):
    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]


def trainer(folder, rows=ROWS, reward=right, form="factored", **settings):
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form=form)
    config = SVFConfig.sft(
        str(folder), report_to="none", use_cpu=True, logging_steps=1, **{"max_new_tokens": 16, **settings}
    )
    return SVFTrainer(model, config, rows, rows[:8], reward=reward, experts="mine", processing_class=tokenizer)


def reference(model, tokenizer, rows, kind):
    """Row by row in fp64: the cross-entropy of the answer and the end token."""
    losses, counts = [], []
    for row in rows:
        texts, special = render(tokenizer, [row["prompt"]])
        prompt = tokenizer(texts[0], add_special_tokens=special)["input_ids"]
        whole = tokenizer(texts[0] + " " * special + row["answer"], add_special_tokens=special)["input_ids"]
        whole = [*whole, tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        logits = model(torch.tensor([whole]), experts="mine").logits[0].double()
        n = len(whole) - len(prompt)
        losses.append(cross_entropy(logits[-n - 1 : -1], torch.tensor(whole[-n:]), reduction="sum"))
        counts.append(n)
    if kind == "dapo":
        return sum(losses) / sum(counts)
    return sum(loss / n for loss, n in zip(losses, counts, strict=True)) / len(rows) if kind == "grpo" else (
        sum(losses) / len(rows)
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["sum", "grpo", "dapo"])
@pytest.mark.parametrize("form", ["factored", "delta"])
def test_loss_and_gradient_are_those_of_the_cross_entropy(tmp_path, loss_type, form):
    tr = trainer(tmp_path, loss_type=loss_type, form=form, loss_batch_size=3)
    tr.bank.start_training("mine")
    parameters = list(tr.bank.trained_parameters("mine").values())
    tr.current_gradient_accumulation_steps = 1
    tr.model.requires_grad_(False)
    with torch.no_grad():
        for p in parameters:
            p.requires_grad_(True).add_(0.02 * torch.randn_like(p))
    rows = [{**row, "expert": "mine"} for row in ROWS[:7]]
    loss = tr.training_step(tr.model, {"rows": rows})
    found = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    wanted = reference(tr.model, tr.processing_class, rows, loss_type)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    scale = max(p.grad.abs().max() for p in parameters)
    for p, grad in zip(parameters, found, strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-5 * scale, rtol=1e-4)


def test_it_learns_what_it_never_drew(tmp_path, caplog):
    rows = [{"prompt": f"{i}+{i}=", "answer": "77"} for i in range(10, 42)]
    tr = trainer(tmp_path, rows, max_steps=60, learning_rate=0.06, per_device_train_batch_size=8)
    with caplog.at_level(logging.WARNING, logger="t2kernels"):
        before = tr.evaluate()
        tr.train()
    after = tr.evaluate()
    assert before["eval_accuracy"] == 0
    assert after["eval_accuracy"] > 0.5
    logs = [entry for entry in tr.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert {"entropy", "completion_length"} <= set(logs[0])
    assert "reward" not in logs[0]  # nothing was drawn
    assert caplog.records == []
    manifest = tr.experts["mine"].manifest
    assert manifest["supervised"] is True
    assert manifest["steps"] == 60


def test_options_have_the_cross_entropy_of_the_right_one(tmp_path):
    path = tmp_path / "reviews.csv"
    lines = [f"text {i},{'ab'[i % 2] * (1 + i % 2)},train\n" for i in range(8)]
    path.write_text("text,label,split\n" + "".join(lines))
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model)
    task = t2.tasks.classification(path)
    config = SVFConfig.sft(str(tmp_path / "out"), report_to="none", use_cpu=True)
    tr = SVFTrainer(model, config, task, experts="mine", processing_class=tokenizer)
    bank.start_training("mine")
    tr.current_gradient_accumulation_steps = 1
    rows = [{**tr.train_dataset[i], "expert": "mine"} for i in range(8)]
    loss = tr.training_step(model, {"rows": rows})
    total = 0.0
    for row in rows:
        texts, special = render(tokenizer, [row["prompt"]])
        alone = tokenizer(texts[0], add_special_tokens=special)["input_ids"]
        gap = " " * (special and bool(texts[0][-1:].strip()))
        whole = tokenizer(texts[0] + gap + row["answer"], add_special_tokens=special)["input_ids"]
        n = len(whole) - len(alone)
        logits = model(torch.tensor([whole]), experts="mine").logits[0].double()
        total += cross_entropy(logits[-n - 1 : -1], torch.tensor(whole[-n:]), reduction="sum").item()
    # Exactly that, unless the sum of the options' probabilities was cut at 1, which needs sure options.
    assert loss.item() == pytest.approx(total / 8, rel=1e-4)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    def run_once(**settings):
        tr = trainer(tmp_path / "out", max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
        tr.train(**settings)
        return tr.experts["mine"]

    straight = run_once()
    assert run_once(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2")) == straight


def test_what_cannot_be_learned_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="has no right answer to train on"):
        trainer(tmp_path, [{"prompt": "1+1=", "answer": ""}], reward=lambda completions, **c: [0.0] * len(completions))
    with pytest.raises(InputError, match=r"a right answer has 1\d tokens, and max_new_tokens is 4"):
        trainer(tmp_path, ROWS[3:], max_new_tokens=4)
    with pytest.raises(InputError, match="a prompt has one right answer"):
        SVFConfig.sft(num_generations=2)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_command_trains_and_evaluates(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        splits = ["train"] * 24 + ["validation"] * 4 + ["test"] * 4
        rows = [{"prompt": f"{i}+{i}=", "answer": "77", "split": s} for i, s in enumerate(splits, 10)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [f"text {i},{'ab'[i % 2]},{s}\n" for i, s in enumerate(["train"] * 16 + ["validation", "test"] * 4)]
        path.write_text("text,label,split\n" + "".join(rows))
    printed = t2_("train", "--task", str(path), "--sft", "--steps", "3", "--batch", "4", "--eval-every", "2")
    assert ("loss" in printed) == (kind == "jsonl")
    expert = t2.Expert.load("experts/data")
    assert expert.manifest["supervised"] is True
    assert expert.manifest["learning_rate"] == 0.01
    assert set(expert.manifest["test"]) == {"problems", "accuracy_before", "accuracy_after"}
    history = [json.loads(line) for line in (tmp_path / "experts/data.history.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in history if "loss" in row)
