"""Experts made by a call from a few examples, and served."""

import asyncio
import threading

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny

pytest.importorskip("fastapi")
from t2kernels.serve import searches
from t2kernels.serve.engine import steps
from tests.helpers.serving import PATIENCE, served, wait_until

NAMES = ["math", "code", "reason"]


def examples(count, task="sub"):
    return [
        {"prompt": row["prompt"], "answer": "=" + row["answer"]} for row in t2.tasks.load(task).split("train", count)
    ]


def make(client, name="made", **fields):
    return client.post(f"/v1/experts/{name}/few-shot", json={"experts": NAMES, "examples": examples(6), **fields})


def complete(client, **fields):
    body = {"model": "math", "prompt": "47+38+59?", "max_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def state(client, service):
    """What a search that fails must leave as it is."""
    bank = service.model.t2_bank
    files = (
        sorted((p.name, p.read_bytes()) for p in service.folder.path.iterdir())
        if service.folder.path.is_dir()
        else None
    )
    return client.get("/v1/experts").json(), sorted(bank.names), bank.rows_in_use, files, service.experts.counts.hidden


def likelihood(expert, rows):
    """Mean log p(answer and end | prompt), an example at a time, by materialised weights in fp64."""
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model)
    if expert is not None:
        bank.add("x", expert)
    model = t2.unpatch_model(model, expert=None if expert is None else "x").double()
    total = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum().item()
    return total / len(rows)


@pytest.mark.parametrize("rows", [None, 1])
def test_what_is_made_is_better_on_the_examples_and_is_served(tmp_path, rows):
    """With whatever rows are free, one at least: the others are held while it searches."""
    with served(experts=tmp_path) as (client, service):
        bank = service.model.t2_bank
        held = None if rows is None else bank.ids([service.experts.current[n].key for n in NAMES])
        response = make(client)
        del held
        assert response.status_code == 201
        said = response.json()
        expert = t2.Expert.load(tmp_path / "made.safetensors")
        better = likelihood(expert, examples(6)) - likelihood(None, examples(6))
        assert better > 0.1
        assert said["few_shot"]["gain"] == pytest.approx(better, abs=1e-3)
        facts = expert.manifest
        assert facts["name"] == "made"
        assert (set(facts["mixed"]), facts["examples"]) == (set(NAMES), 6)
        assert facts["versions"] == {n: service.experts.current[n].digest for n in NAMES}
        answer = complete(client, model="made").json()
        assert answer["system_fingerprint"] == f"made-{said['digest']}"
        z = t2.Expert.mix(
            {service.model.t2_bank[service.experts.current[n].key]: a[0] for n, a in facts["mixed"].items()}
        ).z
        for name, values in expert.z.items():
            torch.testing.assert_close(values, z[name], atol=1e-5, rtol=0)
        assert sorted(bank.names) == sorted(v.key for v in service.experts.current.values())
        assert (bank.rows_in_use, service.experts.counts.hidden) == (0, set())
        assert make(client).status_code == 409
        assert make(client, replace=True, seed=1).json()["digest"] != said["digest"]


@pytest.mark.parametrize("score", ["exact", "both"])
def test_answers_can_be_matched(tmp_path, score):
    """With what one of the experts says: the base model says other things."""
    with served(experts=tmp_path) as (client, _):

        def says(model, prompt):
            return complete(client, model=model, prompt=prompt, max_tokens=30).json()["choices"][0]["text"]

        rows = [{"prompt": e["prompt"], "answer": says("code", e["prompt"])} for e in examples(8, "code")]
        response = make(client, examples=rows, score=score, experts=["code"], population=4, iterations=3, caution=0)
        assert response.status_code == 201
        right = {model: sum(says(model, r["prompt"]) == r["answer"] for r in rows) for model in ("made", "tiny")}
        assert response.json()["few_shot"]["gain"] == (right["made"] - right["tiny"]) / 8 > 0


def test_what_runs_goes_on_and_what_is_new_waits(tmp_path, monkeypatch):
    """The old request's second step ends when the search asks for its pause, so that it still runs in the search."""
    body = {"model": "code", "prompt": "1+2+3?", "max_tokens": 100, "temperature": 1.9, "seed": 1, "n": 8}
    with served(experts=tmp_path) as (client, service):
        alone = complete(client, **body).json()["choices"]
        seen, answers, draws, pausing = {}, {}, [], threading.Event()
        real, drawn, paused = searches.FewShot, steps.draw, service.engine.paused
        loop = asyncio.run_coroutine_threadsafe  # the loop runs what it is given in order

        def gated(*args):
            draws.append(1)
            if len(draws) == 2:
                assert pausing.wait(PATIENCE), "nobody asked for a pause"
            return drawn(*args)

        def asked():
            pausing.set()
            return paused()

        def in_the_search(*args, **kwargs):
            loop(asyncio.sleep(0), service.engine._loop).result(PATIENCE)  # what the last step brought has been taken
            running = dict(service.engine.running)
            had = [g.tokens for g in running.values()]
            threads.append(threading.Thread(target=lambda: answers.update(new=complete(client))))
            threads[-1].start()
            wait_until(lambda: service.engine.waiting, "the new request waits")
            seen["second"] = make(client, "second").status_code
            seen.update(
                waiting=len(service.engine.waiting), same=service.engine.running == running, running=len(running)
            )
            out = real(*args, **kwargs)
            seen["tokens"] = [g.tokens for g in running.values()] == had
            return out

        monkeypatch.setattr(searches, "FewShot", in_the_search)
        monkeypatch.setattr(steps, "draw", gated)
        monkeypatch.setattr(service.engine, "paused", asked)
        threads = [threading.Thread(target=lambda: answers.update(old=complete(client, **body)))]
        threads[0].start()
        wait_until(lambda: any(g.tokens for g in list(service.engine.running.values())), "the first tokens have come")
        assert make(client).status_code == 201
        for thread in threads:
            thread.join()
        assert seen["running"] >= 1
        assert (seen["waiting"], seen["same"], seen["second"], seen["tokens"]) == (1, True, 409, True)
        assert answers["old"].json()["choices"] == alone
        assert answers["new"].json()["choices"] == complete(client).json()["choices"]
        assert not (tmp_path / "second.safetensors").exists()


def test_a_search_that_fails_changes_nothing(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "experts"
    folder.mkdir()
    with served(experts=folder) as (client, service):
        before = state(client, service)

        def refused(status, words, name="made", **fields):
            response = make(client, name, **fields)
            assert response.status_code == status
            assert words in response.json()["error"]["message"]
            assert state(client, service) == before
            assert complete(client).status_code == 200

        text = {"prompt": "1+2?", "answer": "=3"}
        for fields, words in (
            ({"examples": []}, "examples"),
            ({"examples": [{**text, "answer": ""}]}, "answer"),
            ({"examples": [text] * 65}, "at most 64"),
            ({"examples": [{**text, "prompt": "1+" * 80}]}, "128"),
            ({"examples": [{**text, "prompt": [{"role": "user", "content": "x"}]}]}, "template"),
            ({"experts": ["math", "nobody"]}, "no expert 'nobody'"),
            ({"experts": []}, "experts"),
            ({"experts": ["math", "math"]}, "twice"),
            ({"population": 65}, "population"),
            ({"iterations": 21}, "iterations"),
            ({"surprise": 1}, "surprise"),
        ):
            refused(400, words, **fields)
        refused(400, "cannot name an expert", name="base")
        refused(409, "replace=true", name="math")
        refused(422, "nothing has changed", score="exact", caution=10)
        with monkeypatch.context() as m:
            m.setattr(searches, "MAX_TOKENS", 16 * 6 * 10)
            refused(400, "smaller population")
        with monkeypatch.context() as m:
            m.setattr(searches, "exact", lambda **_: 1 / 0)
            refused(400, "division by zero", score="exact")
        calls, real = 0, service.model.forward
        assert not [r for r in caplog.records if r.levelname == "ERROR"]

        def forward(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("no more memory")
            return real(*args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(service.model, "forward", forward)
            refused(500, "no more memory")
        (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
        assert record.name == "t2kernels.serve.searches"
        assert str(record.exc_info[1]) == "no more memory"
        with monkeypatch.context() as m:
            m.setattr(t2.Expert, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            refused(507, "No space left")
        assert make(client).status_code == 201


def test_a_search_ends_in_time_and_needs_a_folder(tmp_path):
    with served(experts=tmp_path, search_seconds=0.0) as (client, service):
        before = state(client, service)
        response = make(client)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "search_too_long")
        held = service.model.t2_bank.ids([v.key for v in service.experts.current.values()])  # every row
        response = make(client)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_row")
        del held
        assert state(client, service) == before
        assert complete(client).status_code == 200
    with served() as (client, _):
        response = make(client)
        assert response.status_code == 400
        assert "--experts DIR" in response.json()["error"]["message"]
