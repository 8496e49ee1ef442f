"""The API of responses says what a chat says, and several requests use one connection."""

import http.client
import json

import pytest
import torch

from tests.helpers.serving import served

pytest.importorskip("fastapi")

steps = pytest.importorskip("t2kernels.serve.engine.steps")

PATH = "/v1/responses"
PROMPT = "47+38+59?"


@pytest.fixture(scope="module")
def server():
    def change(model, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    with served(change) as made:
        yield made


def respond(server, **fields):
    body = {"model": "math", "input": PROMPT, "temperature": 0, "max_output_tokens": 60, **fields}
    return server[0].post(PATH, json=body)


def chat(server, messages, **fields):
    body = {"model": "math", "messages": messages, "temperature": 0, "max_tokens": 60, **fields}
    return server[0].post("/v1/chat/completions", json=body).json()


def text_of(response):
    (item,) = response["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    assert item["status"] == response["status"]
    return part["text"]


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        (PROMPT, [{"role": "user", "content": PROMPT}]),
        ([{"role": "user", "content": PROMPT}], [{"role": "user", "content": PROMPT}]),
        (
            [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "2+", "annotations": []}]},
                {"role": "user", "content": "3?"},
            ],
            [{"role": "user", "content": "1+2+3?"}],
        ),
    ],
)
@pytest.mark.parametrize("instructions", [None, "9+"])
def test_a_response_is_what_the_chat_says(server, asked, messages, instructions):
    said = [{"role": "system", "content": instructions}, *messages] if instructions else messages
    wanted = chat(server, said)
    response = respond(server, input=asked, instructions=instructions).json()
    assert text_of(response) == wanted["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == wanted["usage"]["prompt_tokens"]
    assert response["usage"]["output_tokens"] == wanted["usage"]["completion_tokens"]
    assert (response["object"], response["model"], response["status"]) == ("response", "math", "completed")


@pytest.mark.parametrize(("limit", "state"), [(60, "completed"), (2, "incomplete")])
def test_events_tell_of_the_same_response(server, limit, state):
    whole = respond(server, max_output_tokens=limit).json()
    assert whole["status"] == state
    assert whole["incomplete_details"] == (None if state == "completed" else {"reason": "max_output_tokens"})
    with server[0].stream("POST", PATH, json={"model": "math", "input": PROMPT, "temperature": 0, "stream": True,
                                              "max_output_tokens": limit}) as answer:  # fmt: skip
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.read().decode().strip().split("\n\n")
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert events[-1]["type"] == name.removeprefix("event: ")
        assert events[-1]["sequence_number"] == number
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", state]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(e["delta"] for e in events[4:-4]) == text_of(whole) == text_of(events[-1]["response"])
    assert {e["item_id"] for e in events[3:-2]} == {events[-1]["response"]["output"][0]["id"]}
    assert events[-1]["response"]["usage"] == whole["usage"]
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]


def test_a_response_may_have_a_structure(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    shape = {"format": {"type": "json_schema", "name": "s", "schema": schema}}
    found = respond(server, text=shape, max_output_tokens=90).json()
    if found["status"] == "completed":
        assert json.loads(text_of(found))["a"] in (1, 2)
    else:
        assert text_of(found).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "input: expected text or at least one message"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input[0]: expected a message of text"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "expected parts of text, not"),
        ({"input": [{"content": "x"}]}, "messages", "messages[0]: expected a role and a content"),
        ({"input": None}, "input", "input: this field is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools", "is not supported by this server; it takes null, [] only"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "it takes null only"),
        ({"store": True}, "store", "it takes null, false only"),
        ({"text": {"format": {"type": "xml"}}}, "response_format", "response_format: expected"),
        ({"text": {"verbosity": "low"}}, "text", 'text: verbosity "low" is not supported'),
        ({"max_output_tokens": 0}, "max_output_tokens", "expected at least 1, not 0"),
        ({"max_output_tokens": 5000}, None, "maximum context length"),
        ({"surprise": 1}, "surprise", "this field is not supported"),
        ({"model": "nobody"}, "model", "does not exist"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused_by_name(server, fields, param, words, stream):
    response = respond(server, stream=stream, **fields)
    assert response.status_code == (404 if "model" in fields else 400), response.text
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


def test_an_error_within_a_stream_is_the_last_event(server, monkeypatch):
    real, left = steps.draw, [3]

    def broken(logits, samplings):
        if any(s.temperature == 0.625 for s in samplings):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("this one")
        return real(logits, samplings)

    monkeypatch.setattr(steps, "draw", broken)
    said = respond(server, stream=True, temperature=0.625, max_output_tokens=30).text
    events = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "internal_error", "message": "RuntimeError: this one"}


def test_an_error_before_the_first_token_has_its_status(server):
    _, service = server
    bank = service.model.t2_bank
    expert = bank.expert({n: torch.full((k,), 1e19) for n, k in bank.matrices.items()})
    service.experts.publish(service.experts.admit("huge", expert))
    response = respond(server, model="huge")
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    service.experts.remove("huge")


def test_messages_that_are_none_are_refused_where_tokens_are_counted(server):
    for messages in ([], ["hello"]):
        response = server[0].post("/tokenize", json={"messages": messages})
        assert response.status_code == 400, response.text
        assert "messages" in response.json()["error"]["message"]


def test_one_connection_takes_many_requests_also_after_a_refusal(server):
    client, _ = server
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)
    connection.connect()
    used = connection.sock

    def send(path, body):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    good = json.dumps({"model": "math", "prompt": PROMPT, "max_tokens": 4, "temperature": 0})
    streamed = json.dumps({**json.loads(good), "stream": True})
    texts = []
    for refused, status in (
        ("{", 400),
        (json.dumps({"model": "math", "prompt": PROMPT, "n": 0}), 400),
        (json.dumps({"model": "nobody", "prompt": PROMPT}), 404),
        ('{"model": "math", "prompt": [' + "[]," * 100_001 + "[]]}", 400),
        (streamed, 200),
    ):
        assert send("/v1/completions", refused)[0] == status
        assert connection.sock is used, "the server has closed the connection"
        found, body = send("/v1/completions", good)
        assert found == 200
        texts.append(json.loads(body)["choices"][0]["text"])
    assert len(set(texts)) == 1
    assert connection.sock is used
    connection.close()
