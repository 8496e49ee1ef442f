"""`serve` with the `openai` client: the built-in model and its experts, files that come and go, mixtures, and routing
by the prompt.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import psutil
import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.adapt import Classifier, Question
from t2kernels.storage import read_tensors, write_tensors
from tests.vllm.worlds import NEW, answers_of, materialise

PROMPTS = ["47+38+59?", "rsx(gcaf)?", "12+7?", "a"]
NAMES = ("math", "code", "reason")
KEY = "secret"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, factors, folder, log):
        self.port, self.folder = free_port(), folder
        experts = {n: str(folder / f"{n}.safetensors") for n in (*NAMES, "classify")}
        options = "--dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 8 --max-num-batched-tokens 64"
        options = [*options.split(), "--block-size", "32"]
        code = "import json, sys; from t2kernels.integrations.vllm import serve\n"
        code += "if __name__ == '__main__': serve(**json.loads(sys.argv[1]))"
        script = folder / "run.py"
        script.write_text(code)
        template = folder / "template.jinja"
        template.write_text("<s>{% for message in messages %}{{ message.content }}{% endfor %}")
        options += ["--chat-template", str(template)]
        settings = dict(
            model=str(tiny.path()),
            experts=experts,
            port=self.port,
            api_key=KEY,
            rows=4,
            factors=str(factors),
            options=options,
        )
        self.process = subprocess.Popen(
            [sys.executable, script, json.dumps(settings)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a test can kill its engine with it
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self):
        for _ in range(300):
            assert self.process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError

    def post(self, path, **body):
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as r:
                return r.status, json.load(r), dict(r.headers)
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode(), {}

    def ask(self, model, prompt):
        """(status, text, the expert that answered where that was chosen)"""
        status, body, headers = self.post(
            "/v1/completions", model=model, prompt=prompt, max_tokens=NEW, temperature=0, ignore_eos=True
        )
        text = body["choices"][0]["text"] if status == 200 else body
        return status, text, {k.lower(): v for k, v in headers.items()}.get("x-expert")


@contextlib.contextmanager
def running(world, folder):
    for name, path in tiny.experts().items():
        (folder / f"{name}.safetensors").write_bytes(path.read_bytes())
    with open(folder / "log", "w") as log:
        server = Server(world.factors, folder, log)
        try:
            server.wait()
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(60)
            finally:
                server.process.kill()
                sys.stdout.write((folder / "log").read_text()[-3000:])


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    with running(world, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def texts(world):
    """{(expert, prompt): text} of materialised models; ("math+code", prompt) a mixture."""
    factors, found = t2.Factors.load(world.factors), {}
    experts = {n: t2.Expert.load(p) for n, p in tiny.experts().items()}
    experts["math+code"] = t2.Expert.mix([(experts["math"], 0.5), (experts["code"], 0.5)])
    experts |= {f"e{e}": t2.Expert.load(p) for e, p in world.experts.items()}
    for name, expert in {"base": None, **experts}.items():
        model, tokenizer = tiny.load()
        if expert is not None:
            materialise(model, factors, expert)
        for prompt, answer in zip(PROMPTS, answers_of(model, tokenizer, PROMPTS), strict=True):
            found[name, prompt] = tokenizer.decode(answer, skip_special_tokens=True)
    return found


def complete(client, model, prompt, **more):
    out = client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True}, **more
    )
    return out.choices[0].text


def test_the_models_are_the_experts(client):
    assert {"base", "model", *NAMES, "classify"} == {m.id for m in client.models.list().data}


def test_every_expert_answers_as_its_materialised_model(client, texts):
    for name in ("base", *NAMES):
        for prompt in PROMPTS:
            assert complete(client, name, prompt) == texts[name, prompt], (name, prompt)


def test_streams_of_mixed_experts_at_once(server, texts):
    async def one(client, model, prompt):
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*[one(client, m, p) for m, p in asked])

    asked = [(m, p) for m in ("base", *NAMES) for p in PROMPTS] * 2
    random.Random(0).shuffle(asked)
    for (model, prompt), text in zip(asked, asyncio.run(many()), strict=True):
        assert text == texts[model, prompt], (model, prompt)


def test_errors_of_clients(client, server):
    with pytest.raises(openai.NotFoundError):
        complete(client, "nobody", PROMPTS[0])
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0), "auto", PROMPTS[0])
    with pytest.raises(openai.NotFoundError, match="no expert 'nobody'"):
        complete(client, "mix:math=0.5,nobody=0.5", PROMPTS[0])
    with pytest.raises(openai.BadRequestError, match="is not a mixture"):
        complete(client, "mix:math", PROMPTS[0])
    with pytest.raises(openai.BadRequestError, match="is not a mixture"):
        complete(client, "mix:math=nan", PROMPTS[0])
    with pytest.raises(openai.BadRequestError, match="one prompt in text"):
        client.completions.create(model="auto", prompt=[[1, 5, 9]], max_tokens=2)


def test_a_lora_adapter_is_served_beside_experts(server, world, texts):
    shapes, folder = t2.Factors.load(world.factors), server.folder / "style"
    model, tokenizer = tiny.load()
    pairs = {}
    for name in shapes:
        M, N = shapes.shape(name)
        B, A = torch.randn(M, 4) * 0.3 * float(shapes.sigmas[name][0]) / M**0.5, torch.randn(4, N) / N**0.5
        pairs[name] = B, A
        with torch.no_grad():
            model.get_submodule(name).weight += B @ A
    t2.LoraAdapter(pairs).save(folder)
    wanted = [tokenizer.decode(a, skip_special_tokens=True) for a in answers_of(model, tokenizer, PROMPTS)]
    status, said, _ = server.post("/v1/load_lora_adapter", lora_name="style", lora_path=str(folder))
    assert status == 200, said
    assert [server.ask("style", p)[1] for p in PROMPTS] == wanted
    assert [server.ask("math", p)[1] for p in PROMPTS] == [texts["math", p] for p in PROMPTS]
    status, said, _ = server.post("/v1/completions", model="mix:math=0.5,style=0.5", prompt="a", max_tokens=1)
    assert status == 400, said
    assert "mixtures of experts only" in said
    (folder / "adapter_model.safetensors").unlink()
    status, said, _ = server.post("/v1/load_lora_adapter", lora_name="other", lora_path=str(folder))
    assert status == 400, said
    assert server.ask("style", PROMPTS[0])[1] == wanted[0]  # the server has a copy
    assert server.post("/v1/unload_lora_adapter", lora_name="style")[0] == 200
    assert server.ask("style", PROMPTS[0])[0] == 404


def test_experts_come_and_go(server, world, texts):
    def load(name, path, **more):
        return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)[:2]

    new = server.folder / "new.safetensors"
    assert server.ask("new", PROMPTS[0])[0] == 404
    assert load("new", new)[0] == 404
    for e in (1, 2):  # the file is replaced, and so is the expert
        new.write_bytes(world.experts[e].read_bytes())
        status, said = load("new", new, load_inplace=e == 2)
        assert status == 200, said
        assert [server.ask("new", p)[1] for p in PROMPTS] == [texts[f"e{e}", p] for p in PROMPTS]
    assert load("new", new)[0] == 400
    new.write_bytes(world.experts[3].read_bytes()[:3000])
    status, said = load("new", new, load_inplace=True)
    assert status == 400, said
    assert server.ask("new", PROMPTS[0])[:2] == (200, texts["e2", PROMPTS[0]])  # a bad file changes nothing
    other = t2.Expert({"model.layers.7.mlp.up_proj": torch.ones(4)}).save(server.folder / "other")
    assert load("other", other)[0] == 400
    assert load("outside", world.experts[1])[0] == 403
    assert load("outside", f"{server.folder}/../{world.experts[1].parent.name}/e1")[0] in (403, 404)
    link = server.folder / "link.safetensors"
    link.symlink_to(world.experts[1])
    assert load("outside", link)[0] == 403
    assert load("auto", new)[0] == load("base", new)[0] == 400
    assert server.post("/v1/load_lora_adapter", lora_name="x")[0] == 400
    assert server.post("/v1/unload_lora_adapter", lora_name="new")[0] == 200
    assert server.ask("new", PROMPTS[0])[0] == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="new")[0] == 404
    assert server.ask("math", PROMPTS[0])[:2] == (200, texts["math", PROMPTS[0]])


def test_a_mixture_is_made_when_it_is_asked_for(server, texts):
    for model in ("mix:math=0.5,code=0.5", "mix:code=.5, math=.5"):
        for prompt in PROMPTS[:2]:
            assert server.ask(model, prompt) == (200, texts["math+code", prompt], "mix:code=0.5,math=0.5")


def test_auto_chooses_as_the_library_does(server, texts):
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, form="delta")
    for name, path in tiny.experts().items():
        bank.add(name, path)
    wanted = Classifier(model, tokenizer, Question.tiny(NAMES)).choose(PROMPTS)
    assert len(set(wanted)) > 1
    for prompt, name in zip(PROMPTS, wanted, strict=True):
        assert server.ask("auto", prompt) == (200, texts[name, prompt], name)


def test_auto_with_labels_of_several_tokens(server, texts):
    question = {
        "template": "kind({prompt})?",
        "labels": {"=ma": "math", "=co": "code", "=re": "reason"},
        "strip": "?",
        "chat": False,
    }
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, form="delta")
    for name, path in tiny.experts().items():
        bank.add(name, path)
    wanted = Classifier(model, tokenizer, Question(**question)).choose(PROMPTS)
    assert len(set(wanted)) > 1
    expert = t2.Expert.load(tiny.experts()["classify"])
    path = t2.Expert(expert.z, {**expert.manifest, "question": question}, expert.sketch).save(server.folder / "judge")
    assert server.post("/v1/load_lora_adapter", lora_name="judge", lora_path=str(path))[0] == 200
    for prompt, name in zip(PROMPTS, wanted, strict=True):
        assert server.ask("auto", prompt) == (200, texts[name, prompt], name)
    assert server.post("/v1/unload_lora_adapter", lora_name="judge")[0] == 200


def test_chats(client, texts):
    def chat(model, content):
        out = client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=NEW,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return out.parse().choices[0].message.content, out.headers.get("x-expert")

    assert chat("math", PROMPTS[0]) == (texts["math", PROMPTS[0]], None)
    assert chat("auto", PROMPTS[0]) == (texts["math", PROMPTS[0]], "math")
    assert chat("auto", [{"type": "text", "text": PROMPTS[1]}]) == (texts["code", PROMPTS[1]], "code")


def test_two_hundred_streams_while_experts_change(server, world, texts):
    """Twenty experts in three slots and two hundred requests, while files are loaded, replaced and removed."""
    for i in range(20):
        (server.folder / f"x{i}.safetensors").write_bytes(world.experts[1 + i % 5].read_bytes())
        assert server.post("/v1/load_lora_adapter", lora_name=f"x{i}", lora_path=str(server.folder / f"x{i}"))[0] == 200

    async def one(client, i, prompt):
        stream = await client.completions.create(
            model=f"x{i}", prompt=prompt, max_tokens=NEW, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def change(done):
        """Replace the file of an expert, and the expert, twice a second; ask for it each time; take it away and put
        another there.
        """
        asked, path, turn = [], server.folder / "changing.safetensors", 0
        while turn < 4 or not done.is_set():
            path.write_bytes(world.experts[1 + turn % 5].read_bytes())
            loaded = await asyncio.to_thread(
                server.post, "/v1/load_lora_adapter", lora_name="changing", lora_path=str(path), load_inplace=True
            )
            assert loaded[0] == 200, loaded
            asked.append(asyncio.create_task(asyncio.to_thread(server.ask, "changing", PROMPTS[turn % 3])))
            await asyncio.sleep(0.5)
            if turn % 2:
                assert (await asyncio.to_thread(server.post, "/v1/unload_lora_adapter", lora_name="changing"))[0] == 200
            turn += 1
        # Each is answered by the expert that had the name when the request came in, however late it ran.
        for i, (status, text, _) in enumerate(await asyncio.gather(*asked)):
            assert (status, text) == (200, texts[f"e{1 + i % 5}", PROMPTS[i % 3]]), i
        return turn

    async def many():
        done = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
            changing = asyncio.create_task(change(done))
            answers = await asyncio.gather(*[one(client, i, p) for i, p in asked])
            done.set()
            return answers, await changing

    asked = [(i % 20, PROMPTS[i % 3]) for i in range(200)]
    random.Random(1).shuffle(asked)
    answers, turns = asyncio.run(many())
    wrong = [(i, p) for (i, p), text in zip(asked, answers, strict=True) if text != texts[f"e{1 + i % 5}", p]]
    assert not wrong
    assert turns >= 4


def test_a_full_disk_and_a_corrupt_file_change_nothing_for_the_others(server, world, texts):
    """Streams run while files are refused: the process of the server may write no byte more, as on a full disk; files
    that are cut, or no expert.
    """
    whole, new = world.experts[1].read_bytes(), server.folder / "unlucky.safetensors"
    tensors, facts = read_tensors(world.experts[1])
    write_tensors(new, {**tensors, (z := next(n for n in tensors if n.endswith(".z"))): tensors[z] * torch.nan}, facts)
    not_finite = new.read_bytes()

    def load(content, **more):
        new.write_bytes(content)
        return server.post("/v1/load_lora_adapter", lora_name="unlucky", lora_path=str(new), **more)[:2]

    async def one(client, model, prompt):
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def refused():
        limit = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, limit[1]))
        try:
            out = [await asyncio.to_thread(load, whole)]
        finally:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
        for content in (
            whole[: len(whole) // 2],
            b"",
            b"\x80\x02}q\x00.",
            whole[:-4] + b"\xff\xff\xff\x7f",  # not what its digest says
            not_finite,
        ):
            out.append(await asyncio.to_thread(load, content))
        return out

    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            running = [asyncio.create_task(one(client, m, p)) for m, p in asked]
            return await refused(), await asyncio.gather(*running)

    asked = [(m, p) for m in ("base", *NAMES) for p in PROMPTS] * 4
    said, answers = asyncio.run(many())
    assert [status for status, _ in said] == [507, *[400] * 5], said
    assert "could not be copied" in said[0][1]
    assert "is damaged" in said[-2][1]
    assert "not finite" in said[-1][1]
    assert [(m, p) for (m, p), text in zip(asked, answers, strict=True) if text != texts[m, p]] == []
    assert server.ask("unlucky", PROMPTS[0])[0] == 404
    assert load(whole)[0] == 200
    assert server.ask("unlucky", PROMPTS[0])[:2] == (200, texts["e1", PROMPTS[0]])
    assert server.post("/v1/unload_lora_adapter", lora_name="unlucky")[0] == 200


@pytest.mark.parametrize("title", ["VLLM::Worker", "VLLM::EngineCore"])
def test_a_process_that_is_killed_fails_every_request_and_hangs_none(world, tmp_path, title):
    """It is stopped first, so that all of them are running when it is killed.

    The server ends by itself, for whoever starts it again.
    """

    from vllm.v1.engine.exceptions import EngineDeadError

    said = ["ngine", *([EngineDeadError.CLIENT_MESSAGE] if hasattr(EngineDeadError, "CLIENT_MESSAGE") else [])]

    async def stream(client):
        out = await client.completions.create(
            model="math", prompt=PROMPTS[0], max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return [chunk async for chunk in out]

    async def many(server, victim):
        def post(path, **body):
            return asyncio.create_task(asyncio.to_thread(server.post, path, **body))

        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            victim.suspend()
            streams = [asyncio.create_task(stream(client)) for _ in range(2)]
            running = [
                post("/v1/completions", model=m, prompt=PROMPTS[0], max_tokens=9) for m in ("base", "code", "auto")
            ]
            # One waits for the engine, the other for that one.
            running.append(post("/v1/load_lora_adapter", lora_name="late", lora_path=str(server.folder / "math")))
            running.append(post("/v1/completions", model="mix:math=0.5,code=0.5", prompt=PROMPTS[0], max_tokens=9))
            await asyncio.sleep(3)
            assert not any(task.done() for task in (*streams, *running))
            victim.kill()
            new = post("/v1/completions", model="math", prompt=PROMPTS[0], max_tokens=9)
            return await asyncio.gather(*streams, return_exceptions=True), await asyncio.gather(
                *running, new, return_exceptions=True
            )

    with running(world, tmp_path) as server:
        (victim,) = [
            p for p in psutil.Process(server.process.pid).children(recursive=True) if title in " ".join(p.cmdline())
        ]
        streams, answers = asyncio.run(many(server, victim))
        assert all(isinstance(e, openai.APIError) for e in streams), streams
        for answer in answers[:-1]:
            assert answer[0] in (500, 503), answers
            assert any(words in answer[1] for words in said), answers  # what has happened is said
        assert isinstance(answers[-1], OSError) or answers[-1][0] in (500, 503), (
            answers
        )  # the last one may find the server gone
        server.process.wait(60)
        with pytest.raises(OSError, match="refused"):
            server.ask("math", PROMPTS[0])


def test_it_ends_when_it_is_told_to_and_finishes_what_is_running(server, texts):
    """The last test of this file: it ends the server."""

    async def last():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.completions.create(
                model="math",
                prompt=PROMPTS[0],
                max_tokens=NEW,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            parts = [(await anext(stream)).choices[0].text]
            os.kill(server.process.pid, signal.SIGTERM)
            return "".join([*parts, *[chunk.choices[0].text async for chunk in stream]])

    assert asyncio.run(last()) == texts["math", PROMPTS[0]]
    assert server.process.wait(60) == 0
