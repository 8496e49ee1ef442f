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
