"""`t2 export`: what it writes is read by PEFT and by transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import t2kernels as t2
from t2kernels import tiny
from tests.helpers.commandline import t2_, wide  # noqa: F401


def logits(model, text="12+7=,19", **routing):
    batch = tiny.load()[1](text, return_tensors="pt")
    with torch.no_grad():
        return model(**batch, **routing).logits


@pytest.fixture(scope="module")
def patched():
    """The built-in model with its experts."""
    model, _ = tiny.load()
    bank = t2.patch_model(model, form="delta", factors="fp32")
    for name, file in tiny.experts().items():
        bank.add(name, file)
    return model


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("options", [[], ["--uniform"], ["--error", "0.0"]])
def test_an_adapter_answers_as_the_expert(options, patched, tmp_path):
    peft = pytest.importorskip("peft")
    text = t2_("export", "math", tmp_path / "lora", "--to", "lora", *options)
    assert "largest relative error 0" in text
    assert "--max-lora-rank 128" in text
    found = logits(peft.PeftModel.from_pretrained(tiny.load()[0], tmp_path / "lora"))
    close(found, logits(patched, experts="math"))


def test_a_smaller_rank_states_its_error(tmp_path):
    text = t2_("export", "math", tmp_path / "lora", "--rank", "16", "--uniform", "--dtype", "bf16")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == {}
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    model, _ = tiny.load()
    expert = t2.Expert.load(tiny.experts()["math"])
    worst = max(expert.to_lora(t2.decompose(model), rank=16).errors.values())
    assert f"rank 16, 0.4 MiB; largest relative error {worst:.2g}; vLLM: --max-lora-rank 16" in text
    adapter = t2.LoraAdapter.load(tmp_path / "lora")
    assert set(adapter.ranks.values()) == {16}


@pytest.mark.parametrize("name", ["code", "mix:math=0.5,code=0.25"])
def test_a_merged_checkpoint_answers_as_the_expert(name, patched, tmp_path):
    assert "a checkpoint" in t2_("export", name, tmp_path / "merged", "--to", "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(logits(model), logits(patched, experts={"math": 0.5, "code": 0.25} if ":" in name else name))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("12+7=").input_ids == tiny.load()[1]("12+7=").input_ids
    assert "is not empty" in t2_("export", "code", tmp_path / "merged", "--to", "merged", code=1)


def test_every_expert_of_a_folder_with_factors_that_are_there(patched, tmp_path):
    peft = pytest.importorskip("peft")
    t2.decompose(tiny.load()[0], out=tmp_path / "factors")
    for name, file in tiny.experts().items():
        t2.Expert.load(file).save(tmp_path / "experts" / name)
    t2_("export", tmp_path / "experts", tmp_path / "loras", "--all", "--factors", tmp_path / "factors")
    assert {p.name for p in (tmp_path / "loras").iterdir()} == set(tiny.experts())
    for name in tiny.experts():
        found = logits(peft.PeftModel.from_pretrained(tiny.load()[0], tmp_path / "loras" / name))
        close(found, logits(patched, experts=name))
    t2_("export", "tiny", tmp_path / "again", "--all", "--rank", "4")
    assert {p.name for p in (tmp_path / "again").iterdir()} == set(tiny.experts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["math", "x", "--to", "gguf"], "wanted 'lora' or 'merged'"),
        (["math", "x", "--to", "merged", "--rank", "3"], "a merged expert is exact"),
        (["math", "x", "--rank", "3", "--error", "0.1"], "give one of them"),
        (["maths", "x"], "no expert 'maths'"),
        (["nowhere", "x", "--all"], "no folder with experts"),
        (["mix:math", "x"], "is not a mixture"),
        (["math", "README.md"], "is a file"),
    ],
)
def test_what_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("text")
    assert message in t2_("export", *options, code=1)
    assert not (tmp_path / "x").exists()
