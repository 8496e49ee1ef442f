"""What clients send without meaning it is accepted, and what is refused is said plainly."""

import json
import logging
import math

import pytest
import torch

from tests.helpers.serving import served, wait_until

pytest.importorskip("fastapi")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "47+38+59?"}]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}"
    "{% endfor %}{{ extra }}"
)


@pytest.fixture(scope="module")
def server():
    with served() as made:
        yield made


@pytest.fixture(scope="module")
def chatting():
    """A server whose model has a chat template."""

    def change(model, tokenizer):
        tokenizer.chat_template = TEMPLATE

    with served(change) as made:
        yield made


def body(path, **fields):
    asked = {"messages": USER} if path == CHAT else {"prompt": "47+38+59?"}
    return {"model": "math", "max_tokens": 8, "temperature": 0, **asked, **fields}


def post(server, path, **fields):
    return server[0].post(path, json=body(path, **fields))


def text_of(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def refused(server, path=TEXT, **fields):
    response = post(server, path, **fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


# --- neutral values

OF_BOTH = {
    "n": None, "stream": None, "stream_options": None, "top_p": None, "stop": None, "seed": None, "logit_bias": None,
    "frequency_penalty": None, "presence_penalty": None, "user": None, "response_format": None,
    "repetition_penalty": 1.0,
    "top_k": -1, "min_p": 0.0, "min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "length_penalty": 1.0,
    "use_beam_search": False, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "prompt_logprobs": None,
    "include_stop_str_in_output": False, "early_stopping": False, "guided_json": None, "guided_choice": None,
    "truncate_prompt_tokens": None, "metadata": None, "made_up": None,
}  # fmt: skip
OF_CHAT = {
    "tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": True,
    "logprobs": False, "top_logprobs": 0, "max_completion_tokens": None, "modalities": ["text"], "store": False,
    "reasoning_effort": None, "verbosity": None, "audio": None, "prediction": None, "web_search_options": None,
    "chat_template_kwargs": None, "add_generation_prompt": True, "continue_final_message": False,
    "service_tier": "auto",
}  # fmt: skip
OF_TEXT = {"echo": False, "suffix": "", "best_of": 1, "logprobs": None}


@pytest.mark.parametrize(("path", "own"), [(CHAT, OF_CHAT), (TEXT, OF_TEXT)])
def test_neutral_values_change_nothing(server, path, own):
    plain = text_of(post(server, path))
    assert text_of(post(server, path, **OF_BOTH, **own)) == plain
    for name, value in {**OF_BOTH, **own}.items():
        assert text_of(post(server, path, **{name: value})) == plain, name
    for name in ("echo", "logprobs", "top_logprobs", "tools", "tool_choice", "function_call", "functions", *OF_BOTH):
        if name != "made_up":
            assert text_of(post(server, path, **{name: None})) == plain, name


def test_null_is_the_default(server):
    """Also where the default is not neutral: temperature 1, and as many tokens as fit."""
    fields = {"seed": 3, "temperature": None, "max_tokens": None}
    assert text_of(post(server, TEXT, **fields)) == text_of(post(server, TEXT, seed=3, temperature=1, max_tokens=16))
    whole = post(server, CHAT, max_tokens=None, stop=None).json()
    assert whole["usage"]["completion_tokens"] > 0


# --- refusals


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (TEXT, {"temperature": "hot"}, "temperature", 'temperature: expected a number, not "hot"'),
        (TEXT, {"temperature": 3}, "temperature", "temperature: expected at most 2, not 3"),
        (TEXT, {"n": 0}, "n", "n: expected at least 1, not 0"),
        (TEXT, {"n": 1.5}, "n", "n: expected a whole number, not 1.5"),
        (TEXT, {"stream": "maybe"}, "stream", 'stream: expected true or false, not "maybe"'),
        (TEXT, {"stop": 5}, "stop", "stop: expected text or a list, not 5"),
        (TEXT, {"stop": ["a", ""]}, "stop", "stop: expected at most 16 texts of 1 to 1024 characters"),
        (TEXT, {"prompt": None}, "prompt", "prompt: this field is missing"),
        (TEXT, {"model": None}, "model", "model: this field is missing"),
        (TEXT, {"surprise": 1}, "surprise", "surprise: this field is not supported by this server; remove it"),
        (TEXT, {"suffix": "x"}, "suffix", 'suffix: "x" is not supported by this server; it takes null, "" only'),
        (TEXT, {"best_of": 4}, "best_of", "best_of: 4 is not supported; it can only be n, 1"),
        (TEXT, {"logprobs": 21}, "logprobs", "logprobs: expected at most 20, not 21"),
        (TEXT, {"logit_bias": {"5": 200}}, "logit_bias", "expected token ids with numbers from -100 to 100"),
        (TEXT, {"logit_bias": {"500": 1}}, "logit_bias", "logit_bias: token ids go from 0 to 99"),
        (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids: token ids go from 0 to 99"),
        (TEXT, {"prompt": [5, 100]}, "prompt", "prompt: token ids go from 0 to 99"),
        (CHAT, {"messages": []}, "messages", "messages: expected at least 1 entries, not []"),
        (CHAT, {"messages": ["hello"]}, "messages[0]", 'messages[0]: expected an object, not "hello"'),
        (CHAT, {"messages": [{"role": "user"}]}, "messages", "not role \"user\" and content null"),
        (CHAT, {"tools": [{"type": "web"}]}, "tools", "tools[0]: expected {'type': 'function'"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "top_logprobs: 3 needs logprobs=true"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call", 'it takes null, "none", "auto" only'),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort", 'reasoning_effort: "low" is not supported'),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format", "response_format: expected {'type': 'text'}"),
        (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize cannot be set"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_what_was_given_and_what_is_supported(server, path, fields, param, words):
    error = refused(server, path, **fields)
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "pydantic" not in error["message"]


def test_a_body_without_its_content_type_is_told_so(server):
    client = server[0]
    good = json.dumps(body(TEXT))
    for headers, words in (
        ({}, "the header Content-Type is missing: send 'Content-Type: application/json'"),
        ({"content-type": "application/x-www-form-urlencoded"}, 'is "application/x-www-form-urlencoded": send'),
    ):
        error = client.post(TEXT, content=good, headers=headers).json()["error"]
        assert words in error["message"]
        assert (error["param"], error["code"]) == (None, "content_type")
    for content, words in (
        ("{", "the body is not JSON"),
        ('{"model": "a" "b"}', "at character 14"),
        ("[]", "JSON object"),
    ):
        response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
        assert response.json()["error"]["param"] is None


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_half_a_character_is_refused(server, path):
    client = server[0]
    asked = {"prompt": "a\ud800"} if path == TEXT else {"messages": [{"role": "user", "content": "a\ud800"}]}
    sent = json.dumps({"model": "math", "max_tokens": 1, **asked})
    response = client.post(path, content=sent, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "character 1 is '\\ud800', half of a pair" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        *({"top_k": 10**30}, {"top_k": 2**63}, {"temperature": 5e-324}, {"temperature": 1e-300}, {"top_p": 1e-300}),
        *({"seed": 10**300}, {"seed": -1}, {"min_tokens": 10**30}, {"min_p": 1e-320}, {"repetition_penalty": 1e-320}),
        *({"logit_bias": {str(10**30): 1}}, {"stop_token_ids": [10**30]}, {"top_p": 1e-300, "top_k": 10**30}),
    ],
)
def test_extreme_numbers_end_nothing(server, fields):
    response = post(server, TEXT, **{"temperature": 1, **fields})
    assert response.status_code in (200, 400), response.text
    assert post(server, TEXT).status_code == 200


@pytest.mark.parametrize("fields", [{"prompt": "1+" * 80}, {"max_tokens": 500}, {"prompt": "1" * 100_000}])
def test_what_is_too_long_is_refused_in_the_words_that_clients_look_for(server, fields):
    error = refused(server, **fields)
    assert "maximum context length" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_a_path_that_is_not_there_is_named(server):
    for method, path, status in (("POST", "/v1/embeddings", 404), ("GET", "/tokenize", 405)):
        response = server[0].request(method, path, json={"model": "math", "input": "hi"})
        error = response.json()["error"]
        assert response.status_code == status
        assert f"{method} {path}: " in error["message"]
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_refusals_are_counted(server):
    client = server[0]

    def count(status):
        lines = client.get("/metrics").text.splitlines()
        name = f't2_requests_total{{expert="none",status="{status}"}} '
        return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0)

    before = {status: count(status) for status in (400, 404, 403)}
    refused(server, n=0)
    refused(server, prompt=[1000])
    client.post(TEXT, content=b"{", headers={"content-type": "application/json"})
    post(server, TEXT, model="nobody")
    client.get("/v1/nothing")
    client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert {status: count(status) - n for status, n in before.items()} == {400: 3, 404: 2, 403: 1}


# --- chats


def test_messages_of_tools_and_variables_of_the_template_reach_the_template(chatting):
    client, service = chatting

    def tokens(**fields):
        response = client.post(CHAT, json={**body(CHAT), "max_tokens": 1, **fields})
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    def size(text):
        return len(service.tokenizer(text, add_special_tokens=False)["input_ids"])

    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "12"}'}}]
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "3"}]
    tool = {"type": "function", "function": {"name": "plus", "parameters": {"type": "object"}}}
    assert tokens() == size("47+38+59?")
    assert tokens(messages=history) == size("47+38+59?123")
    assert tokens(tools=[tool]) == size("plus47+38+59?")
    assert tokens(tools=[tool], tool_choice="none") == size("47+38+59?")
    assert tokens(chat_template_kwargs={"extra": "++"}) == size("47+38+59?++")
    broken = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}]
    assert "messages[0].tool_calls" in refused(chatting, CHAT, messages=broken)["message"]


def test_the_system_message_of_an_experts_training_is_used(chatting, monkeypatch):
    client, service = chatting
    monkeypatch.setitem(service.experts.current["math"].manifest, "prompt", {"chat": True, "system": "12+"})

    def tokens(**fields):
        response = client.post(CHAT, json={**body(CHAT), "max_tokens": 1, **fields})
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    more = len(service.tokenizer("12+", add_special_tokens=False)["input_ids"])
    assert tokens() == tokens(model="base") + more == tokens(model="code") + more
    own = [{"role": "system", "content": "1"}, *USER]
    assert tokens(messages=own) == tokens(messages=own, model="base")


def test_tools_without_a_template_are_refused(server):
    tool = {"type": "function", "function": {"name": "plus"}}
    assert "with tools" in refused(server, CHAT, tools=[tool])["message"]


# --- tokens


def test_tokens_and_text_of_a_prompt(server, chatting):
    client, service = server
    found = client.post("/tokenize", json={"model": "math", "prompt": "47+38", "return_token_strs": True}).json()
    wanted = service.tokenizer("47+38")["input_ids"]
    assert found == {
        "count": len(wanted),
        "max_model_len": service.context,
        "tokens": wanted,
        "token_strs": service.tokenizer.convert_ids_to_tokens(wanted),
    }
    bare = client.post("/tokenize", json={"prompt": "47+38", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": "47+38"}
    chat = chatting[0].post("/tokenize", json={"messages": USER}).json()["tokens"]
    assert chat == chatting[1].tokenizer(USER[0]["content"], add_special_tokens=False)["input_ids"]
    assert client.get("/version").json()["version"]
    for path, wrong in (
        ("/tokenize", {"model": "math"}),
        ("/tokenize", {"prompt": "1" * 1_000_000}),
        ("/detokenize", {"tokens": [100]}),
    ):
        response = client.post(path, json=wrong)
        assert response.status_code == 400
        assert response.json()["error"]["message"]


# --- echo and log-probabilities


def scored(service, prompt, expert):
    """log p of each token of a prompt after the first, by one plain forward, and the likeliest token there."""
    ids = torch.tensor([service.tokenizer(prompt)["input_ids"]])
    key = service.experts.current[expert].key if expert in service.experts.current else None
    with torch.no_grad(), service.engine.paused():
        logits = service.model(ids, expert_ids=service.model.t2_bank.ids([key])).logits[0]
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist(), log_p[:-1].argmax(-1).tolist()


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_echo_scores_the_prompt(server, limit):
    service = server[1]
    prompts = ["47+38+59?", "rsx(gcaf)?", "1+2?", "12+30+4?"]
    for expert in ("math", "code", "tiny"):
        answer = post(server, TEXT, model=expert, prompt=prompts, echo=True, logprobs=1, max_tokens=limit).json()
        plain = post(server, TEXT, model=expert, prompt=prompts, max_tokens=max(1, limit)).json()
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        for prompt, choice, other in zip(prompts, answer["choices"], plain["choices"], strict=True):
            own, best = scored(service, prompt, expert)
            found = choice["logprobs"]
            size = len(own) + 1
            assert choice["text"] == prompt + (other["text"] if limit else "")
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            assert found["token_logprobs"][1:size] == pytest.approx(own, abs=1e-4)
            assert [next(iter(top)) for top in found["top_logprobs"][1:size]] == [
                service.vocabulary.name(token) for token in best
            ]
            lengths = {len(found[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
            assert len(lengths) == 1
            # The last token is there even if it ends the text: lm-eval cuts off the one that it asked for.
            assert lengths.pop() - size <= limit
            if limit < 2:
                assert len(found["tokens"]) == size + limit
            assert found["token_logprobs"][size:] == pytest.approx(found["token_logprobs"][size:])


def test_echo_in_a_stream_and_with_token_ids(server):
    client, service = server
    ids = service.tokenizer("47+38+59?", add_special_tokens=False)["input_ids"]
    whole = post(server, TEXT, prompt=ids, echo=True, logprobs=2).json()["choices"][0]
    fields = body(TEXT, prompt=ids, echo=True, logprobs=2, stream=True)
    with client.stream("POST", TEXT, json=fields) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert whole["text"].startswith("47+38+59?")
    assert [t for part in parts for t in part["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]
    assert [o for part in parts for o in part["logprobs"]["text_offset"]] == whole["logprobs"]["text_offset"]


def test_prompts_are_read_in_pieces_and_together(server, monkeypatch):
    from t2kernels.serve.engine import scoring

    prompts = ["47+38+59?" * n for n in (1, 5, 3, 2, 7)]
    whole = post(server, TEXT, prompt=prompts, echo=True, logprobs=1, max_tokens=0).json()
    reads, real = [], scoring.forward

    def counted(model, ids, *args, **kwargs):
        reads.append(tuple(ids.shape))
        return real(model, ids, *args, **kwargs)

    monkeypatch.setattr(scoring, "forward", counted)
    monkeypatch.setattr(scoring, "PIECE", 40)
    pieces = post(server, TEXT, prompt=prompts, echo=True, logprobs=1, max_tokens=0).json()
    assert any(b > 1 for b, _ in reads), "several prompts in one forward"
    assert [s for b, s in reads if b == 1].count(40) >= 1, "a long prompt in several pieces"
    for a, b in zip(whole["choices"], pieces["choices"], strict=True):
        assert a["logprobs"]["token_logprobs"][1:] == pytest.approx(b["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_a_prompt_whose_numbers_are_not_finite_fails_alone(tmp_path):
    with served(experts=tmp_path) as (client, service):
        bank = service.model.t2_bank
        huge = bank.expert({n: torch.full((k,), 1e25) for n, k in bank.matrices.items()})
        sent = huge.save(tmp_path / "file").read_bytes()
        (tmp_path / "file.safetensors").unlink(missing_ok=True)
        assert client.post("/v1/experts?name=huge", content=sent).status_code == 201
        fields = {"echo": True, "logprobs": 1, "max_tokens": 0}
        bad = client.post(TEXT, json=body(TEXT, model="huge", **fields))
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "not_finite")
        good = client.post(TEXT, json=body(TEXT, **fields)).json()["choices"][0]["logprobs"]["token_logprobs"]
        assert all(math.isfinite(value) for value in good[1:])
        assert bank.rows_in_use == 0


# --- the access log


def access_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "t2kernels.serve.http.access"]


def test_one_line_a_request_with_its_id(server, caplog):
    client = server[0]
    with caplog.at_level(logging.INFO, "t2kernels.serve"):
        answer = client.post(TEXT, json=body(TEXT), headers={"x-request-id": "mine-17"})
        assert answer.headers["x-request-id"] == "mine-17"
        made = client.post(TEXT, json=body(TEXT, n=0), headers={"x-request-id": "two words\x7f"}).headers[
            "x-request-id"
        ]
        assert made.startswith("req-")
        client.get("/health")
        client.get("/v1/x%0Ainjected")
        wait_until(lambda: len(access_lines(caplog)) >= 3, "the requests are logged")  # after their answers
    lines = access_lines(caplog)
    assert len(lines) == 3, "none for /health"
    used = answer.json()["usage"]
    assert lines[0].startswith("mine-17 127.0.0.1:")
    assert f" POST {TEXT} 200 model=math expert=math-" in lines[0]
    assert f"prompt_tokens={used['prompt_tokens']} completion_tokens={used['completion_tokens']} queue=" in lines[0]
    assert all(word in lines[0] for word in (" first=", " total="))
    assert lines[1].startswith(f"{made} ")
    assert " 400 " in lines[1]
    assert "error='n: expected at least 1, not 0'" in lines[1]
    assert "'/v1/x\\ninjected' 404" in lines[2]
    assert not any("\n" in line for line in lines)


def test_a_stream_is_logged_at_its_end(server, caplog):
    client = server[0]
    with (
        caplog.at_level(logging.INFO, "t2kernels.serve"),
        client.stream("POST", TEXT, json=body(TEXT, stream=True, n=2, seed=1, temperature=1)) as response,
    ):
        assert "x-request-id" in response.headers
        assert not access_lines(caplog)
        assert list(response.iter_lines())
        wait_until(lambda: access_lines(caplog), "the request is logged")
    lines = access_lines(caplog)
    assert len(lines) == 1
    assert " 200 model=math expert=math-" in lines[0]
    assert " completions=2 " in lines[0]
