"""The command line: help, output, exit codes, and that its numbers are the library's."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import t2kernels as t2
from t2kernels.cli import app, models
from t2kernels.cli.models import parse_rank
from t2kernels.evaluation import Score, answers, scores
from tests.helpers.commandline import t2_, wide  # noqa: F401

VERBS = ("demo", "train", "eval", "generate", "decompose", "inspect", "plan", "tune", "env")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama on disk, with the tokenizer of the tiny model."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(path)
    t2.tiny.load()[1].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expert(checkpoint, tmp_path_factory):
    """An expert of that model, with a z that is known."""
    bank = t2.patch_model(LlamaForCausalLM.from_pretrained(checkpoint))
    z = {name: torch.ones(k) for name, k in bank.matrices.items()}
    z["model.layers.1.mlp.up_proj"][3] = 1.625
    return bank.expert(z, name="known", task="none").save(tmp_path_factory.mktemp("experts") / "known")


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb):
    assert f"t2 {verb}" in t2_(verb, "--help")


def test_help_says_what_happens_without_an_option():
    assert "[default: a GPU if there is one]" in " ".join(t2_("decompose", "--help").replace("│", " ").split())


def test_help_lists_every_verb():
    text = t2_("--help")
    assert all(re.search(rf"│ {verb} ", text) for verb in VERBS)


def test_help_does_not_wait_for_torch():
    code = "import sys; from t2kernels.cli import app; "
    code += "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# --- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "no/such/thing"], "no expert, no factors and no checkpoint at no/such/thing"),
        (["decompose", "./nowhere", "--out", "x"], "no checkpoint at ./nowhere"),
        (["decompose", ".", "--out", "x", "--rank", "many"], "--rank many"),
        (["decompose", ".", "--out", "x", "--dtype", "int8"], "--dtype int8"),
        (["eval", "--task", "maths"], "did you mean 'math'?"),
        (["eval", "--task", "gone.jsonl"], "no file"),
        (["eval", "--experts", "nobody", "-n", "2"], "no expert 'nobody'"),
        (["generate", "1+1?", "--mix", "math"], "--mix math: wanted NAME=WEIGHT"),
        (["generate", "1+1?", "2+2?", "--expert", "base", "--pair"], "2 prompts and 1 experts"),
        (["generate", "1+1?", "--model", "./nowhere"], "no such directory"),
        (["generate", "1+1?", "--chat"], "no chat template"),
        (["train", "--lr", "fast"], "'--lr'"),
        (["train", "--steps", "1", "--kl", "-1"], "kl_coef=-1"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, args)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        assert re.search(r"^error: .*\n\Z", result.output, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_tune_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "t2 tune measures a GPU" in t2_("tune", t2.tiny.path(), code=1)
    assert "no such directory" in t2_("tune", "./nosuch", code=1)


def test_debug_anywhere_shows_where_an_error_came_from():
    for args in (["--debug", "inspect", "no/such/thing"], ["inspect", "no/such/thing", "--debug"]):
        assert isinstance(CliRunner().invoke(app, args).exception, FileNotFoundError)
    assert isinstance(CliRunner().invoke(app, ["inspect", "no/such/thing"]).exception, SystemExit)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("t2kernels.cli.verbs.env.report", lambda: 1 / 0)
    assert isinstance(CliRunner().invoke(app, ["env"]).exception, ZeroDivisionError)


def test_a_pickle_in_disguise(tmp_path):
    torch.save({"z": torch.ones(3)}, tmp_path / "expert.safetensors")
    assert "pickle" in t2_("inspect", tmp_path / "expert", code=1)


# --- env


def test_env():
    found = json.loads(t2_("env", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["svf_linear"]["torch"].startswith("runs on")
    assert found["svf_linear"]["auto"]
    assert set(found["tiny model"]["experts"].split(", ")) == set(t2.tiny.experts())
    assert torch.__version__ in t2_("env")


def test_env_reports_what_is_broken(monkeypatch):
    def broken():
        raise RuntimeError("driver and library do not fit")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    found = json.loads(t2_("env", "--json"))
    assert found["gpu"] == {"error": "RuntimeError: driver and library do not fit"}
    assert found["versions"]["torch"] == torch.__version__


# --- decompose and inspect


def test_decompose(checkpoint, tmp_path):
    out = tmp_path / "factors"
    text = t2_("decompose", checkpoint, "--out", out, "--rank", "1/4", "--targets", "mlp", "--dtype", "bfloat16")
    found = t2.Factors.load(out)
    wanted = t2.decompose(checkpoint, rank=0.25, targets="mlp", dtype=torch.bfloat16)
    assert found.fingerprint == wanted.fingerprint
    assert f"6 matrices, {sum(found.ranks.values())} components" in text
    shown = t2_("inspect", out)
    record = found.manifest["matrices"]["model.layers.1.mlp.down_proj"]
    row = next(line for line in shown.splitlines() if "1.mlp.down_proj" in line)
    assert "32x48" in row
    assert "8/32" in row
    assert f"{record['error']:.1e}" in row
    W = LlamaForCausalLM.from_pretrained(checkpoint).get_submodule("model.layers.1.mlp.down_proj").weight.double()
    kept = torch.linalg.svdvals(W)[:8].square().sum() / W.square().sum()
    assert float(re.search(r"([\d.]+)%", row)[1]) / 100 == pytest.approx(kept.item(), abs=2e-3)


def test_decompose_keeps_a_sixteenth_of_a_wide_model_in_its_dtype(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=520, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    t2_("decompose", tmp_path / "wide", "--out", tmp_path / "few", "--targets", "mlp")
    wanted = t2.decompose(tmp_path / "wide", rank=1 / 16, targets="mlp", dtype=torch.bfloat16)
    assert t2.Factors.load(tmp_path / "few").fingerprint == wanted.fingerprint
    t2_("decompose", tmp_path / "wide", "--out", tmp_path / "all", "--targets", "up_proj", "--rank", "all")
    every = t2.Factors.load(tmp_path / "all")
    assert set(every.ranks.values()) == {512}
    assert every.manifest["dtype"] == "float32"


def test_plan(checkpoint):
    found = json.loads(t2_("plan", checkpoint, "--json", "--experts", "10", "--rank", "all", "--dtype", "float32"))
    assert found["experts"] == 10
    assert found["expert_file"] == 4 * t2.count_parameters(LlamaForCausalLM.from_pretrained(checkpoint)).svf
    text = t2_("plan", checkpoint / "config.json", "--gpu", "l40s", "--count", "2")
    assert "on 2 l40s" in text
    assert "it fits" in text
    assert "predicted by arithmetic" in text


def test_decompose_to_int8(checkpoint, tmp_path):
    out = tmp_path / "factors"
    text = t2_("decompose", checkpoint, "--out", out, "--format", "int8", "--max-error", "0.005")
    records = t2.Factors.load(out).manifest["matrices"]
    columns, rank = (sum(r[k] for r in records.values()) for k in ("columns", "rank"))
    assert f"{columns - rank:,} columns more than components (+{(columns - rank) / rank:.1%})" in text
    assert f"{max(r['format_error'] for r in records.values()):.2g}" in text
    assert all(r["format_error"] <= 0.005 for r in records.values())
    record = records["model.layers.1.mlp.down_proj"]
    row = next(line for line in t2_("inspect", out).splitlines() if "1.mlp.down_proj" in line).split()
    assert row[4:7] == [str(record["columns"]), f"{record['format_error']:.1e}", f"{record['dense_int8_error']:.1e}"]
    with_int8 = t2_("generate", "1+1?", "--factors", "int8", "--form", "factored", "--json")
    assert with_int8.count("1+1?") == t2_("generate", "1+1?", "--json").count("1+1?") > 0


def test_inspect_an_expert(expert):
    shown = t2_("inspect", expert)
    row = next(line for line in shown.splitlines() if "1.mlp.up_proj" in line).split()
    assert row[1] == "32"
    assert row[-2:] == ["0.625", "3"]  # the largest |z - 1|, and where
    assert row[-3] == "1.625"
    assert "known" in shown
    assert "14 fingerprints and 14 sketches" in shown
    assert "0.mlp.gate_proj" in shown
    assert "0.mlp.gate_proj" not in t2_("inspect", expert, "--rows", "1")


def test_inspect_a_model_by_its_config(tmp_path):
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    shown = t2_("inspect", tmp_path)
    assert "8,030,261,248 parameters" in shown
    assert all(count in shown for count in ("393,216", "720,896", "41,943,040"))


@pytest.mark.parametrize(("text", "rank"), [("all", None), ("256", 256), ("0.25", 0.25), ("1/16", 1 / 16)])
def test_rank(text, rank):
    assert parse_rank(text) == rank


# --- answers


def test_a_score():
    score = Score(15, 20)
    assert score.accuracy == 0.75
    assert score.standard_error == pytest.approx((0.75 * 0.25 / 20) ** 0.5)
    assert score.interval == pytest.approx((0.531, 0.888), abs=1e-3)  # Wilson, as in the tables
    assert Score(20, 20).interval == pytest.approx((0.839, 1.0), abs=1e-3)


def test_answers_are_those_of_each_prompt_alone():
    loaded = models.load("tiny")
    bank = t2.patch_model(loaded.model)
    bank.add("math", t2.tiny.experts()["math"])
    rows = [p["prompt"] for name in ("math", "reason") for p in t2.tasks.load(name).split("test", 3)]
    experts = ["math", None, {"math": 0.5}, "math", None, {"math": 0.5}]
    together, counted = (
        answers(loaded.model, loaded.tokenizer, rows, experts, 28, batch=4, done=(seen := []).append),
        seen,
    )
    alone = [answers(loaded.model, loaded.tokenizer, [p], [e], 28)[0] for p, e in zip(rows, experts, strict=True)]
    assert together == alone
    assert sum(counted) == 6


def test_scores_keep_experts_apart():
    loaded = models.load("tiny")
    bank = t2.patch_model(loaded.model)
    bank.add("math", t2.tiny.experts()["math"])
    task = t2.tasks.load("math")
    base, expert = scores(loaded.model, loaded.tokenizer, task, task.split("test", 40), [None, "math"], batch=32)
    (alone,) = scores(loaded.model, loaded.tokenizer, task, task.split("test", 40), ["math"])
    assert expert == alone
    assert expert.right > base.right


def test_generate():
    prompts = [p["prompt"] for p in t2.tasks.load("math").split("test", 2)]
    args = [
        "generate",
        *prompts,
        "-e",
        "base",
        "-e",
        "math",
        "--mix",
        "math=.5,code=.5",
        "--max-new-tokens",
        "28",
        "--json",
    ]
    found = [json.loads(line) for line in CliRunner().invoke(app, args).stdout.splitlines()]  # nothing else on stdout
    assert [(f["prompt"], f["expert"]) for f in found] == [
        (p, e) for p in prompts for e in ("base", "math", "math=.5,code=.5")
    ]
    loaded = models.load("tiny")
    plain = answers(loaded.model, loaded.tokenizer, prompts, None, 28)
    assert [f["text"] for f in found if f["expert"] == "base"] == plain


def test_eval(tmp_path):
    file = tmp_path / "scores.json"
    text = t2_("eval", "--task", "math", "--experts", "math", "-n", "30", "--json", file)
    found = json.loads(file.read_text())["accuracy"]["math"]
    assert found["math"]["of"] == found["base"]["of"] == 30
    assert found["math"]["accuracy"] == found["math"]["right"] / 30
    assert f"{found['math']['accuracy']:.1%}" in text


def test_eval_of_ways_to_choose(tmp_path):
    path = tmp_path / "scores.json"
    said = t2_("eval", "--task", "math,reason", "-n", 12, "--adapt", "classify,confidence", "--json", path)
    assert "chosen: adapt classify" in said
    assert "first pass" in said
    found = json.loads(path.read_text())
    for task in ("math", "reason"):
        assert set(found["accuracy"][task]) == {"base", "adapt classify", "adapt confidence"}
        assert found["routes"][task]["adapt classify"]["chosen"] == {task: {task: 12}}
        assert found["accuracy"][task]["adapt classify"]["right"] >= 11
    assert "--adapt guess" in t2_("eval", "-n", 2, "--adapt", "guess", code=1)
    assert "--examples" in t2_("eval", "-n", 2, "--adapt", "few-shot", code=1)


def test_train_an_expert_on_a_file_and_use_it(checkpoint, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(8) for b in range(8))
    )
    out = tmp_path / "mine"
    args = [
        "train",
        "--task",
        file,
        "--model",
        checkpoint,
        "--steps",
        "2",
        "--batch",
        "8",
        "--rank",
        "4",
        "--max-new-tokens",
        "3",
        "--param",
        "raw",
    ]
    text = t2_(*args, "--out", out)
    trained = t2.Expert.load(out)
    assert set(trained.ranks.values()) == {4}
    assert trained.manifest["test"]["problems"] == len(t2.tasks.load(file).split("test"))
    assert f"{trained.numel:,} numbers" in text
    t2_(*args, "--out", tmp_path / "again")
    assert t2.Expert.load(tmp_path / "again") == trained
    shown = t2_("generate", "1+1=", "--model", checkpoint, "--rank", "4", "-e", out, "--max-new-tokens", "3")
    assert "one batch of 1" in shown


# --- demo


def test_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = t2_("demo", "--quick")
    assert "32 of 32" in text
    for expert in t2.tiny.experts():
        assert re.search(rf"^ {expert} +[\d.]+%", text, re.MULTILINE), text
    assert re.search(r"right|wrong", text)
    assert list(tmp_path.iterdir()) == []
