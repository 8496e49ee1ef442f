"""One bad expert or request harms nobody else."""

import contextlib
import importlib
import json
import random
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import t2kernels as t2
from t2kernels.experts.expert import ExpertError
from tests.helpers.families import build
from tests.helpers.serving import httpx, served, wait_until

pytest.importorskip("fastapi")
process = pytest.importorskip("t2kernels.serve.server")
steps = pytest.importorskip("t2kernels.serve.engine.steps")
limits = pytest.importorskip("t2kernels.serve.http.limits")
Decoder = pytest.importorskip("t2kernels.serve.http.text").Decoder

PROMPTS = ["47+38+59?", "1+2+3?", "9+9+9?"]


@pytest.fixture(scope="module")
def client():
    with served() as (made, _):
        yield made


def ask(client, model, prompt, **fields):
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


@pytest.mark.parametrize("size", [1e19, 1e30, -1e25])
def test_an_expert_that_overflows_fails_its_own_requests_only(tmp_path, size):
    folder = tmp_path / "experts"
    folder.mkdir()
    with served(experts=folder) as (client, service):
        names = [n for n in service.experts.current if n != "classify"]
        jobs = [(name, prompt) for name in (service.settings.name, *names) for prompt in PROMPTS]
        wanted = {job: ask(client, *job).json()["choices"][0]["text"] for job in jobs}
        bank = service.model.t2_bank
        huge = bank.expert({n: torch.full((k,), size) for n, k in bank.matrices.items()})
        body = huge.save(tmp_path / "huge").read_bytes()
        answer = client.post(
            "/v1/experts?name=huge", content=body, headers={"Content-Type": "application/octet-stream"}
        )
        assert answer.status_code == 201, answer.text
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                bad = [pool.submit(ask, client, "huge", p, max_tokens=40) for p in PROMPTS]
                good = {job: pool.submit(ask, client, *job) for job in jobs}
                for job, found in good.items():
                    assert found.result().status_code == 200
                    assert found.result().json()["choices"][0]["text"] == wanted[job], job
                for found in bad:
                    assert found.result().status_code == 500
                    assert "not finite" in found.result().json()["error"]["message"]
        streamed = ask(client, "huge", PROMPTS[0], stream=True, logprobs=2).text
        assert "not finite" in streamed
        assert "NaN" not in streamed


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_an_expert_whose_keys_alone_overflow_gets_no_wrong_answer(tmp_path, part):
    """They are kept out of the cache, so the outputs are finite, and wrong."""
    (tmp_path / "experts").mkdir()
    with served(experts=tmp_path / "experts") as (client, service):
        wanted = [ask(client, "math", p).json()["choices"][0]["text"] for p in PROMPTS]
        bank = service.model.t2_bank
        z = {n: torch.full((k,), 1e30 if part in n else 1.0) for n, k in bank.matrices.items()}
        body = bank.expert(z).save(tmp_path / "huge").read_bytes()
        kind = {"Content-Type": "application/octet-stream"}
        assert client.post("/v1/experts?name=huge", content=body, headers=kind).status_code == 201
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                bad = [pool.submit(ask, client, "huge", p * 4, max_tokens=40) for p in PROMPTS]
                good = [pool.submit(ask, client, "math", p) for p in PROMPTS]
                assert [f.result().json()["choices"][0]["text"] for f in good] == wanted
                assert {f.result().status_code for f in bad} == {500}
        assert service.model.t2_bank.rows_in_use == 0


def test_a_request_whose_outputs_are_not_finite_is_told_once(caplog):
    failed, generations = [], [steps.Generation(str(i), [1], "e", 4, steps.GREEDY, *3 * [None], False) for i in (0, 1)]
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    for _ in range(3):
        assert steps.choose(logits, generations, lambda *a: failed.append(a)).tolist()[0] == 1
    assert [(g.id, e.code) for g, e in failed] == [("1", "not_finite")]
    assert len([r for r in caplog.records if "not finite" in r.getMessage()]) == 1


def test_what_cannot_be_finite_is_refused_when_it_is_added():
    bank = t2.patch_model(build("llama").half())
    z = {n: torch.ones(k) for n, k in bank.matrices.items()}
    first = next(iter(z))
    bank.add("fine", bank.expert({**z, first: 100 * z[first]}))
    with pytest.raises(ExpertError, match=rf"sigma z of {first} reaches .* float16 ends at 6.55e\+04"):
        bank.add("large", bank.expert({**z, first: 1e9 * z[first]}))
    assert "large" not in bank


# --- stop texts


class Letters:
    def decode(self, ids, **kwargs):
        return "".join(chr(97 + i) for i in ids)


def test_stop_texts_are_found_and_nothing_that_may_begin_one_is_emitted():
    r = random.Random(5)
    for _ in range(300):
        stops = ["".join(r.choice("ab") for _ in range(r.randrange(1, 9))) for _ in range(r.randrange(1, 4))]
        tokens = [r.randrange(2) for _ in range(r.randrange(40))]
        decoder, text = Decoder(Letters(), stops), Letters().decode(tokens)
        wanted = text
        for n in range(len(text) + 1):  # the stop text that is complete first ends the text
            ends = [i for i in (text[:n].find(s) for s in stops) if i >= 0]
            if ends:
                wanted = text[: min(ends)]
                break
        out = ""
        for token in tokens:
            out += decoder.feed([token])
            assert wanted.startswith(out)
        assert out + decoder.finish() == wanted


def test_a_stop_text_costs_no_more_than_its_length():
    class Counted(str):
        looked = 0

        def startswith(self, part, *args):
            Counted.looked += len(part)
            return super().startswith(part, *args)

    stop = Counted("ab" * 400 + "c")
    decoder = Decoder(Letters(), [stop])
    decoder.stops = [stop]
    n = 300
    for i in range(n):
        decoder.feed([i % 2])
    assert Counted.looked <= n * len(stop)


def test_requests_that_are_too_large_are_refused_before_any_work():
    with served() as (client, service):
        before = service.tokenizer

        class Never:
            def __getattr__(self, name):
                return getattr(before, name)

            def __call__(self, *args, **kwargs):
                raise AssertionError("a prompt that cannot fit was tokenised")

        service.tokenizer = Never()
        long = "1+" * 500_000
        for prompt in (long, ["1+1?", long]):
            answer = ask(client, "math", prompt)
            assert answer.status_code == 400
            assert "maximum context length" in answer.json()["error"]["message"]
        service.tokenizer = before
        assert ask(client, "math", "1+1?", stop="x" * 1025).status_code == 400
        assert ask(client, "math", "1+1?", stop="x" * 1024).status_code == 200
        assert ask(client, "math", "1+" * 80).json()["error"]["code"] == "context_length_exceeded"


def test_parts_of_a_body_are_counted_outside_of_its_texts_only():
    inside = b'{"prompt": "' + b'[\\"{:,' * 200_000 + b'\\\\"}'
    limits.check_parts(inside)
    limits.check_parts(b"[" + b"1," * 400_000 + b"1]")
    for lists in (
        b"[" + b"[]," * 100_001 + b"1]",
        b"{" + b'"k":1,' * 100_001 + b'"k":1}',
        inside[:-1] + b"[" * 100_001,
    ):
        with pytest.raises(steps.APIError, match="more than 100000 lists, objects and fields"):
            limits.check_parts(lists)
    with pytest.raises(steps.APIError, match="more than 500000 values"):
        limits.check_parts(b"[" + b"1," * 500_001 + b"1]")


def test_a_body_with_too_many_parts_is_never_parsed(monkeypatch):
    with served() as (client, _):
        lists = "[" + "[]," * 100_001 + "1]"
        monkeypatch.setattr("json.loads", None)
        kind = {"Content-Type": "application/json"}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/experts", "/v1/experts/x/few-shot"):
            answer = client.post(path, content=f'{{"model": "base", "prompt": {lists}}}', headers=kind)
            assert answer.status_code == 400
            assert '"code":"body_too_large"' in answer.text
        monkeypatch.undo()
        error = ask(client, "math", "[" * 200_000).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert ask(client, "math", PROMPTS[0], metadata={"a": [[]] * 1000}).status_code == 200
        deep = client.post("/v1/completions", content="[" * 90_000, headers=kind)
        assert deep.status_code == 400
        assert "too deep" in deep.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ["a", [1]]}, 'prompt: expected text, texts, token ids, or lists of token ids, not ["a", [1]]'),
        ({"prompt": [True]}, "prompt: expected text, texts"),
        ({"prompt": [[1], ["a"]]}, "prompt: expected token ids, not"),
        ({"prompt": [[1]] * 129}, "prompt: 129 prompts; expected 1 to 128"),
        ({"prompt": [1] * 5000}, "maximum context length"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: expected at most 1024 entries"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids: expected at most 128 entries"),
        ({"model": "x" * 2049}, "model: expected at most 2048 characters"),
        ({f"k{i}": 1 for i in range(50_000)}, "k0: this field is not supported"),
        ({"\ud800": 1}, '"\\ud800": this field is not supported'),
    ],
)
def test_large_fields_are_refused_in_a_sentence(client, fields, words):
    body = json.dumps({"model": "base", "prompt": "1", **fields})
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert len(message) < 300


def test_others_are_answered_while_a_prompt_is_tokenised():
    with served() as (client, service):
        real, begun, answered = service.tokenizer, threading.Event(), threading.Event()

        class Slow:
            def __getattr__(self, name):
                return getattr(real, name)

            def __call__(self, *args, **kwargs):
                begun.set()
                assert answered.wait(60)
                return real(*args, **kwargs)

        service.tokenizer = Slow()
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(ask, client, "math", "1+1?")
            assert begun.wait(60)
            assert client.get("/health").status_code == client.head("/health").status_code == 200
            answered.set()
            assert slow.result().status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "slow"),
    [
        ("/tokenize", {"prompt": "1+1?" * 8, "return_token_strs": True}, "large_answers.encode"),
        ("/v1/completions", {"prompt": "1+" * 50, "echo": True, "logprobs": 20, "max_tokens": 0}, "answer.logprobs_of"),
        ("/v1/completions", {"prompt": "1+" * 50, "echo": True, "logprobs": 20, "stream": True}, "answer._large_event"),
        ("/v1/completions", {"prompt": "1+" * 9, "logprobs": 20, "n": 20}, "large_answers.encode"),
    ],
)
def test_others_are_answered_while_a_large_answer_is_made(monkeypatch, path, fields, slow):
    begun, answered = threading.Event(), threading.Event()
    for module in ("large_answers", "answer"):
        monkeypatch.setattr(f"t2kernels.serve.{module}.MANY", 20)
    with served() as (client, _):
        body = {"model": "base", **({} if path == "/tokenize" else {"max_tokens": 8, "temperature": 0}), **fields}
        wanted = client.post(path, json=body)
        place = f"t2kernels.serve.{slow}"
        module, _, name = place.rpartition(".")
        real = getattr(importlib.import_module(module), name)

        def blocked(*given):
            begun.set()
            assert answered.wait(60)
            return real(*given)

        monkeypatch.setattr(place, blocked)
        with ThreadPoolExecutor(1) as pool:
            large = pool.submit(client.post, path, json=body)
            assert begun.wait(60)
            assert client.get("/health").status_code == 200
            answered.set()
            got = large.result()
        assert got.status_code == wanted.status_code == 200
        if not fields.get("stream"):
            unlike = {"id": None, "created": None}
            assert {**got.json(), **unlike} == {**wanted.json(), **unlike}


def test_a_large_answer_is_the_same_json_as_a_small_one():
    encoding = importlib.import_module("t2kernels.serve.large_answers")
    body = {"a": [1, -2.5, None, True], "é\n": {"x": [{"token": '"', "logprob": -0.25}] * 50}, "empty": [[], {}]}
    assert encoding.encode(body) == encoding.JSONResponse(body).body
    with pytest.raises(ValueError, match="JSON compliant"):
        encoding.encode({"a": float("nan")})


# --- web pages


def test_a_web_page_of_another_site_cannot_use_the_server():
    page = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    with served() as (client, _):
        for path in ("/v1/experts?name=math&replace=true", "/v1/completions"):
            answer = client.post(path, content=b"x", headers=page)
            assert answer.status_code == 403
            assert "--allow-origin http://evil.example" in answer.json()["error"]["message"]
        assert client.delete("/v1/experts/math", headers=page).status_code == 403
        own = {"Origin": str(client.base_url).rstrip("/")}
        body = {"model": "math", "prompt": "1+1?", "max_tokens": 2}
        assert client.post("/v1/completions", json=body, headers=own).status_code == 200
    with served(origins=("http://evil.example",)) as (client, _):
        assert client.post("/v1/completions", json=body, headers={"Origin": "http://evil.example"}).status_code == 200


def test_a_name_that_resolves_to_this_machine_is_not_enough():
    with served(hosts=("localhost", "127.0.0.1", "[::1]")) as (client, _):
        evil = {"Host": "evil.example", "Origin": "http://evil.example"}
        assert client.get("/v1/models", headers=evil).status_code == 403
        assert client.get("/v1/models", headers={"Host": "evil.example:80"}).status_code == 403
        for host in ("localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_an_error_while_drawing_fails_its_own_request_only(monkeypatch, caplog):
    real = steps.draw

    def broken(logits, samplings):
        if any(s.temperature == 0.625 for s in samplings):
            raise RuntimeError("this one")
        return real(logits, samplings)

    monkeypatch.setattr(steps, "draw", broken)
    with served() as (client, service):
        wanted = [ask(client, "math", p).json()["choices"][0]["text"] for p in PROMPTS]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                bad = [pool.submit(ask, client, "math", p, temperature=0.625) for p in PROMPTS]
                good = [pool.submit(ask, client, "math", p) for p in PROMPTS]
                assert [f.result().json()["choices"][0]["text"] for f in good] == wanted
                assert {f.result().status_code for f in bad} == {500}
                assert all("this one" in f.result().json()["error"]["message"] for f in bad)
        assert service.model.t2_bank.rows_in_use == 0
    assert "no token could be drawn" in caplog.text


# --- connections


def test_what_is_half_sent_is_closed_and_others_are_answered(monkeypatch, tmp_path):
    """Half a head, half a second head on one connection, and half a body. The limits are short here."""
    monkeypatch.setattr(process, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    with served(process=True) as (client, _):
        place = (client.base_url.host, client.base_url.port)

        def send(text):
            made = socket.create_connection(place, timeout=60)
            made.sendall(text.encode())
            return made

        def until_closed(made):
            got = b""
            while piece := made.recv(4096):
                got += piece
            return got

        half = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        silent = [send(""), send(half)]
        slow = send(f"{half}Content-Length: 100\r\n\r\n" + '{"model"')
        second = send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while b"}" not in got:
            got += second.recv(4096)
        assert got.startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /health HTTP/1.1\r\nHost")
        assert ask(client, "math", "1+2+3?").status_code == 200
        for made in (*silent, second):
            with contextlib.suppress(ConnectionResetError):
                assert until_closed(made) == b""
        answer = until_closed(slow)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_too_slow" in answer
        assert ask(client, "math", "1+2+3?").status_code == 200


def test_a_connection_too_many_is_refused_and_the_others_go_on():
    with served(process=True, connections=3) as (client, _):
        place = (client.base_url.host, client.base_url.port)
        held = [socket.create_connection(place, timeout=60) for _ in range(2)]
        assert client.get("/health").status_code in (200, 503)
        more = socket.create_connection(place, timeout=60)
        more.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert more.recv(4096).startswith(b"HTTP/1.1 503")
        for made in (*held, more):
            made.close()
        wait_until(lambda: client.get("/health").status_code == 200, "the others are answered again")


def test_who_reads_nothing_of_the_answers_is_cut_off_and_others_are_answered(monkeypatch):
    monkeypatch.setattr(process, "WRITE_SECONDS", 0.3)
    with served(process=True) as (client, _):
        made = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
        many = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000  # answers of 100 MB
        with contextlib.suppress(OSError):
            made.sendall(many)
        gone = select.poll()
        gone.register(made, select.POLLERR)
        assert ask(client, "math", "1+2+3?").status_code == 200
        assert gone.poll(60_000), "the connection is still open"
        assert ask(client, "math", "1+2+3?").status_code == 200


def test_a_body_in_pieces_of_one_byte_is_read_a_little_at_a_time(monkeypatch):
    """h11 takes a time for each piece, and the event loop answers nobody else meanwhile."""
    sizes, real = [], process.Connection.data_received

    def received(self, data):
        sizes.append(len(data))
        real(self, data)

    monkeypatch.setattr(process.Connection, "data_received", received)
    with served(process=True) as (client, _):
        body = json.dumps({"model": "math", "prompt": "1+2+3?", "max_tokens": 2}) + " " * 50_000
        answer = client.post(
            "/v1/completions",
            content=(body[i : i + 1].encode() for i in range(len(body))),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 200
        with contextlib.suppress(httpx.TransportError):  # it may be cut off before it has sent all
            head = client.get("/health", headers={"X-Long": "a" * 200_000})
            assert head.status_code == 400
        assert client.get("/health").status_code == 200
    assert max(sizes) <= process.READ_BYTES
    assert sum(sizes) > 300_000


@pytest.mark.parametrize("body", [b'{"model": "base", "prompt": "\xff"}', b"\x1f\x8b\x08\x00"])
def test_a_body_that_is_no_text_is_told_so(client, body):
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body cannot be read as JSON: it is not text in UTF-8"


def test_metrics_survive_the_end_of_the_engine():
    with served() as (client, service):
        assert ask(client, "math", "1+2+3?").status_code == 200
        service.engine._manager.batch_processor, kept = None, service.engine._manager.batch_processor
        try:
            assert service.engine.failure is None
            assert "t2_kv_free 1.0" in client.get("/metrics").text
        finally:
            service.engine._manager.batch_processor = kept
