"""transformers' own Trainer on a patched model: it resumes in both forms, and warns where a step was forgotten."""

import contextlib
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import t2kernels as t2
from tests.helpers.families import build


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class Begun(TrainerCallback):
    yes = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.yes = True


def patched(form, freeze=True, **settings):
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model, form=form, **settings)
    if freeze:
        model.requires_grad_(False)
    bank.start_training("mine")
    return model, tokenizer, bank


def fit(folder, model, tokenizer, resume=None, callbacks=None, steps=4):
    rows = [tokenizer(r["prompt"] + "=" + r["answer"]) for r in t2.tasks.load("math").split("train", 32)]
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
        save_strategy="steps", save_steps=2, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, args, collator, rows, callbacks=callbacks).train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("form", "settings"), [("factored", {}), ("delta", {"rank": 8}), ("factored", {"factors": "int8"})]
)
def test_trainer_resumes_to_the_same_bits(tmp_path, form, settings):
    def run(folder, **kwargs):
        model, tokenizer, bank = patched(form, **settings)
        with bank.use("mine"):
            fit(folder, model, tokenizer, **kwargs)
        return bank.stop_training("mine")

    straight = run(tmp_path / "straight")
    first = run(tmp_path / "cut", callbacks=[StopAt()])
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut/checkpoint-2"))
    assert first != straight
    assert resumed == straight


def test_another_weight_is_refused_before_training(tmp_path):
    model, tokenizer, bank = patched("factored")
    with bank.use("mine"):
        fit(tmp_path, model, tokenizer, steps=2)
    other, tokenizer, bank = patched("factored")
    path = tmp_path / "checkpoint-2/model.safetensors"
    state = load_file(path)
    name = "model.layers.0.self_attn.q_proj"
    state[f"{name}.weight"][0, 0] += 0.01
    save_file(state, path, {"format": "pt"})
    begun = Begun()
    with bank.use("mine"), pytest.raises(RuntimeError, match=f"{name}.weight is not the base weight of this layer"):
        fit(tmp_path, other, tokenizer, resume=str(tmp_path / "checkpoint-2"), callbacks=[begun])
    assert not begun.yes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_models_own_dense_weights_load(dtype):
    dense, _ = t2.tiny.load(dtype)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    t2.patch_model(dense, form="factored")
    mine = dense.state_dict()
    if dtype == torch.float32:  # else the factors are rounded too, so the layer computes with another weight
        assert dense.load_state_dict(state, strict=True).missing_keys == []
    assert dense.load_state_dict(mine, strict=True).missing_keys == []
    assert all(torch.equal(v, mine[k]) for k, v in dense.state_dict().items())
    assert dense.load_state_dict({k: v.float() for k, v in mine.items()}).missing_keys == []
    name = "model.layers.0.mlp.up_proj.weight"
    state = mine
    for wrong, message in (
        (state[name] * 1.02, "is not the base weight"),
        (state[name][:3], "but the layer has"),
        (state[name].roll(1, 0), "is not the base weight"),
        (torch.full_like(state[name], float("nan")), "is not the base weight"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            dense.load_state_dict({**state, name: wrong})
    with pytest.raises(RuntimeError, match="Missing key"):
        dense.load_state_dict({k: v for k, v in state.items() if k != name})


def test_transposed_weights_and_biases_load():
    """GPT-2 stores its matrices as [N, M] and has biases: a bias that the state dict holds must not be lost."""
    model = build("gpt2")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    name = "transformer.h.0.mlp.c_fc"
    state[f"{name}.bias"] += 1.0
    t2.patch_model(model, form="factored")
    model.load_state_dict(state)
    assert torch.equal(model.get_submodule(name).bias, state[f"{name}.bias"])
    with pytest.raises(RuntimeError, match=f"{name}.weight is not the base weight"):
        model.load_state_dict({**state, f"{name}.weight": state[f"{name}.weight"] + 0.1})


def warnings_of(caplog, form, use, freeze):
    model, tokenizer, bank = patched(form, freeze, **({} if form == "factored" else {"rank": 8}))
    batch = tokenizer(["1+2=3", "7+7=14"], padding=True, return_tensors="pt")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="t2kernels"):
        for _ in range(3):
            with bank.use("mine") if use else contextlib.nullcontext():
                model(**batch, labels=batch["input_ids"]).loss.backward()
    return [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_a_forgotten_step_is_told_once(caplog, form):
    assert warnings_of(caplog, form, use=True, freeze=True) == []
    (message,) = warnings_of(caplog, form, use=True, freeze=False)
    assert "require gradients" in message
    assert "requires_grad_(False)" in message
    first, second = warnings_of(caplog, form, use=False, freeze=False)
    assert "bank.use('mine')" in first
    assert "require gradients" in second
    if form == "factored":  # in delta form torch itself raises: nothing requires a gradient
        (message,) = warnings_of(caplog, form, use=False, freeze=True)
        assert "bank.use('mine')" in message


def test_a_reference_without_gradients_is_no_mistake(caplog):
    model, tokenizer, bank = patched("factored")
    batch = tokenizer(["1+2=3"], return_tensors="pt")
    with caplog.at_level(logging.WARNING, logger="t2kernels"), bank.use("mine"):
        with torch.no_grad(), bank.use(None):
            reference = model(**batch).logits
        (model(**batch).logits - reference).square().mean().backward()
    assert caplog.records == []
