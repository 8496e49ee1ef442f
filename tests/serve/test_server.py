"""A server process, asked by the `openai` package and by plain HTTP."""

import asyncio
import json
import random
import re
import resource
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from tests.helpers.serving import KEY, Process, httpx, wait_until

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

PROMPTS = ["47+38+59?", "rsx(gcaf)?", "12+30+4?", "kind(47+8+6)?"]
LENGTH = 12


@pytest.fixture(scope="module")
def local():
    """The model as the server has it, and the greedy text of any expert on any prompt."""
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, rows=4)
    known = {}

    def greedy(expert, prompt):
        key = None if expert is None else id(expert), prompt
        if key not in known:
            if expert is not None:
                bank.add("x", expert, replace=True)
            batch = tokenizer(prompt, return_tensors="pt")
            out = model.generate(
                **batch, experts="x" if expert is not None else None, max_new_tokens=LENGTH, do_sample=False
            )
            known[key] = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True), expert
        return known[key][0]

    def make(seed):
        torch.manual_seed(seed)
        return bank.expert({n: 1 + 0.6 * torch.randn(k) for n, k in bank.matrices.items()})

    return SimpleNamespace(bank=bank, greedy=greedy, make=make, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(local, tmp_path_factory):
    """The built-in model with its own experts in a folder, four rows, small blocks and steps."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "experts").mkdir()
    for name, path in tiny.experts().items():
        (folder / "experts" / f"{name}.safetensors").write_bytes(path.read_bytes())
    args = [
        "tiny",
        "--experts",
        folder / "experts",
        "--rows",
        5,
        "--kv-tokens",
        4096,
        "--page-size",
        8,
        "--batch-tokens",
        64,
        "--max-running",
        24,
    ]
    made = Process(
        [*args, "--max-waiting", 300, "--max-upload", 1, "--route", "classify", "--drain", 20], folder / "log"
    )
    made.folder = folder / "experts"
    yield made
    made.kill()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def shipped(name):
    return t2.Expert.load(tiny.experts()[name])


EXPERTS = {name: shipped(name) for name in tiny.experts()}


def upload(server, name, content, **query):
    return server.client.post("/v1/experts", params={"name": name, **query}, content=content)


def error_of(response):
    """Its message, after a look at its form: that of OpenAI's errors."""
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    return body["message"]


# --- what the API answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_every_expert_answers_as_it_does_alone(client, local, kind, stream):
    for model in ("tiny", *EXPERTS):
        for prompt in PROMPTS:
            said = ask(client, kind, stream, model=model, prompt=prompt, temperature=0, max_tokens=LENGTH)
            assert said.text == local.greedy(EXPERTS.get(model), prompt)
            assert said.model == model
            assert said.usage.prompt_tokens == len(local.tokenizer(prompt)["input_ids"])
            assert 1 <= said.usage.completion_tokens <= LENGTH
            assert said.finish in ("stop", "length")


def ask(client, kind, stream, prompt, **fields):
    if kind == "chat":
        ask_, fields["messages"] = client.chat.completions.create, [{"role": "user", "content": prompt}]
    else:
        ask_, fields["prompt"] = client.completions.create, prompt
    if not stream:
        got = ask_(**fields)
        choice = got.choices[0]
        text = choice.message.content if kind == "chat" else choice.text
        return SimpleNamespace(text=text, model=got.model, usage=got.usage, finish=choice.finish_reason)
    text, finish, usage, model = "", None, None, None
    for chunk in ask_(**fields, stream=True, stream_options={"include_usage": True}):
        model = chunk.model
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += (choice.delta.content or "") if kind == "chat" else choice.text
            finish = choice.finish_reason or finish
    return SimpleNamespace(text=text, model=model, usage=usage, finish=finish)


def test_models_are_the_base_the_experts_and_auto(client):
    assert {m.id for m in client.models.list()} == {"tiny", *EXPERTS, "auto"}
    assert client.models.retrieve("math").id == "math"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_auto_is_what_the_classification_expert_chooses(client, server):
    for model, prompt in (("math", "47+38+59?"), ("code", "rsx(gcaf)?")):
        said = ask(client, "text", False, model="auto", prompt=prompt, temperature=0, max_tokens=LENGTH)
        assert said.model == model
        assert (
            said.text == ask(client, "text", False, model=model, prompt=prompt, temperature=0, max_tokens=LENGTH).text
        )


def test_a_mixture_is_a_row_of_its_own(client, local):
    mixed = local.bank.expert(t2.Expert.mix({EXPERTS["math"]: 0.5, EXPERTS["code"]: 0.5}).z)
    for prompt in PROMPTS:
        for _ in range(2):
            said = ask(
                client, "text", False, model="mix:math=0.5,code=0.5", prompt=prompt, temperature=0, max_tokens=LENGTH
            )
            assert said.text == local.greedy(mixed, prompt)


def test_n_seed_stop_and_logprobs(client, local):
    fields = dict(model="tiny", prompt=["47+38+59?", "12+30+4?"], temperature=2, max_tokens=8, n=3, seed=5)
    one, two = client.completions.create(**fields), client.completions.create(**fields)
    texts = [c.text for c in one.choices]
    assert [c.index for c in one.choices] == list(range(6))
    assert texts == [c.text for c in two.choices]
    assert len(set(texts[:3])) > 1
    assert texts != [c.text for c in client.completions.create(**{**fields, "seed": 6}).choices]
    whole = local.greedy(EXPERTS["math"], "47+38+59?")
    stop = whole[3:5]
    for stream in (False, True):
        said = ask(
            client,
            "text",
            stream,
            model="math",
            prompt="47+38+59?",
            temperature=0,
            max_tokens=LENGTH,
            stop=["zz", stop],
        )
        assert (said.text, said.finish) == (whole[: whole.index(stop)], "stop")
    chat = client.chat.completions.create(
        model="math",
        messages=[{"role": "user", "content": "47+38+59?"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert "".join(c.token for c in content) == chat.choices[0].message.content
    assert all(len(c.top_logprobs) == 3 and c.logprob == c.top_logprobs[0].logprob <= 0 for c in content)
    chunks = client.completions.create(
        model="math", prompt="47+38+59?", temperature=0, max_tokens=4, logprobs=2, stream=True
    )
    parts = [c.choices[0] for c in chunks]
    assert "".join(t for p in parts for t in p.logprobs.tokens) == "".join(p.text for p in parts) == whole[:4]


def test_bad_requests_are_refused_with_what_is_wrong(server, client):
    user = [{"role": "user", "content": "1+2?"}]
    for fields, words in (
        ({"messages": [{"role": "system", "content": "be kind"}, *user]}, "chat template"),
        ({"messages": user, "max_tokens": 500}, "maximum context length is 128"),
        ({"messages": [{"role": "user", "content": "1+" * 80}]}, "maximum context length is 128"),
        ({"messages": user, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": user, "extra_body": {"surprise": 1}}, "surprise: this field is not supported"),
        ({"messages": user, "model": "mix:math=x"}, "wanted mix:"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**{"model": "math", **fields})
    with pytest.raises(openai.BadRequestError, match="token ids go from 0 to 99"):
        client.completions.create(model="math", prompt=[5, 100])
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist; there are tiny, "):
        client.chat.completions.create(model="nobody", messages=user)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert server.client.post("/v1/completions", content=b"{").status_code == 400
    response = server.client.post("/v1/completions", content=b" " * (5 << 20))
    assert response.status_code == 413
    error_of(response)
    error_of(server.client.get("/v1/nothing"))
    response = server.client.post(
        "/v1/completions", content=(b" " * 100000 for _ in range(60))
    )  # without an announced length
    assert response.status_code == 413


# --- experts at run time


def test_experts_are_added_replaced_and_removed(server, client, local, tmp_path):
    one, two = local.make(1), local.make(2)
    first, second = (e.save(tmp_path / f"{i}") for i, e in enumerate((one, two)))

    def says():
        return ask(client, "text", False, model="new", prompt=PROMPTS[0], temperature=0, max_tokens=LENGTH).text

    assert upload(server, "new", first.read_bytes()).status_code == 201
    assert says() == local.greedy(one, PROMPTS[0])
    response = upload(server, "new", second.read_bytes())
    assert response.status_code == 409
    assert "replace=true" in error_of(response)
    assert says() == local.greedy(one, PROMPTS[0])
    assert upload(server, "new", second.read_bytes(), replace=True).status_code == 201
    assert says() == local.greedy(two, PROMPTS[0])
    assert (server.folder / "new.safetensors").read_bytes() == second.read_bytes()
    one.save(server.folder / "placed")
    response = server.client.post("/v1/experts", json={"name": "new", "file": "placed.safetensors", "replace": True})
    assert response.status_code == 201
    assert says() == local.greedy(one, PROMPTS[0])
    assert server.client.delete("/v1/experts/new", params={"file": True}).json()["deleted"]
    assert server.client.delete("/v1/experts/new").status_code == 404
    assert not (server.folder / "new.safetensors").exists()
    with pytest.raises(openai.NotFoundError):
        says()
    assert not any("new" in series for series in server.metrics())


def test_bad_uploads_change_nothing(server, local, tmp_path):
    good = local.make(3).save(tmp_path / "good").read_bytes()
    before = sorted((p.name, p.read_bytes()) for p in server.folder.iterdir()), server.client.get("/v1/experts").json()
    other, _ = tiny.load()
    other.model.layers[0].mlp.up_proj.weight.data.normal_()
    bank = t2.patch_model(other, rank=4)
    stranger = (
        bank.expert({n: torch.full((k,), 1.1) for n, k in bank.matrices.items()})
        .save(tmp_path / "stranger")
        .read_bytes()
    )
    torch.save({"z": torch.ones(3)}, tmp_path / "pickle")
    for content, words in (
        (good[: len(good) // 2], "truncated|damaged"),
        (stranger, "of another model"),
        ((tmp_path / "pickle").read_bytes(), "pickle"),
        (b"", "empty"),
        (b"\0" * 100, "not an expert"),
    ):
        for name, query in (("bad", {}), ("math", {"replace": True})):
            response = upload(server, name, content, **query)
            assert response.status_code == 400
            assert re.search(words, error_of(response))
    assert upload(server, "math", good).status_code == 409
    assert upload(server, "../evil", good).status_code == 400
    assert upload(server, "big", b"\0" * (2 << 20)).status_code == 413
    (server.folder / "link.safetensors").symlink_to(tiny.experts()["math"])
    for file in ("../log", "/etc/passwd", "link.safetensors"):
        assert server.client.post("/v1/experts", json={"name": "bad", "file": file}).status_code == 400
    (server.folder / "link.safetensors").unlink()
    assert server.client.post("/v1/experts", json={"name": "bad", "file": "absent.safetensors"}).status_code == 404
    assert server.client.post("/v1/experts", json=["bad"]).status_code == 400
    assert before == (
        sorted((p.name, p.read_bytes()) for p in server.folder.iterdir()),
        server.client.get("/v1/experts").json(),
    )


def test_a_name_that_differs_only_in_case_is_refused_however_it_comes(server, local, tmp_path):
    """One of the two would overwrite the other's file where a file system ignores case."""
    good = local.make(3).save(tmp_path / "good").read_bytes()
    before = sorted((p.name, p.read_bytes()) for p in server.folder.iterdir()), server.client.get("/v1/experts").json()
    shots = {"experts": ["math"], "examples": [{"prompt": "1+2?", "answer": "=3"}]}
    for replace in (False, True):
        for response in (
            upload(server, "Math", good, replace=replace),
            server.client.post("/v1/experts", json={"name": "MATH", "file": "math.safetensors", "replace": replace}),
            server.client.post("/v1/experts/maTh/few-shot", json={**shots, "replace": replace}),
        ):
            assert response.status_code == 409
            assert re.search("'math'.*differs from it only in case.*choose another name", error_of(response))
    (server.folder / "Unserved.safetensors").write_bytes(good)
    response = upload(server, "unserved", good, replace=True)
    assert response.status_code == 409
    assert "'Unserved.safetensors'" in error_of(response)
    (server.folder / "Unserved.safetensors").unlink()
    assert before == (
        sorted((p.name, p.read_bytes()) for p in server.folder.iterdir()),
        server.client.get("/v1/experts").json(),
    )


def test_an_expert_made_from_examples_answers_at_once(server, client, local):
    rows = [{"prompt": r["prompt"], "answer": "=" + r["answer"]} for r in t2.tasks.load("sub").split("train", 4)]
    made = server.client.post(
        "/v1/experts/sub/few-shot", json={"experts": ["math", "code"], "examples": rows, "iterations": 3}
    )
    assert made.status_code == 201
    assert made.json()["few_shot"]["gain"] > 0
    expert = t2.Expert.load(server.folder / "sub.safetensors")
    assert expert.manifest["mixed"] == made.json()["few_shot"]["mixed"]
    for prompt in PROMPTS:
        said = ask(client, "text", False, model="sub", prompt=prompt, temperature=0, max_tokens=LENGTH)
        assert said.text == local.greedy(expert, prompt)
    assert server.client.delete("/v1/experts/sub", params={"file": True}).status_code == 200


# --- many at once


def evictions(metrics):
    return sum(value for series, value in metrics.items() if series.startswith("t2_expert_evictions_total"))


def quiet(server):
    """Wait until nothing runs; the metrics then."""
    found = {}

    def idle():
        found.update(server.metrics())
        return [found[f"t2_{name}"] for name in ("requests_running", "requests_waiting", "kv_free")] == [0, 0, 1]

    wait_until(idle, "nothing runs or waits and the cache is free")
    return found


def test_many_streams_while_experts_come_change_and_go(server, local, tmp_path):
    """200 streams over 20 experts in four rows, while experts are replaced and removed.

    Each stream has the text of one version of its expert.
    """
    made = [local.make(100 + i) for i in range(30)]
    files = [e.save(tmp_path / f"{i}").read_bytes() for i, e in enumerate(made)]
    digests = {}
    for i in range(20):
        digests[upload(server, f"many{i}", files[i]).json()["digest"]] = made[i]
    before, memory = quiet(server), server.memory()
    pick = random.Random(3)
    asked = [(f"many{pick.randrange(20)}" if pick.random() < 0.9 else "tiny", pick.choice(PROMPTS)) for _ in range(200)]

    async def one(turn, api, model, prompt):
        await turn.acquire()
        stream = await api.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=LENGTH, stream=True)
        text, fingerprint = "", None
        async for chunk in stream:
            fingerprint = chunk.system_fingerprint
            text += chunk.choices[0].text
        return model, prompt, text, fingerprint

    async def change(turn, api):
        """30 changes. The first 80 streams start at once; each change lets four more start."""
        for i in range(30):
            name = f"many{i % 10}"
            if i % 3 == 2:
                await api.delete(f"/v1/experts/{name}")
                response = await api.post("/v1/experts", params={"name": name, "replace": True}, content=files[i % 30])
            else:
                response = await api.post(
                    "/v1/experts", params={"name": name, "replace": True}, content=files[20 + i % 10]
                )
            digests[response.json()["digest"]] = made[i % 30 if i % 3 == 2 else 20 + i % 10]
            for _ in range(4):
                turn.release()

    async def main():
        headers = {"Authorization": f"Bearer {KEY}"}
        turn = asyncio.Semaphore(80)
        api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        async with api, httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as admin:
            return await asyncio.gather(
                *(one(turn, api, *a) for a in asked), change(turn, admin), return_exceptions=True
            )

    *got, changed = asyncio.run(main())
    assert changed is None
    gone = [e for e in got if isinstance(e, openai.NotFoundError)]  # came just between a removal and the next upload
    answered = [g for g in got if isinstance(g, tuple)]
    assert len(answered) + len(gone) == 200
    assert len(gone) <= 10
    for model, prompt, text, fingerprint in answered:
        expert = None if model == "tiny" else digests[fingerprint.removeprefix(f"{model}-")]
        assert text == local.greedy(expert, prompt)
    assert len({(g[0], g[3]) for g in answered}) > 20  # some experts answered as several versions
    after = quiet(server)
    assert evictions(after) > evictions(before)
    assert after['t2_expert_loads_total{expert="many15"}'] > 0
    assert (after["t2_rows_in_use"], after["t2_experts"], after["t2_kv_free"]) == (
        before["t2_rows_in_use"],
        before["t2_experts"],
        1,
    )
    for i in range(20):
        server.client.delete(f"/v1/experts/many{i}", params={"file": True})
    gone = server.metrics()
    assert gone["t2_experts"] == len(EXPERTS)
    assert not any("many" in series for series in gone)
    assert evictions(gone) == evictions(after)  # what they counted stays, under one label
    assert server.memory() - memory < 64 << 20


def test_who_hangs_up_frees_what_it_held(server):
    body = {"model": "math", "prompt": "1+2+3+4?", "max_tokens": 100, "temperature": 1.8, "seed": 1, "n": 8}
    before = quiet(server)
    for fields in ({"stream": True}, {"n": 64}):
        request = server.client.build_request("POST", "/v1/completions", json={**body, **fields})
        head = f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items()) + "\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as hasty:
            hasty.sendall(head.encode() + request.read())
            if "stream" in fields:
                assert hasty.recv(1 << 16).startswith(b"HTTP/1.1 200")
            else:
                wait_until(lambda: server.metrics()["t2_requests_running"], "the request runs")
        after = quiet(server)
        assert (after["t2_rows_in_use"], after["t2_kv_free"]) == (before["t2_rows_in_use"], 1)
    series = 't2_requests_total{expert="math",status="499"}'
    assert after[series] == before.get(series, 0) + 2


def test_a_full_queue_says_when_to_come_back(server):
    body = {"model": "math", "prompt": ["1+2?"] * 8, "n": 16, "max_tokens": 60, "temperature": 1.5}
    statuses = []

    def ask_many():
        response = server.client.post("/v1/completions", json=body)
        statuses.append((response.status_code, response.headers.get("retry-after")))

    threads = [threading.Thread(target=ask_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {(200, None), (429, "1")}
    after = quiet(server)
    assert after["t2_kv_free"] == 1


def test_metrics_count_by_expert(server, client):
    before = server.metrics()
    said = ask(client, "text", True, model="reason", prompt=PROMPTS[0], temperature=0, max_tokens=LENGTH)
    after = server.metrics()

    def grew(series):
        return after[series] - before.get(series, 0)

    assert grew('t2_requests_total{expert="reason",status="200"}') == 1
    assert grew('t2_prompt_tokens_total{expert="reason"}') == said.usage.prompt_tokens
    assert grew('t2_generated_tokens_total{expert="reason"}') == said.usage.completion_tokens
    assert grew('t2_time_to_first_token_seconds_count{expert="reason"}') == 1
    assert after["t2_rows"] == 5
    assert (
        httpx.get(f"{server.url}/metrics").status_code == httpx.get(f"{server.url}/health").status_code == 200
    )  # without the key


# --- how it ends


def test_a_full_disk_fails_the_upload_and_nothing_else(server, local, tmp_path):
    """The process may write files of half an expert's size only."""
    content = local.make(4).save(tmp_path / "expert").read_bytes()
    before = sorted(p.name for p in server.folder.iterdir())
    pid, unlimited = server.process.pid, resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(content) // 2, unlimited[1]))
    try:
        for name, query in (("full", {}), ("math", {"replace": True})):
            response = upload(server, name, content, **query)
            assert response.status_code == 507
            assert "could not be stored" in error_of(response)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert sorted(p.name for p in server.folder.iterdir()) == before
    assert (server.folder / "math.safetensors").read_bytes() == tiny.experts()["math"].read_bytes()
    assert server.client.get("/v1/models/full").status_code == 404
    assert upload(server, "full", content).status_code == 201
    server.client.delete("/v1/experts/full", params={"file": True})


def test_shutting_down_finishes_what_runs(tmp_path):
    server = Process(["tiny", "--drain", 20], tmp_path / "log")
    try:
        response = upload(server, "math2", tiny.experts()["math"].read_bytes())
        assert response.status_code == 400
        assert "--experts DIR" in error_of(response)
        body = {"model": "tiny", "prompt": "1+2+3?", "max_tokens": 110, "temperature": 1.9, "seed": 0, "n": 16}
        with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=server.url, headers=dict(server.client.headers)) as other:
                wait_until(lambda: other.get("/health").json()["status"] == "draining", "the server drains")
                refused = other.post("/v1/completions", json=body)
                assert refused.status_code == 503
                assert "shutting down" in error_of(refused)
                assert other.get("/health").status_code == 503
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        finishes = [c["finish_reason"] for e in events[:-1] for c in json.loads(e[6:])["choices"]]
        assert len([f for f in finishes if f]) == 16
        assert server.process.wait(30) == 0
    finally:
        server.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()
