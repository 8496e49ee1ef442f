"""The real TRL trains experts in `train.experts`: the recipes of the page, and checkpoints that resume to the same
bits. Skipped where TRL is not installed."""

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import t2kernels as t2
from t2kernels import train

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

PAGE = Path(__file__).parents[2] / "docs/howto/trainers.md"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def on_cpu(code: str) -> str:
    return code.replace("max_steps=20", "max_steps=2, use_cpu=True, bf16=False, disable_tqdm=True")


def recipes() -> list[tuple[int, str]]:
    """(line, code) of the blocks that need TRL."""
    text = PAGE.read_text()
    return [(text[: m.start()].count("\n"), m["code"]) for m in BLOCK.finditer(text) if m["reason"] == "needs TRL"]


def test_the_recipes_of_the_page_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = next(m["code"] for m in BLOCK.finditer(PAGE.read_text()))
    names: dict = {"__name__": "page"}
    exec(compile(on_cpu(first), str(PAGE), "exec"), names)
    found = recipes()
    assert len(found) == 6
    bank, model = names["bank"], names["model"]
    for line, code in found:
        block = "train.experts" in code
        assert not checkpoints(model)
        exec(compile("\n" * line + on_cpu(code), str(PAGE), "exec"), names)
        assert checkpoints(model) != block  # TRL begins gradient checkpointing; a block ends it
    assert bank.in_training == []
    base = bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()})
    made = {name: bank[name] for name in ("mine", "sft", "dpo", "grpo", "grpo-kl", "rloo", "lines")}
    assert all(expert != base for expert in made.values())
    assert made["sft"] == made["lines"]  # the block is those lines
    assert made["grpo"] != made["grpo-kl"]


def checkpoints(model) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def varied(completions, **columns):
    """A reward that differs between the completions of a prompt."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def patched(form):
    model, tokenizer = t2.tiny.load()
    model.config._name_or_path = str(t2.tiny.path())  # TRL loads the reference from there
    t2.patch_model(model, form=form)
    return model, tokenizer


def trainer(kind, model, tokenizer, folder, steps=3, callbacks=None, beta=0.05):
    task = t2.tasks.load("math")
    rows = task.split("train", 32)
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
        "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    if kind == "SFT":
        data = [{"prompt": r["prompt"], "completion": r["answer"]} for r in rows]
        args, kwargs = trl.SFTConfig(**settings), {}
    elif kind == "DPO":
        data = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": "=0"} for r in rows]
        args, kwargs = trl.DPOConfig(**settings), {}
    else:
        data = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]
        make = {"GRPO": trl.GRPOConfig, "RLOO": trl.RLOOConfig}[kind]
        args = make(**settings, beta=beta, num_generations=4, max_completion_length=12, temperature=3.0)
        kwargs = {"reward_funcs": varied}
    cls = getattr(trl, f"{kind}Trainer")
    return cls(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
               callbacks=callbacks, **kwargs)  # fmt: skip


@pytest.mark.parametrize(("kind", "form"), [("SFT", "factored"), ("DPO", "delta"), ("GRPO", "factored")])
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, kind, form):
    def run(folder, resume=None, callbacks=None):
        model, tokenizer = patched(form)
        with train.experts(model, "mine") as trained:
            made = trainer(kind, model, tokenizer, tmp_path / folder, callbacks=callbacks)
            made.train(resume_from_checkpoint=resume)
        return trained["mine"], made.state.log_history

    straight, logs = run("straight")
    half, _ = run("cut", callbacks=[StopAt()])
    checkpoint = tmp_path / "cut/checkpoint-2"
    assert t2.Expert.load(checkpoint / "experts/mine").z.keys() == half.z.keys()
    assert (checkpoint / "model.safetensors").stat().st_size < 200_000
    resumed, _ = run("cut", resume=str(checkpoint))
    assert resumed == straight != half
    if kind == "GRPO":
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the base model
        assert logs[1]["kl"] > 1e-6
    if kind == "DPO":
        assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert logs[2]["rewards/margins"] > 0


def test_checkpointing_does_not_change_the_losses(tmp_path):
    def losses(on):
        model, tokenizer = patched("factored")
        with train.experts(model, "mine"):
            made = trainer("SFT", model, tokenizer, tmp_path)
            if not on:
                model.gradient_checkpointing_disable()
                made.args.gradient_checkpointing = False
            made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)
