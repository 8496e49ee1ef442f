"""Drawing completions: end tokens, stop texts, the model's own settings, modes, and a second thread on the model."""

import threading

import pytest
import torch

import t2kernels as t2
from t2kernels.rollout.chat import end_tokens
from t2kernels.rollout.generation import NEUTRAL, Sampler
from t2kernels.rollout.modes import eval_mode, restored_mode

PROMPTS = ["12+3+4?", "7+8?", "47+8+6?", "1+1?"]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model)
    return model, tokenizer


@pytest.fixture
def own_settings(tiny):
    """The model's own settings, with some that change what is drawn."""
    model = tiny[0]
    before = model.generation_config.to_dict()
    own = {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [10, 11],
        "max_length": 9,
        "top_k": 1,
    }
    model.generation_config.update(**own)
    yield model.generation_config
    model.generation_config.update(**{k: before.get(k) for k in own})


def draw(tiny, prompts=PROMPTS, max_new_tokens=24, temperature=0.0, **kwargs):
    model, tokenizer = tiny
    sampler = Sampler(model, tokenizer, max_new_tokens)
    ids, mask = sampler.encode(prompts, torch.device("cpu"))
    return sampler, sampler.draw(model, ids, mask, temperature, **kwargs)


def test_another_threads_generate_is_not_affected(tiny):
    """At each forward of a draw, a second thread generates with the model's own settings, from start to end."""
    model, tokenizer = tiny
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    alone = model.generate(ids)
    config, before = model.generation_config, model.generation_config.to_dict()
    drawing, found = threading.get_ident(), []

    def second_thread():
        found.append((model.generate(ids), model.generation_config is config, config.to_dict() == before))

    def at_forward(*_):
        if threading.get_ident() == drawing:
            other = threading.Thread(target=second_thread)
            other.start()
            other.join()

    handle = model.register_forward_pre_hook(at_forward)
    try:
        _, rollout = draw(tiny, max_new_tokens=2)
    finally:
        handle.remove()
    assert rollout.completion.shape == (4, 2)
    assert len(found) >= 2
    for out, same, unchanged in found:
        assert torch.equal(out, alone)
        assert same
        assert unchanged


def test_the_models_own_settings_apply_only_where_they_are_asked_for(tiny, own_settings):
    model, tokenizer = tiny
    want = {}
    for own in (False, True):
        sampler, rollout = draw(tiny, own_settings=own)
        want[own] = sampler.decode(rollout, PROMPTS)
    for prompt, text in zip(PROMPTS, want[True], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == text
    model.generation_config.update(repetition_penalty=1.0, no_repeat_ngram_size=0, suppress_tokens=None)
    for prompt, text in zip(PROMPTS, want[False], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == text
    assert want[True] != want[False]


@pytest.mark.parametrize("field", [*NEUTRAL, "top_k", "top_p", "min_p", "forced_eos_token_id", "bad_words_ids"])
def test_no_setting_of_the_model_changes_what_is_drawn(tiny, field):
    model = tiny[0]
    strong = {
        "min_length": 40, "num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 5.0, "typical_p": 0.2,
        "no_repeat_ngram_size": 1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "length_penalty": 3.0, "top_k": 1,
        "encoder_repetition_penalty": 5.0, "encoder_no_repeat_ngram_size": 1, "top_p": 0.1, "min_p": 0.9,
        "forced_eos_token_id": 7, "bad_words_ids": [[20], [21], [22]],
    }  # fmt: skip
    for temperature in (0.0, 1.0):
        torch.manual_seed(3)
        want = draw(tiny, temperature=temperature, samples=2)[1]
        before, sampled = getattr(model.generation_config, field, None), model.generation_config.do_sample
        setattr(model.generation_config, field, strong[field])
        model.generation_config.do_sample = True  # several sequences are valid with it only
        try:
            torch.manual_seed(3)
            got = draw(tiny, temperature=temperature, samples=2)[1]
        finally:
            setattr(model.generation_config, field, before)
            model.generation_config.do_sample = sampled
        assert torch.equal(got.ids, want.ids)


def test_stop_texts_end_a_completion_and_stay_in_it(tiny):
    sampler, full = draw(tiny)
    whole = sampler.decode(full, PROMPTS)
    _, cut = draw(tiny, stop=(",", "="))
    for text, short, n in zip(whole, sampler.decode(cut, PROMPTS), cut.completion.sum(1).tolist(), strict=True):
        end = min((text.index(c) + 1 for c in ",=" if c in text), default=len(text))
        assert short == text[:end]
        assert n in (end, end + 1)  # a token for each character; the end token or a pad token counts as one


def test_the_tokens_that_end_a_completion(tiny):
    model, tokenizer = tiny

    class Model:
        generation_config = type("Config", (), {"eos_token_id": [7, 9]})

    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    assert end_tokens(Model, tokenizer) == [7, 9, tokenizer.eos_token_id]
    Model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert end_tokens(Model, tokenizer) == end_tokens(None, tokenizer) == [tokenizer.eos_token_id]
    Model.generation_config.eos_token_id = None
    assert end_tokens(Model, type("Tokenizer", (), {"eos_token_id": None})) == []


def test_modes_are_restored_module_by_module_and_not_touched_where_right():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    touched = []
    model[1].train = lambda mode=True: touched.append(mode)
    model.train = lambda mode=True: (touched.append(mode), torch.nn.Module.train(model[0], mode))[0]
    with restored_mode(model):
        model[0].eval()
    assert [m.training for m in model.modules()] == [True, True, False, False]
    del model.train, model[1].train
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]
    model.eval()
    model.train = lambda mode=True: touched.append("toggled")
    with eval_mode(model):
        pass
    assert "toggled" not in touched
