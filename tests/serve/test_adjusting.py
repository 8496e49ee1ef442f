"""What requests add to the logits, the structure of texts, calls of tools, and the bytes of tokens."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from t2kernels import tiny
from t2kernels.serve.engine.adjusting import Adjustment
from t2kernels.serve.engine.grammar import Grammars
from t2kernels.serve.engine.sampling import Sampling, draw
from t2kernels.serve.http.tools import ToolReader
from t2kernels.serve.http.vocabulary import Vocabulary
from tests.helpers.serving import served

V = 40


def reference(logits, prompt, text, frequency, presence, repetition, bias, min_tokens, ends):
    """The adjusted logits of one row, a token at a time, in fp64."""
    out = logits.double().tolist()
    for t in range(V):
        if t in prompt or t in text:
            out[t] = out[t] / repetition if out[t] > 0 else out[t] * repetition
        out[t] -= frequency * text.count(t) + presence * (t in text)
        out[t] += bias.get(t, 0.0)
        if len(text) < min_tokens and t in ends:
            out[t] = float("-inf")
    return out


def test_a_batch_of_penalties_and_biases_is_the_reference_token_by_token():
    r, g = random.Random(3), torch.Generator().manual_seed(3)
    for _ in range(20):
        rows = []
        for _ in range(r.randrange(1, 6)):
            prompt = [r.randrange(V) for _ in range(r.randrange(1, 9))]
            values = dict(
                frequency=r.choice([0.0, 0.7, -0.4]),
                presence=r.choice([0.0, 1.1]),
                repetition=r.choice([1.0, 1.3, 0.8]),
                bias={r.randrange(V): r.uniform(-5, 5) for _ in range(r.randrange(3))},
                min_tokens=r.randrange(4),
                ends=[1, 2],
            )
            sampling = Sampling(adjustment=Adjustment(**values))
            if sampling.adjustment is not None:
                sampling.adjustment.prompt = prompt
            rows.append((values, prompt, sampling, []))
        for _ in range(8):
            logits = torch.randn(len(rows), V, generator=g) * 2
            before = logits.clone()
            tokens = draw(logits, [sampling for _, _, sampling, _ in rows]).tolist()
            assert torch.equal(logits, before), "the logits of the model are not written to"
            for row, token, (values, prompt, _, text) in zip(before, tokens, rows, strict=True):
                wanted = reference(row, prompt, text, **values)
                assert wanted[token] == pytest.approx(max(wanted), abs=1e-5)
                text.append(token)


def test_neutral_adjustments_cost_nothing():
    assert Sampling(adjustment=Adjustment(ends=[1])).adjustment is None
    assert Sampling(adjustment=Adjustment(bias={1: 2.0})).adjustment is not None


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.log(torch.tensor([[0.5, 0.26, 0.24 - 1e-3, 1e-3]])).repeat(2000, 1)
    samplings = [Sampling(1.0, seed=i, min_p=0.5) for i in range(2000)]
    found = draw(logits, samplings).bincount(minlength=4) / 2000
    assert found[2] == found[3] == 0  # less than half of the likeliest
    assert found[0] == pytest.approx(0.5 / 0.76, abs=0.04)
    mixed = draw(logits[:3], [Sampling(1.0, seed=1), Sampling(1.0, seed=1, min_p=1.0), Sampling()])
    assert mixed[1:].tolist() == [0, 0]
    assert mixed[0] == draw(logits[:1], [Sampling(1.0, seed=1)])[0], "a row without min_p is drawn as it is alone"


def test_log_probabilities_are_the_models_whatever_is_adjusted():
    logits = torch.randn(1, V)
    sampling = Sampling(logprobs=2, adjustment=Adjustment(bias={7: 100.0}))
    assert draw(logits, [sampling]).tolist() == [7]
    own, top = sampling.reported[0]
    assert own == pytest.approx(torch.log_softmax(logits[0].double(), -1)[7].item(), abs=1e-5)
    assert top[0][0] == logits.argmax()


# --- in the server


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    with served() as made:
        yield made


def ask(server, **fields):
    body = {"model": "tiny", "prompt": "12+30+4?", "temperature": 0, "max_tokens": 12, **fields}
    response = server[0].post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_every_field_does_in_the_server_what_it_says(server):
    ids = server[1].tokenizer.get_vocab()
    plain = ask(server)
    token = str(ids["7"])
    assert ask(server, logit_bias={token: 100})["text"] == "7" * 12
    assert "7" not in ask(server, logit_bias={token: -100}, n=1, temperature=1, seed=1)["text"]
    many = ask(server, frequency_penalty=2.0, logit_bias={token: 30, str(ids["8"]): 30}, max_tokens=10)["text"]
    assert set(many) == {"7", "8"}
    assert sorted(map(many.count, "78")) == [5, 5]
    once = ask(server, presence_penalty=2.0, logit_bias={token: 40, str(ids["8"]): 39}, max_tokens=3)["text"]
    assert set(once) == {"7", "8"}
    long = [ask(server, repetition_penalty=p, ignore_eos=True, max_tokens=40)["text"] for p in (1.0, 5.0)]
    assert len(set(long[1])) > len(set(long[0]))
    stopped = ask(server, stop_token_ids=[ids[plain["text"][2]]])
    assert stopped["text"] == plain["text"][: plain["text"].index(plain["text"][2])]
    assert stopped["finish_reason"] == "stop"


def test_the_end_can_be_held_back_or_ignored(server):
    plain = ask(server, model="math", max_tokens=40)
    assert plain["finish_reason"] == "stop"
    size = len(plain["text"]) + 1
    ignored = ask(server, model="math", max_tokens=40, ignore_eos=True, logprobs=0)
    assert ignored["finish_reason"] == "length"
    assert len(ignored["logprobs"]["tokens"]) == 40
    held = ask(server, model="math", max_tokens=40, min_tokens=size + 3, logprobs=0)
    assert len(held["logprobs"]["tokens"]) >= size + 3
    assert held["text"].startswith(plain["text"])


# --- structure

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_without_the_package_a_structure_is_refused_with_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for fields, field in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
    ):
        response = server[0].post("/v1/completions", json={"model": "tiny", "prompt": "1", **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, field, "not_installed")
        assert "pip install 't2kernels[structured]'" in error["message"]


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_texts_have_the_structure_that_was_asked_for(server, seed):
    pytest.importorskip("llguidance")
    warm = {} if seed is None else {"temperature": 1.5, "seed": seed}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    for fields in ({"response_format": schema}, {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}):
        said = ask(server, max_tokens=90, logit_bias={"5": -100, "4": -100}, **fields, **warm)
        if said["finish_reason"] == "stop":
            found = json.loads(said["text"])
            assert set(found) == {"a", "b"}
            assert isinstance(found["a"], int)
            assert found["b"] in "xy"
        else:
            assert said["text"].lstrip().startswith("{")
    assert ask(server, guided_regex="[0-4]{3}-(ab|ba)", **warm)["finish_reason"] == "stop"
    for n in (1, 3):
        body = {"model": "tiny", "prompt": "1+2?", "max_tokens": 20, "n": n, "guided_regex": "[0-4]{3}-(ab|ba)", **warm}
        choices = server[0].post("/v1/completions", json=body).json()["choices"]
        for choice in choices:
            head, tail = choice["text"].split("-")
            assert len(head) == 3
            assert set(head) <= set("01234")
            assert tail in ("ab", "ba")
    assert ask(server, guided_choice=["yes", 'no "q"', "né"], **warm)["text"] in ("yes", 'no "q"')
    assert ask(server, structured_outputs={"regex": "b+c"}, **warm)["text"].strip("b") in ("", "c")
    assert ask(server, guided_grammar='start: "a" | "b" "c"', **warm)["text"] in ("a", "bc")


def test_a_structure_is_one_rows_and_the_others_are_not_touched(server):
    pytest.importorskip("llguidance")
    prompts = ["47+38+59?", "rsx(gcaf)?"]
    plain = [ask(server, model="math", prompt=p)["text"] for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        shaped = [pool.submit(ask, server, guided_regex="(ab){4}", prompt="1+2?") for _ in range(4)]
        others = [pool.submit(ask, server, model="math", prompt=p) for p in prompts]
        assert [f.result()["text"] for f in shaped] == ["abababab"] * 4
        assert [f.result()["text"] for f in others] == plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_regex": "(a"}, "guided_regex: the regex cannot be used"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json: the json cannot be used"),
        ({"guided_json": "{"}, "guided_json: the json cannot be used"),
        ({"guided_choice": []}, "guided_choice: the choice cannot be used"),
        ({"guided_grammar": "start: ("}, "guided_grammar: the grammar cannot be used"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs: xml is not supported; there are json, regex"),
    ],
)
def test_a_structure_that_cannot_be_is_refused(server, fields, words):
    pytest.importorskip("llguidance")
    response = server[0].post("/v1/completions", json={"model": "tiny", "prompt": "1", **fields})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_model_without_an_end_has_no_structures():
    pytest.importorskip("llguidance")
    _, tokenizer = tiny.load()
    with pytest.raises(ValueError, match="no token that ends a text"):
        Grammars(Vocabulary(tokenizer), [-1], 100).make("regex", "a")


# --- tools


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 500])
def test_calls_are_taken_out_of_a_text_in_whatever_pieces(size):
    broken = "<tool_call>{oops}</tool_call>"
    text = f"a <tool b {CALL}\n{CALL} then {broken} and <tool_call>never"
    reader, said, calls = ToolReader(), "", []
    for i in range(0, len(text), size):
        more, found = reader.feed(text[i : i + size])
        said, calls = said + more, calls + found
        assert "<tool_call>\n{" not in said
    said += reader.finish()
    assert said.replace("\n", "") == f"a <tool b  then {broken} and <tool_call>never"
    assert [c["function"]["name"] for c in calls] == ["add", "add"]
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"a": 1, "b": "é"}] * 2
    assert len({c["id"] for c in calls}) == 2


@pytest.fixture(scope="module")
def templated():
    """A server whose chat template tells of tools."""

    def change(model, tokenizer):
        names = "{% for t in tools or [] %}{{ t.function.name[:3] }}{% endfor %}"
        tokenizer.chat_template = names + "{% for m in messages %}{{ m.content }}{% endfor %}"

    with served(change) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_reach_the_client(templated, stream):
    """The model writes a call because nothing else has the structure."""
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    regex = '<tool_call>[{]"name": "add", "arguments": [{]"a": [0-9][}][}]</tool_call>'
    body = {"model": "math", "messages": [{"role": "user", "content": "1+2?"}], "max_tokens": 100, "temperature": 0}
    body |= {"tools": [tool], "guided_regex": regex, "stream": stream}
    client, _ = templated
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if not stream:
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
    else:
        choices = [json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if "choices" in line]
        assert "".join(c["delta"].get("content") or "" for c in choices) == ""
        (call,) = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        assert call["index"] == 0
        assert choices[-1]["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["a"] in range(10)
    hidden = client.post("/v1/chat/completions", json={**body, "stream": False, "tool_choice": "none"})
    assert hidden.json()["choices"][0]["message"]["content"].startswith("<tool_call>")


ADD = {"type": "object", "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"enum": [True, None]}},
       "required": ["a", "b"], "additionalProperties": False, "$defs": {"digit": {"enum": [1, 2, 3]}}}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_call_can_be_forced(templated, seed, stream):
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in (("add", ADD), ('w "q', None))]
    asked = {"model": "math", "messages": [{"role": "user", "content": "1+2?"}], "max_tokens": 115, "tools": tools}
    asked |= {"temperature": 1.5, "seed": seed, "stream": stream, "logit_bias": {"5": -100, "4": -100}}

    def calls(**fields):
        response = templated[0].post("/v1/chat/completions", json={**asked, **fields})
        assert response.status_code == 200, response.text
        if not stream:
            (choice,) = response.json()["choices"]
            return choice["message"]["content"], choice["message"].get("tool_calls", []), choice["finish_reason"]
        said = [json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if "choices" in line]
        found = [call for c in said for call in c["delta"].get("tool_calls", ())]
        return "".join(c["delta"].get("content") or "" for c in said) or None, found, said[-1]["finish_reason"]

    for name in ("add", 'w "q'):
        content, (call,), finish = calls(tool_choice={"type": "function", "function": {"name": name}})
        assert (content, call["function"]["name"], finish) == (None, name, "tool_calls")
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["a"] in (1, 2, 3) and set(arguments) == {"a", "b"} if name == "add" else arguments == {}
    content, (call,), finish = calls(tool_choice="required", parallel_tool_calls=False)
    assert (content, finish) == (None, "tool_calls")
    content, several, finish = calls(tool_choice="required")
    assert several
    assert not (content or "").strip() or finish == "length"
    assert {c["function"]["name"] for c in several} <= {"add", 'w "q'}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, 'tool_choice: "required" needs tools'),
        ({"tool_choice": "any"}, "tool_choice: expected 'none', 'auto' or 'required' or an object, not \"any\""),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": True},
            "with the name of a tool, not",
        ),
        (
            {"tool_choice": {"type": "function", "name": "f"}, "tools": True},
            "tool_choice: expected {'type': 'function'",
        ),
        ({"tool_choice": "required", "tools": True, "guided_regex": "a"}, "tool_choice: a text that must be a call"),
        ({"tool_choice": "required", "tools": {"type": "nonsense"}}, "tool_choice: the calls cannot be used"),
        ({"tool_choice": "required", "tools": "text"}, "tool_choice: the calls cannot be used"),
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(templated, fields, words):
    pytest.importorskip("llguidance")
    if "tools" in fields:
        schema = {} if fields["tools"] is True else fields["tools"]
        fields = {**fields, "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
    body = {"model": "math", "messages": [{"role": "user", "content": "1+2?"}], **fields}
    response = templated[0].post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == "tool_choice"


# --- bytes of tokens


def byte_level():
    """A byte-level tokenizer that knows no character of more than a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def byte_fallback():
    """A tokenizer of words, with a token for each byte of what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "é"]
    ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(ids, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_make_up_the_bytes_of_the_text(make):
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer)
    text = "a b😀😃 漢 é\n ab"
    tokens = tokenizer(text)["input_ids"]
    assert b"".join(map(vocabulary.raw, tokens)).decode() == text
    names = [vocabulary.name(t) for t in tokens]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(names)
    assert "bytes:\\xf0" in names
    offsets = vocabulary.offsets(tokens, 3)
    for token, name, offset in zip(tokens, names, offsets, strict=True):
        if not name.startswith("bytes:"):
            assert text[offset - 3 :].startswith(name), (token, name)
    assert len(set(vocabulary.names(range(200)))) == 200
    assert vocabulary.raw(10_000) == b""


def test_keys_of_different_tokens_are_different():
    vocabulary = Vocabulary(byte_fallback())
    a, byte = vocabulary.tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    assert vocabulary.name(a) == vocabulary.name(byte) == "a"
    assert vocabulary.names([a, byte]) == ["a", f"token_id:{byte}"]
