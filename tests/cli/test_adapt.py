"""`t2 generate --adapt` and `t2 train --task classify --classes`."""

import json

import pytest
from typer.testing import CliRunner

import t2kernels as t2
from t2kernels.cli import app

PROMPTS = ["47+8+6?", "rsxt(gcafd)?", "ab,fj,cd,be,ci,ef;3a?"]


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def chosen(*args):
    return [
        (row["expert"], row["text"])
        for row in map(json.loads, run("generate", *PROMPTS, *args, "--json").stdout.splitlines())
    ]


@pytest.mark.parametrize("kind", ["prompt", "classify", "router", "confidence"])
def test_each_prompt_is_answered_by_the_expert_that_was_chosen(kind):
    named = chosen("--pair", "-e", "math", "-e", "code", "-e", "reason", "--max-new-tokens", "28")
    assert chosen("--adapt", kind, "--max-new-tokens", "28") == named
    assert [expert for expert, _ in named] == ["math", "code", "reason"]


def test_a_margin_keeps_the_base_model():
    assert [expert for expert, _ in chosen("--adapt", "prompt", "--margin", "1e9", "--max-new-tokens", "4")] == [
        "base"
    ] * 3


def test_few_shot_from_a_file(tmp_path):
    file = tmp_path / "sub.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in t2.tasks.load("sub").split("train", 3)))
    found = chosen("--adapt", "few-shot", "--examples", file, "--max-new-tokens", "4", "-e", "math")
    assert {expert for expert, _ in found} <= {"few-shot", "base"}


@pytest.mark.parametrize(
    "args, message",
    [
        (["--adapt", "luck"], "wanted one of prompt"),
        (["--adapt", "few-shot"], "needs --examples"),
        (["--adapt", "classify", "--classifier", "base"], "no classifier"),
        (["--adapt", "classify", "--classifier", "nobody"], "no expert 'nobody'"),
        (["--adapt", "prompt", "--mix", "math=.5"], "takes no --mix"),
    ],
)
def test_what_cannot_be_chosen(args, message):
    assert message in run("generate", "1+2?", *args, code=1).stderr.replace("\n", " ")


def test_a_classification_expert_of_any_tasks(tmp_path):
    """Trained on the prompts of two files, saved with its question, and used by it."""
    for name in ("math", "code"):
        rows = [
            row | {"split": split}
            for split in ("train", "validation", "test")
            for row in t2.tasks.load(name).split(split, 6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classes = ",".join(str(tmp_path / f"{name}.jsonl") for name in ("math", "code"))
    out = tmp_path / "judge.safetensors"
    run("train", "--task", "classify", "--classes", classes, "--out", out, "--steps", "1", "--batch", "4", "-n", "4")
    question = t2.Expert.load(out).manifest["question"]
    assert question["labels"] == {"=m": "math", "=c": "code"}
    answer = run(
        "generate",
        PROMPTS[0],
        "--adapt",
        "classify",
        "--classifier",
        out,
        "-e",
        "math",
        "-e",
        "code",
        "--max-new-tokens",
        "2",
        "--json",
    )
    assert json.loads(answer.stdout)["expert"] in ("math", "code", "base")
    assert "goes with --task classify" in run("train", "--task", "math", "--classes", classes, code=1).stderr
