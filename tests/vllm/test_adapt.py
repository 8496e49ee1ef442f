"""`few_shot` in an engine: with greedy answers it finds what the library's own search finds, and the engine serves it
at once.
"""

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.adapt import CEMConfig, Examples, FewShot
from t2kernels.integrations.vllm import engine_args, expert, few_shot
from tests.vllm.worlds import engine

NAMES = ("math", "code", "reason")
FILES = {n: tiny.experts()[n] for n in NAMES}
SETTINGS = {"population": 6, "elite": 0.5, "iterations": 3, "mean": -0.3, "std": 0.4, "seed": 2}


@pytest.fixture(scope="module")
def llm(world):
    """Three candidates in a step, of six; two experts in host memory beside them."""
    with engine(world.model, **engine_args(factors=world.factors, rows=4, host=5)) as llm:
        yield llm


@pytest.fixture(scope="module")
def patched():
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, form="delta")
    for name, file in FILES.items():
        bank.add(name, file)
    return model, tokenizer


def test_it_finds_what_the_library_finds_and_serves_it_at_once(llm, patched, tmp_path):
    from vllm import SamplingParams

    task = t2.tasks.load("sub")
    rows = task.split("train", 8, seed=3)
    got = few_shot(llm, FILES, rows, task, tmp_path / "mine", name="mine", **SETTINGS)
    want = FewShot(*patched, Examples(*patched, rows, task), NAMES, CEMConfig(score="reward", **SETTINGS), name="mine")
    assert torch.equal(got.found.alpha, want.found.alpha)
    assert got.found.scores == want.found.scores
    assert len(set(got.found.scores)) > 1  # not a search in which all are alike
    assert got.found.answers == want.found.answers
    assert (got.gain, got.error) == (want.gain, want.error)
    assert got.request is not None
    assert set(llm.llm_engine.list_loras()) == {got.request.lora_int_id}  # candidates do not stay in the engine

    test = [row["prompt"] for row in task.split("validation", 12)]
    sampling = SamplingParams(temperature=0, max_tokens=22)
    model, tokenizer = patched
    for who, name in ((got.request, "mine"), (expert("again", tmp_path / "mine"), "mine"), (None, None)):
        batch = tokenizer(test, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, experts=name, max_new_tokens=22, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
        answers = llm.generate(test, sampling, lora_request=who, use_tqdm=False)
        assert [a.outputs[0].text for a in answers] == tokenizer.batch_decode(out, skip_special_tokens=True)


def test_answers_are_sampled(llm, tmp_path):
    task, seen = t2.tasks.load("sub"), []
    rows = task.split("train", 4)

    def reward(prompts, completions, answer):
        seen.append([list(zip(prompts, completions, strict=True))[i : i + 3] for i in range(0, len(prompts), 3)])
        return task.reward(prompts=prompts, completions=completions, answer=answer)

    few_shot(
        llm,
        FILES,
        rows,
        reward,
        tmp_path / "mine",
        **{**SETTINGS, "iterations": 1, "samples": 3, "temperature": 1.5},
        max_new_tokens=22,
    )
    generation = seen[1]  # the first is the trial on empty answers
    assert [three[0][0] for three in generation] == [row["prompt"] for row in rows] * 6
    assert all(len({p for p, _ in three}) == 1 for three in generation)
    assert sum(len({c for _, c in three}) == 3 for three in generation) > 12
