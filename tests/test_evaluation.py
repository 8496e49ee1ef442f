"""`t2kernels.evaluation` as a library: no command line, no torch at import, scores equal to those of single answers."""

import subprocess
import sys

import pytest
import torch

import t2kernels as t2
from t2kernels import evaluation


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model)
    for name in ("math", "code"):
        bank.add(name, t2.tiny.experts()[name])
    return model, tokenizer


def test_it_imports_neither_torch_nor_the_command_line():
    code = (
        "import sys, t2kernels; t2kernels.evaluation.Score(1, 2);"
        "print([m for m in sys.modules if m in ('torch', 'typer', 'transformers') or m.startswith('t2kernels.cli')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "evaluation" in t2.__all__


def test_scores_of_experts_on_a_task(tiny):
    task = t2.tasks.load("math")
    problems = task.split("test", 12)
    base, math, mixed = evaluation.scores(*tiny, task, problems, [None, "math", {"math": 0.5, "code": 0.5}])
    assert math.right >= 10 > base.right
    for score, expert in ((base, None), (math, "math"), (mixed, {"math": 0.5, "code": 0.5})):
        alone = 0
        for row in problems:
            (text,) = evaluation.answers(*tiny, [row["prompt"]], [expert], task.max_new_tokens)
            alone += task.right(text, row["answer"])
        assert (score.right, score.of) == (alone, 12)
    low, high = math.interval
    assert 0 <= low < math.accuracy <= high <= 1


def test_a_model_that_is_not_patched_answers_as_it_is_only(tiny):
    model, tokenizer = t2.tiny.load()
    prompts = [row["prompt"] for row in t2.tasks.load("math").split("test", 3)]
    assert evaluation.answers(model, tokenizer, prompts, None, 8) == evaluation.answers(*tiny, prompts, [None] * 3, 8)
    with pytest.raises(ValueError, match="not patched"):
        evaluation.answers(model, tokenizer, prompts, [None] * 3, 8)


def test_rebuilt_weights_answer_as_the_expert_does(tiny):
    model, tokenizer = tiny
    dense = t2.tiny.load()[0]
    name = "model.layers.0.mlp.up_proj"
    W = dense.get_submodule(name).weight.detach().clone()
    factors, expert = t2.decompose(dense), model.t2_bank["math"]
    evaluation.rebuild(dense, factors, expert.z)
    U, sigma, V = (part.double() for part in factors[name])
    want = (U * (sigma * expert.z[name].double())) @ V.T
    torch.testing.assert_close(dense.get_submodule(name).weight.double(), want, rtol=1e-4, atol=1e-6)
    prompts = [row["prompt"] for row in t2.tasks.load("math").split("test", 8)]
    rebuilt = evaluation.answers(dense, tokenizer, prompts, None, 26)
    assert rebuilt == evaluation.answers(model, tokenizer, prompts, ["math"] * 8, 26)
    evaluation.rebuild(dense, factors, {})
    torch.testing.assert_close(dense.get_submodule(name).weight, W, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["sum", "length"])
def test_options_are_chosen_by_likelihood(tmp_path, norm):
    """With and without experts: the choice is that of each option's own forward."""
    model, tokenizer = t2.tiny.load()
    options = ["=10", "=7+3=12", "a", "=9+12=21=4"]
    rows = [{**row, "answer": options[i % 4]} for i, row in enumerate(t2.tasks.load("math").split("test", 12))]
    task = t2.tasks.Task("own", lambda *_: rows, check="choice", labels=tuple(options), norm=norm)
    problems = task.split("test")
    (alone,) = evaluation.scores(model, tokenizer, task, problems, [None])
    assert not hasattr(model, "t2_bank")
    bank = t2.patch_model(model)
    bank.add("math", t2.tiny.experts()["math"])
    bank.add("code", t2.tiny.experts()["code"])
    measured = evaluation.measure(model, tokenizer, task, problems, {"base": None, "math": "math"}, batch=7)
    assert measured.arms["base"].score == alone
    assert measured.meter.tokens == 0 < measured.meter.seconds
    assert alone.well_formed is None
    prompts, experts = [row["prompt"] for row in problems], [None, "math", "code"] * 4
    chosen = evaluation.choices(model, tokenizer, prompts, [options] * 12, experts, norm, batch=5)
    for prompt, choice, expert in zip(prompts, chosen, experts, strict=True):
        scores = []
        for option in options:
            head, ids = (
                len(tokenizer(prompt)["input_ids"]),
                torch.tensor([tokenizer(f"{prompt} {option}")["input_ids"]]),
            )
            with torch.no_grad():
                logp = model(ids, expert_ids=bank.ids([expert])).logits.double().log_softmax(-1)[0, :-1]
            scores.append(logp.gather(-1, ids[0, 1:, None])[head - 1 :].sum().item())
        if norm == "length":
            scores = [score / len(option) for score, option in zip(scores, options, strict=True)]
        assert options[max(range(4), key=scores.__getitem__)] == choice
    named = evaluation.choices(model, tokenizer, prompts, [options] * 12, [None] * 12, norm)
    assert alone.right == sum(a == row["answer"] for a, row in zip(named, rows, strict=True))
    assert evaluation.choices(model, tokenizer, prompts, [options] * 12, ["math"] * 12, norm) != named


def test_well_formed_answers_are_counted(tiny):
    from dataclasses import replace

    task = t2.tasks.load("math")
    problems = task.split("test", 12)
    (score,) = evaluation.scores(*tiny, task, problems, [None])
    assert score.formed is None
    task = replace(task, form=lambda said, row: said.startswith("=") and row["answer"].isdigit())
    base, math = evaluation.scores(*tiny, task, problems, [None, "math"])
    written = evaluation.answers(*tiny, [row["prompt"] for row in problems], ["math"] * 12, task.max_new_tokens)
    assert math.formed == sum(text.startswith("=") for text in written)
    assert math.well_formed == math.formed / 12
    assert base.formed is not None
