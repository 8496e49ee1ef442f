"""From prompts to token ids: a chat template writes its own special tokens, the tokenizer adds them to text only."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import t2kernels as t2
from t2kernels.cli import models
from t2kernels.evaluation import answers
from t2kernels.rollout.chat import as_completion, encode, has_template, user_message
from t2kernels.rollout.generation import Sampler
from t2kernels.rollout.labels import split_labels
from tests.helpers.commandline import t2_, wide  # noqa: F401


@pytest.fixture
def tokenizer():
    """A tokenizer that adds BOS to text, as its chat template does."""
    tokenizer = t2.tiny.load()[1]
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


def test_one_bos_for_text_and_for_chats(tokenizer):
    bos = tokenizer.bos_token_id
    (text,) = encode(tokenizer, ["1+2"])
    (chat,) = encode(tokenizer, [user_message("1+2")])
    assert text.count(bos) == chat.count(bos) == 1
    assert text[0] == chat[0] == bos
    assert chat == [*text, tokenizer.convert_tokens_to_ids("=")]


def test_a_batch_is_padded_on_the_left_and_of_one_kind(tokenizer):
    ids, mask = Sampler(None, tokenizer, 4).encode(["1", "1+2+3"], torch.device("cpu"))
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1], [1] * 6]
    assert ids[0, :4].tolist() == [tokenizer.pad_token_id] * 4
    assert encode(tokenizer, []) == []
    with pytest.raises(ValueError, match="some prompts of this batch are text and some are chats"):
        encode(tokenizer, ["1", user_message("1")])


def test_a_completion_has_the_form_of_its_prompt(tokenizer):
    assert as_completion("a", "1") == "a"
    assert as_completion("a", user_message("1")) == [{"role": "assistant", "content": "a"}]
    assert has_template(tokenizer)
    tokenizer.chat_template = None
    assert not has_template(tokenizer)


def test_the_command_line_writes_one_bos_in_chat(tokenizer, monkeypatch):
    model = t2.tiny.load()[0]
    seen = []
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded("tiny", model, tokenizer))
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    out = t2_("generate", "12+3", "--chat", "--max-new-tokens", 3, "--json").splitlines()[-1]
    assert seen[0][0].tolist() == encode(tokenizer, [user_message("12+3")])[0]
    assert json.loads(out)["prompt"] == "12+3"
    assert json.loads(out)["text"] == answers(model, tokenizer, [user_message("12+3")], None, 3)[0]
    tokenizer.chat_template = None
    t2.unpatch_model(model)
    assert "no chat template" in t2_("generate", "12+3", "--chat", code=1)


@pytest.mark.parametrize(
    ("labels", "common", "rest"),
    [
        ([[5], [9]], [], [[5], [9]]),
        ([[7, 5], [7, 9]], [7], [[5], [9]]),
        ([[7, 8, 5, 4], [7, 8]], [7], [[8, 5, 4], [8]]),
        ([[7, 8, 5], [7, 8, 9, 1]], [7, 8], [[5], [9, 1]]),
    ],
)
def test_the_common_start_of_labels_leaves_a_token_of_each(labels, common, rest):
    assert split_labels(labels) == (common, rest)
