"""Likelihoods of options: those of each option alone in fp64, whatever shares its batch; tokens cut where they are."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import t2kernels as t2
from t2kernels.rollout.labels import encode_options, equally_sharp, normalised, option_log_likelihoods
from tests.helpers.families import build

TEXT = "Answer: positive negative fall at a constant speed. Answer:\n positively Question: It is so good, is it? "


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of at most 60 tokens, which all random models of the tests have, with BOS before text."""
    made = Tokenizer(models.BPE(unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=60, special_tokens=["<u>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<u>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}Answer:\n{% endif %}"
    )
    return tokenizer


def alone(model, context, option, **routing):
    """The reference: one forward over one prompt with one option."""
    ids = torch.tensor([context + option])
    with torch.no_grad():
        found = model(ids, **routing).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return found[len(context) - 1 :].sum()


PROMPTS = ["It is so good, is it? Answer:", "Answer:", "Question: is it? Answer:", "It is so good, is it so? Answer: "]
OPTIONS = [
    ["positive", "negative"],
    ["fall at a constant speed.", "it", "so good"],
    ["positive", "positively"],
    ["a", "at a constant speed", "good", "is it"],
]


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("memory", [2**28, 1, 60 * 4 * 40])
@pytest.mark.parametrize("start", ["", "It is so good, is it? " * 3])
@pytest.mark.parametrize("window", [None, 48])
def test_they_are_those_of_each_option_alone(tokenizer, patched, memory, start, window):
    """Also where prompts are longer than the sliding window of a layer."""
    kinds = ["sliding_attention", "full_attention"]
    model = build("gemma3", sliding_window=window, layer_types=kinds) if window else build("llama")
    model.double()
    prompts = [start + prompt for prompt in PROMPTS]
    routing = [{}] * 4
    ids = None
    if patched:
        bank = t2.patch_model(model)
        for name in "ab":
            bank.add(name, bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
        ids = bank.ids(["b", None, "a", "b"])
        routing = [{"expert_ids": i} for i in ids]
    got = option_log_likelihoods(model, tokenizer, prompts, OPTIONS, ids, memory)
    contexts, continuations = encode_options(tokenizer, prompts, OPTIONS)
    for found, context, options, route in zip(got, contexts, continuations, routing, strict=True):
        want = torch.stack([alone(model, context, option, **route) for option in options])
        assert found.dtype == torch.float64
        rounding = 1e-5 if window else 1e-9  # the norms of this family are in fp32
        torch.testing.assert_close(found, want, rtol=rounding, atol=rounding)
    if window and start:
        assert any(len(context) > window for context in contexts)
    if patched:  # the experts differ, so a wrong row would show
        other = option_log_likelihoods(model, tokenizer, prompts, OPTIONS, ids.roll(2), memory)
        assert not torch.allclose(other[0], got[0])


def test_the_number_of_forwards(tokenizer):
    model = build("llama")
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS)
    assert len(seen) == 2  # contexts, then all options
    assert seen[1][0] == sum(map(len, OPTIONS))


def test_prompt_and_option_are_the_tokens_of_their_text(tokenizer):
    contexts, options = encode_options(tokenizer, PROMPTS, OPTIONS)
    for prompt, context, some, texts in zip(PROMPTS, contexts, options, OPTIONS, strict=True):
        for ids, text in zip(some, texts, strict=True):
            assert context + ids == tokenizer(f"{prompt.rstrip()} {text}")["input_ids"]
            assert ids
    # The space at the end of a prompt belongs to the option, as in training data.
    with_space, without = encode_options(tokenizer, ["Answer: ", "Answer:"], [["positive", "it"]] * 2)[1]
    assert with_space == without
    assert tokenizer.decode(without[0]) == " positive"


def test_a_chat_has_one_bos_and_no_space_before_an_option(tokenizer):
    chat = [{"role": "user", "content": "is it?"}]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    bare.chat_template = tokenizer.chat_template
    (context,), ((ids, _),) = encode_options(bare, [chat], [["it", "so"]])
    assert context.count(bare.bos_token_id) == 1
    assert bare.decode(context + ids) == "<s>is it?\nAnswer:\nit"


def test_a_token_that_the_option_changes_belongs_to_the_option(tokenizer):
    """Where "Answer:" and "\\n positively" would be other tokens than the text as a whole."""
    (context,), ((first, second),) = encode_options(tokenizer, ["a posi"], [["tive", "x"]])
    assert tokenizer.decode(context + first) == "a posi tive"
    chat = [{"role": "user", "content": "x"}]
    joining = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    joining.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} posi"
    (context,), ((first, second),) = encode_options(joining, [chat], [["tive", "tively"]])
    whole = joining("x positive", add_special_tokens=False)["input_ids"]
    assert context + first == whole
    assert len(joining("x posi")["input_ids"]) > len(context)  # "positive" is one token: the prompt's end is healed
    assert context + second == joining("x positively", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_readers_that_are_equally_sure_keep_their_choices(share):
    scores = 5 * torch.randn(4, 7, 5)
    scores[:, 2, 3:] = scores[:, 5, 4:] = -math.inf  # prompts with fewer options
    scores[1] = 30 * scores[0]  # a bolder reader
    scores[2] = scores[0] / 7 - 3.0
    got = equally_sharp(scores, share).double()
    entropy = -torch.special.xlogy(got, got).sum(-1).mean(-1)
    most = (5 * math.log(5) + math.log(3) + math.log(4)) / 7
    torch.testing.assert_close(entropy, torch.full_like(entropy, share * most), rtol=1e-4, atol=0)
    torch.testing.assert_close(got.sum(-1), torch.ones(4, 7, dtype=torch.float64))
    assert torch.equal(got.argmax(-1), scores.argmax(-1))
    assert not got[:, 2, 3:].any()
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[2], got[0], rtol=1e-4, atol=1e-6)


def test_lengths_are_characters():
    sums = torch.tensor([-4.0, -9.0, -2.0])
    options = ["aa", "bbb", "cé"]
    assert normalised(sums, options, "sum").tolist() == [-4, -9, -2]
    assert normalised(sums, options, "length").tolist() == [-2, -3, -1]
    with pytest.raises(ValueError, match="norm='mean'; wanted 'sum' or 'length'"):
        normalised(sums, options, "mean")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["Answer:"], [[]], r"the options of prompt 0 are \[\]"),
        (["Answer:", "it"], [["a"], ["a", " "]], "the options of prompt 1 are"),
        ([""], [["a", "it"]], "at least one token before its options"),
    ],
)
def test_what_cannot_be_scored(tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        encode_options(tokenizer, prompts, options)
