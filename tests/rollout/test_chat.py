"""From prompts to token ids: a chat template writes its own special tokens, the tokenizer adds them to text only."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import t2kernels as t2
from t2kernels.cli import models
from t2kernels.evaluation import answers
from t2kernels.rollout.chat import (
    PromptForm,
    as_completion,
    encode,
    has_template,
    other_forms,
    prompt_form,
    recorded_form,
    user_message,
)
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


# --- one decision


class Template:
    chat_template = "{{ messages }}"


class Plain:
    chat_template = None


CHAT, PLAIN = PromptForm(True), PromptForm(False)
TERSE = PromptForm(True, "Be terse.")


@pytest.mark.parametrize(
    ("tokenizer", "chat", "system", "trained", "form"),
    [
        (Template, None, None, [], CHAT),
        (Template, False, None, [], PLAIN),
        (Plain, None, None, [], PLAIN),
        (Template, None, "", [], PromptForm(True, "")),
        # what experts were trained with is the default,
        (Template, None, None, [PLAIN], PLAIN),
        (Template, None, None, [TERSE, TERSE], TERSE),
        (Template, True, None, [TERSE], TERSE),
        (Plain, None, None, [CHAT], PLAIN),
        # an option is stronger,
        (Template, True, None, [PLAIN], CHAT),
        (Template, False, None, [TERSE], PLAIN),
        (Template, None, "Go on.", [TERSE], PromptForm(True, "Go on.")),
        (Template, None, "Go on.", [PLAIN], PromptForm(True, "Go on.")),
        # and experts that disagree decide nothing.
        (Template, None, None, [PLAIN, TERSE], CHAT),
    ],
)
def test_the_form_of_prompts(tokenizer, chat, system, trained, form):
    manifests = [{"prompt": one.record()} for one in trained]
    assert prompt_form(tokenizer, chat, system, [*manifests, {"steps": 3}]) == form
    lines = other_forms(form, {str(i): manifest for i, manifest in enumerate(manifests)})
    assert len(lines) == sum(one != form for one in trained)


def test_what_is_said_of_another_form():
    assert other_forms(PLAIN, {"reviews": {"prompt": TERSE.record()}, "old": {}}) == [
        "expert 'reviews' was trained with the chat template and the system message 'Be terse.', and is asked with "
        "plain text"
    ]
    assert recorded_form({}) is None
    assert recorded_form({"prompt": "chat"}) is None
    assert recorded_form({"prompt": {"chat": True}}) == CHAT


def test_forms_of_tasks(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4", "split": "test"}))
    chats, sums = t2.tasks.load(file), t2.tasks.load("math")
    assert prompt_form(Template, task=chats) == CHAT
    assert prompt_form(Template, task=chats, manifests=[{"prompt": PLAIN.record()}]) == CHAT
    assert prompt_form(Template, task=sums) == PLAIN  # the built-in model's own language
    assert prompt_form(Template, True, task=sums) == CHAT
    for asked, options, message in (
        (Template, {"chat": False, "task": chats}, "the prompts of 'c' are chats"),
        (Plain, {"task": chats}, "no chat template"),
        (Plain, {"chat": True}, "no chat template"),
        (Plain, {"system": "x"}, "a system message needs the chat template"),
        (Template, {"chat": False, "system": "x"}, "a system message needs the chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_form(asked, **options)


def test_a_form_is_that_of_the_task_and_of_single_prompts(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "2+2?", "answer": "4", "split": "test"}))
    task = t2.tasks.load(file)
    for form in (PLAIN, CHAT, TERSE, PromptForm(True, "")):
        (row,) = form.of_task(task).split("test")
        assert row["prompt"] == form.apply("2+2?")
        assert recorded_form({"prompt": json.loads(json.dumps(form.record()))}) == form
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x"}]
    assert TERSE.apply(own) == own
    assert TERSE.apply(own[1:]) == [{"role": "system", "content": "Be terse."}, own[1]]


@pytest.mark.parametrize("system", [5, ["x"], {"a": 1}, True])
def test_a_system_message_that_is_no_text_is_refused(system):
    with pytest.raises(t2.InputError, match="expert 'math' has the system message"):
        recorded_form({"name": "math", "prompt": {"chat": True, "system": system}})
