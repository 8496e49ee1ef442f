"""p, its gradient, the optimiser's state and z are fp32 whatever the model and the trainer compute in."""

import pytest
import torch
from transformers import TrainerCallback

import t2kernels as t2
from t2kernels.train import SVFConfig, SVFTrainer


class Types(TrainerCallback):
    """Collects the dtypes of everything that is added up."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        bank = model.t2_bank
        parameters = bank.trained_parameters("a").values()
        self.found["p"] = {p.dtype for p in parameters}
        self.found["gradient"] = {p.grad.dtype for p in parameters}
        self.found["table"] = {layer.table().dtype for layer, _ in bank.layers} | {
            layer.scale.dtype for layer, _ in bank.layers
        }

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        values = [v for one in optimizer.state.values() for v in one.values() if torch.is_tensor(v)]
        assert values
        self.found["state"] = {v.dtype for v in values}


@pytest.mark.parametrize("form", ["delta", "factored"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"bf16": True, "gradient_checkpointing": True}),
        (torch.float16, {}),
    ],
)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_what_is_added_up_is_fp32(tmp_path, form, dtype, settings, default):
    model, tokenizer = t2.tiny.load(dtype)
    t2.patch_model(model, form=form, rank=8)
    task, types = t2.tasks.load("math"), Types()
    args = SVFConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, max_new_tokens=4, use_cpu=True, **settings
    )
    torch.set_default_dtype(default)  # it must not reach p either, whose zeros it would make
    try:
        tr = SVFTrainer(
            model, args, task.split("train", 8), None, task.reward, "a", processing_class=tokenizer, callbacks=[types]
        )
        tr.train()
    finally:
        torch.set_default_dtype(torch.float32)
    assert types.found == {key: {torch.float32} for key in ("p", "gradient", "table", "state")}
    assert {z.dtype for z in tr.experts["a"].z.values()} == {torch.float32}
    assert any((z != 1).any() for z in tr.experts["a"].z.values())


def test_training_under_autocast_of_the_caller(tmp_path):
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form="delta", rank=8)
    task, types = t2.tasks.load("math"), Types()
    args = SVFConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, max_new_tokens=4, use_cpu=True)
    tr = SVFTrainer(
        model, args, task.split("train", 8), None, task.reward, "a", processing_class=tokenizer, callbacks=[types]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tr.train()
    assert types.found == {key: {torch.float32} for key in ("p", "gradient", "table", "state")}


def test_fp16_gradients_are_unscaled_once_a_step(tmp_path, monkeypatch):
    """GradScaler refuses a second unscale_ in a step, and each of two experts has its gradient cut."""
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form="delta", rank=8)
    task = t2.tasks.load("math")
    rows = task.split("train", 4)
    args = SVFConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=8, max_new_tokens=4, use_cpu=True)
    tr = SVFTrainer(model, args, None, None, task.reward, {"a": rows, "b": rows}, processing_class=tokenizer)
    unscaled = []
    monkeypatch.setattr(tr.accelerator, "scaler", object())
    monkeypatch.setattr(tr.accelerator, "unscale_gradients", lambda: unscaled.append(1))
    for name in ("a", "b"):
        for p in tr.bank.start_training(name):
            p.grad = torch.full_like(p, 3.0)
    tr._clip_grad_norm(model)
    assert unscaled == [1]
    for name in ("a", "b"):
        grads = torch.cat([p.grad.flatten() for p in tr.bank.trained_parameters(name).values()])
        assert grads.norm().item() == pytest.approx(1.0, rel=1e-4)
