"""The application in this process, where its parts can be broken."""

import asyncio
import json
import logging

import pytest

from tests.helpers.serving import httpx, served, wait_until

pytest.importorskip("fastapi")

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def logged(caplog, module, text):
    """The exception of the one record of a module that has a text."""
    found = [r for r in caplog.records if r.name == f"t2kernels.serve.{module}" and text in r.getMessage()]
    assert len(found) == 1, caplog.text
    assert found[0].levelname == "ERROR"
    return found[0].exc_info[1]


def ask(client, **fields):
    return client.post(
        "/v1/completions", json={"model": "math", "prompt": "47+38+59?", "max_tokens": 8, "temperature": 0, **fields}
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("no more memory"), SystemExit("killed")])
def test_a_dead_engine_fails_what_runs_and_says_so(error):
    with served() as (client, service):
        assert ask(client).status_code == 200
        calls, real = 0, service.model.forward

        def forward(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > 4:
                raise error
            return real(*args, **kwargs)

        service.model.forward = forward
        with client.stream(
            "POST",
            "/v1/completions",
            json={
                "model": "math",
                "prompt": "1+2+3?",
                "max_tokens": 90,
                "stream": True,
                "n": 8,
                "temperature": 1.9,
                "seed": 1,
            },
        ) as response:
            assert response.status_code == 200
            events = [line for line in response.iter_lines() if line]
        assert json.loads(events[-2][6:])["error"]["type"] == "server_error"
        wait_until(
            lambda: client.get("/health").json()["status"] != "ready", "the server knows that its engine is dead"
        )
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        for fields in ({}, {"stream": True}, {"model": "tiny"}):
            response = ask(client, **fields)
            assert response.status_code == 503
            assert "must be restarted" in response.json()["error"]["message"]
        assert client.post("/v1/experts", params={"name": "x"}, content=b"x").status_code == 503
        assert b"t2_ready 0.0" in client.get("/metrics").content
        assert calls == 5  # nothing ran after the step that failed
        assert service.model.t2_bank.rows_in_use == 0


def test_a_name_that_goes_while_it_answers_leaves_no_series():
    body = {
        "model": "math",
        "prompt": "1+2+3?",
        "max_tokens": 40,
        "temperature": 1.9,
        "seed": 1,
        "stream": True,
        "n": 4,
    }
    with served() as (client, _):
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.delete("/v1/experts/math").status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
        series = client.get("/metrics").text
        assert 't2_requests_total{expert="removed",status="200"} 1.0' in series
        assert 't2_expert_loads_total{expert="removed"} 1.0' in series
        assert 't2_expert_loads_total{expert="code"} 1.0' in series
        assert '"math"' not in series


def test_a_fault_in_one_answer_is_that_ones_alone(monkeypatch, caplog):
    with served() as (client, service):
        good = ask(client).json()["choices"][0]["text"]
        with monkeypatch.context() as m:
            m.setattr(service.tokenizer, "decode", lambda *a, **k: 1 / 0)
            response = ask(client)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
            assert "ZeroDivisionError" in response.json()["error"]["message"]
        assert isinstance(logged(caplog, "answer", "completion 0 failed"), ZeroDivisionError)
        assert service.model.t2_bank.rows_in_use == 0
        assert ask(client).json()["choices"][0]["text"] == good


def test_chat_goes_through_the_template_and_the_router_asks_in_chat():
    def change(model, tokenizer):
        tokenizer.chat_template = TEMPLATE

    with served(change, route="prompt") as (client, service):
        body = {
            "messages": [{"role": "system", "content": "47+"}, {"role": "user", "content": "38+59?"}],
            "temperature": 0,
            "max_tokens": 8,
        }

        def chat(**fields):
            return client.post("/v1/chat/completions", json={"model": "math", **body, **fields}).json()

        # The template writes no <s>; the same tokens, as a prompt:
        tokens = service.tokenizer("47+38+59?", add_special_tokens=False)["input_ids"]
        assert chat()["choices"][0]["message"]["content"] == ask(client, prompt=tokens).json()["choices"][0]["text"]
        assert chat()["usage"]["prompt_tokens"] == len(tokens)
        chosen = chat(model="auto", messages=[{"role": "user", "content": "rsx(gcaf)?"}])["model"]
        strategy = service.router.strategy()
        back = {v.key: name for name, v in service.experts.current.items()}
        assert chosen == back.get(strategy.choose(["rsx(gcaf)?"])[0], "tiny")

        tokenizer, service.tokenizer.chat_template = service.tokenizer, "{{ raise_exception('users only') }}"
        response = client.post("/v1/chat/completions", json={"model": "math", **body})
        assert response.status_code == 400
        assert "users only" in response.json()["error"]["message"]
        tokenizer.chat_template = None


def test_auto_follows_the_names_as_they_change():
    with served(route="classify") as (client, service):
        assert ask(client, model="auto").json()["model"] == "math"
        assert service.model.t2_bank.rows_in_use == 1  # the classification expert keeps its row
        assert ask(client, model="auto", prompt=["1+2?", "rsx(gcaf)?"]).status_code == 400
        assert client.delete("/v1/experts/math").status_code == 200
        assert ask(client, model="auto").json()["model"] in ("code", "reason")
        client.delete("/v1/experts/classify")
        response = ask(client, model="auto")
        assert response.status_code == 503
        assert "'classify'" in response.json()["error"]["message"]
        assert ask(client, model="code").status_code == 200


def test_many_automatic_requests_are_asked_in_few_passes():
    with served(route="classify") as (client, service):
        prompts = ["47+38+59?", "rsx(gcaf)?"] * 10
        passes, real = [], service.router._pass

        def counted(strategy, asked):
            passes.append(len(asked))
            return real(strategy, asked)

        service.router._pass = counted

        async def main():
            async with httpx.AsyncClient(base_url=str(client.base_url), timeout=60) as many:
                body = {"model": "auto", "max_tokens": 4, "temperature": 0}
                got = await asyncio.gather(*(many.post("/v1/completions", json={**body, "prompt": p}) for p in prompts))
            return [r.json()["model"] for r in got]

        assert asyncio.run(main()) == ["math", "code"] * 10
        assert sum(passes) == 20
        assert len(passes) < 15


def test_a_fault_of_the_router_is_logged_and_fails_what_it_was_asked(monkeypatch, caplog):
    with served(route="classify") as (client, service):
        with monkeypatch.context() as m:
            m.setattr(service.router, "_pass", lambda strategy, prompts: 1 / 0)
            response = ask(client, model="auto")
            assert (response.status_code, response.json()["error"]["code"]) == (500, "routing_failed")
            assert "division by zero" in response.json()["error"]["message"]
        assert isinstance(logged(caplog, "auto", "no expert could be chosen"), ZeroDivisionError)
        assert ask(client, model="auto").json()["model"] == "math"


def test_a_fault_of_the_application_is_logged_once(monkeypatch, caplog):
    """By uvicorn, because starlette raises it again after the answer."""
    uvicorn = logging.getLogger("uvicorn.error")
    with served() as (client, service):
        uvicorn.addHandler(caplog.handler)  # it does not propagate
        try:
            with monkeypatch.context() as m:
                m.setattr(service.metrics, "text", lambda: 1 / 0)
                response = client.get("/metrics")
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
            wait_until(lambda: caplog.records, "the fault is logged")  # after the answer
        finally:
            uvicorn.removeHandler(caplog.handler)
        assert httpx.get(client.base_url.join("/metrics")).status_code == 200  # the old connection was closed
    assert [(r.name, r.exc_info[0]) for r in caplog.records if r.exc_info] == [("uvicorn.error", ZeroDivisionError)]


def test_without_a_way_to_choose_there_is_no_auto():
    with served() as (client, _):
        response = ask(client, model="auto")
        assert response.status_code == 404
        assert "--route" in response.json()["error"]["message"]
        assert "auto" not in [m["id"] for m in client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(("route", "words"), [("math2", "which is not there"), ("nobody", "which is not there")])
def test_a_route_that_cannot_work_is_refused_at_the_start(route, words):
    with pytest.raises(ValueError, match=rf"--route {route}: .*{words}"), served(route=route):
        pass
