"""The built-in tiny model loads as any checkpoint does, is as good as it says, and is pre-trained on the right text."""

import json
import logging
import math
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from t2kernels import tasks, tiny
from t2kernels.tiny import accuracy as evaluate
from t2kernels.tiny import corpus, pretrain
from t2kernels.tiny.tokenizer import CHARACTERS, EOS, build, encode


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


STATED = json.loads((tiny.path() / "accuracy.json").read_text())


def test_loads_offline_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        model = AutoModelForCausalLM.from_pretrained(tiny.path())
        tokenizer = AutoTokenizer.from_pretrained(tiny.path())
        inputs = tokenizer(["12+4+5?", "kind(12+4+5)?"], padding=True, return_tensors="pt")
        out = model.generate(**inputs)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [r.getMessage() for r in records] == []
    assert [str(w.message) for w in recwarn if "transformers" in w.filename] == []
    assert model.dtype == torch.bfloat16
    assert out.shape[1] <= inputs.input_ids.shape[1] + 32


def test_file():
    file = tiny.path() / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert sum(t.numel() for t in found.values()) == 1_062_528
    assert sum(f.stat().st_size for f in tiny.path().iterdir()) < 3e6


def test_tokenizer_round_trip(loaded):
    tokenizer = loaded[1]
    for text in (CHARACTERS, "  two  spaces ", "a ,b .c !\n\n x'  s", "", " "):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:] == encode(text) == build()(text).input_ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]
    assert tokenizer("é").input_ids[1:] == [tokenizer.unk_token_id]
    assert len(tokenizer) == loaded[0].config.vocab_size == 100
    padded = tokenizer(["1+2=", "1="], padding=True)
    assert padded.attention_mask == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert padded.input_ids[1][:2] == [tokenizer.pad_token_id] * 2
    assert (tokenizer.padding_side, tokenizer.eos_token_id, loaded[0].generation_config.eos_token_id) == (
        "left",
        EOS,
        EOS,
    )


def test_padding_does_not_change_an_answer(loaded):
    prompts = [tasks.load(name).split("test", 3)[2]["prompt"] for name in tasks.names()]
    together = evaluate.completions(*loaded, prompts, 20)
    assert together == [evaluate.completions(*loaded, [prompt], 20)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["math", "code", "reason", "classify", "hop5"])
def test_accuracy_is_as_stated(loaded, name):
    rows = tasks.load(name).split("test")
    stated = STATED[name]
    assert stated["n"] == len(rows)
    p = stated["greedy"]
    rows = rows[:1000]
    assert abs(evaluate.accuracy(*loaded, name, rows) - p) <= 3 * math.sqrt(p * (1 - p) / len(rows)) + 1e-3


@pytest.mark.parametrize(("name", "separator"), [("sub", ","), ("lookops", ">")])
def test_it_is_better_by_working_than_at_once(loaded, name, separator):
    """Adaptation can gain this: given the first character of the working, it is as good as stated, and far better."""
    p, rows = STATED[name]["working"], tasks.load(name).split("test", 300)
    assert p > STATED[name]["greedy"] + 0.5
    assert (
        abs(evaluate.accuracy(*loaded, name, rows, begun=separator) - p)
        <= 3 * math.sqrt(p * (1 - p) / len(rows)) + 1e-3
    )


def test_a_packed_document_sees_only_itself(loaded):
    ids, labels, mask, count = next(pretrain.batches(corpus.web(7)))
    with torch.no_grad():
        packed = loaded[0](input_ids=ids[:1], attention_mask=mask[:1]).logits[0]
        starts = [*(ids[0] == 1).nonzero().flatten().tolist(), int((ids[0] != 0).sum())]
        for a, b in pairwise(starts):
            alone = loaded[0](input_ids=ids[:1, a:b]).logits[0]
            torch.testing.assert_close(packed[a:b], alone, atol=2e-4, rtol=1e-4)
            counted = labels[0, a:b] != -100
            asked = (ids[0, a:b] == encode("?")[0]).nonzero().flatten()[-1]
            assert counted.nonzero().flatten().tolist() == list(range(int(asked), b - a - 1))
            assert labels[0, a:b][counted].tolist() == ids[0, a:b][asked + 1 :].tolist()
    assert count > pretrain.ROWS


def test_pretraining_is_the_same_twice():
    first, second = (pretrain.train(2).state_dict() for _ in range(2))
    start = pretrain.train(0).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)
    assert all(torch.isfinite(value).all() for value in first.values())


def test_no_expert_is_missing_its_file():
    assert all(file.is_file() for file in tiny.experts().values())
