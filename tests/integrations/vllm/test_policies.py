"""Policies in memory, and servers that draw, with stand-ins for vLLM: what is sent, compared, refused and dropped."""

import asyncio
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

import t2kernels as t2
from t2kernels import InputError, StateError
from t2kernels.experts.expert import ExpertError
from t2kernels.integrations.vllm import requests
from t2kernels.integrations.vllm.rollouts import memory
from t2kernels.integrations.vllm.rollouts.replicas import ReplicaEngine
from t2kernels.integrations.vllm.server import uploads
from t2kernels.integrations.vllm.server.served import Refused
from t2kernels.integrations.vllm.server.uploads import Uploads
from t2kernels.rollout.engines import Draw


def policy(seed: int = 0) -> t2.Expert:
    g = torch.Generator().manual_seed(seed)
    z = {f"model.layers.{i}.q": 1 + torch.randn(40, generator=g) for i in range(3)}
    return t2.Expert(z, {"fingerprints": {}, "name": "left out"}, {n: torch.randn(40, generator=g) for n in z})


def test_an_expert_goes_as_bytes_and_comes_back():
    expert = policy()
    lean, whole = memory.pack(expert), memory.pack(expert, whole=True)
    assert memory.unpack(lean) == memory.unpack(whole) == expert
    assert 4 * expert.numel < len(lean) < 4 * expert.numel + 100 * len(expert.z) + 100
    assert not memory.unpack(lean).sketch
    assert torch.equal(memory.unpack(whole).sketch["model.layers.1.q"], expert.sketch["model.layers.1.q"])
    for bad in (b"", b"nothing", lean[:-1], lean[:40], (2**40).to_bytes(8, "little") + lean[8:]):
        with pytest.raises(ExpertError, match="bytes that are no expert"):
            memory.unpack(bad)


def test_an_address_in_memory_is_read_once_it_is_kept():
    expert, other = policy(), policy(1)
    where = memory.address_of("a@3", expert)
    assert where.startswith("mem:a@3#")
    assert not requests.resident(where)
    with pytest.raises(ExpertError, match="not in this engine's memory"):
        requests.load(where)
    with pytest.raises(ExpertError, match="came with other numbers"):
        memory.keep(where, other)
    memory.keep(where, expert)
    assert requests.resident(where)
    assert requests.load(where) == expert
    assert requests.files(where) == []
    mixed = requests.mixture([(where, 0.5)])
    assert requests.resident(mixed)
    torch.testing.assert_close(requests.load(mixed).z["model.layers.0.q"], (expert.z["model.layers.0.q"] + 1) / 2)
    memory.drop(where)
    assert not requests.resident(mixed)


def test_a_worker_takes_a_row_and_forgets_it_in_host_memory():
    forgotten = []
    worker = memory.RowWorker()
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(forget=forgotten.append))
    expert = policy()
    where = memory.address_of("a@1", expert)
    assert worker.t2_take_row(where, memory.pack(expert)) == expert.digest()
    assert memory.find(where) == expert
    with pytest.raises(ExpertError, match="came with other numbers"):
        worker.t2_take_row(where, memory.pack(policy(2)))
    worker.t2_drop_row(where)
    assert forgotten == [where]
    assert not memory.is_kept(where)


# --- uploads of a server


class Served:
    """A stand-in for `ServedExperts`."""

    def __init__(self):
        self.names, self.running, self.calls, self.refuse = {}, set(), [], False

    async def serve(self, name, where):
        if self.refuse:
            raise Refused(400, "other factors")
        self.names[name] = where

    async def call(self, method, where, *args):
        self.calls.append((method, where))

    def used(self):
        return {*self.names.values(), *self.running}


def test_uploads_stay_while_they_are_served_or_used(monkeypatch):
    served, expert, newer = Served(), policy(), policy(1)
    there = Uploads(served)

    async def run():
        assert await there.take("a@0", memory.pack(expert), expert.digest()) == expert.digest()
        where = served.names["a@0"]
        assert served.calls == [("t2_take_row", where)]
        served.running.add(requests.mixture([(where, 1.0)]))
        del served.names["a@0"]  # unloaded, and a request still runs with it, in a mixture
        await there.sweep()
        assert memory.is_kept(where)
        served.running.clear()
        await there.take("a@1", memory.pack(newer), None)
        assert not memory.is_kept(where)
        assert served.calls[1] == ("t2_drop_row", where)
        with pytest.raises(Refused, match="arrived with digest"):
            await there.take("a@2", memory.pack(expert), newer.digest())
        with pytest.raises(Refused, match="bytes that are no expert"):
            await there.take("a@2", b"x" * 20, None)
        with pytest.raises(Refused, match="cannot be called"):
            await there.take("../a", memory.pack(expert), None)
        served.refuse = True
        with pytest.raises(Refused, match="other factors"):
            await there.take("a@2", memory.pack(expert), None)
        refused = memory.address_of("a@2", expert)
        assert served.calls[-1] == ("t2_drop_row", refused), "a refused one does not stay in the workers"
        assert list(served.names) == ["a@1"]
        served.refuse = False
        monkeypatch.setattr(uploads, "MOST", 1)
        with pytest.raises(Refused, match="in use; unload some"):
            await there.take("a@3", memory.pack(expert), None)
        del served.names["a@1"]
        await there.sweep()

    asyncio.run(run())


# --- servers that draw


class Replica:
    """A server that answers prompt + 1, + 2, ... with log-probabilities -1/4, -1/2, ..."""

    def __init__(self, lies=False, mode="processed_logprobs", takes_seeds=True):
        self.rows, self.bodies, self.keys, replica = {}, [], set(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, body, status=200):
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self):
                self.answer({"data": [{"id": "the-base"}]})

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                replica.keys.add(self.headers.get("Authorization"))
                if self.path.startswith("/v1/upload_lora_adapter?lora_name="):
                    expert = memory.unpack(data)
                    name = self.path.partition("=")[2].replace("%40", "@")
                    replica.rows[name] = expert
                    digest = "0" * 64 if lies else expert.digest()
                    self.answer({"digest": digest, "logprobs_mode": mode, "takes_seeds": takes_seeds})
                    return
                body = json.loads(data)
                if self.path == "/v1/unload_lora_adapter":
                    del replica.rows[body["lora_name"]]
                    self.answer({})
                    return
                replica.bodies.append(body)
                if body["model"] not in (*replica.rows, "the-base"):
                    self.answer({"error": "no such model"}, 404)
                    return
                tokens = [body["prompt"][-1] + k for k in range(1, 1 + len(body["prompt"]))]
                choices = [
                    {
                        "index": i,
                        "token_ids": tokens,
                        "logprobs": {"token_logprobs": [-k / 4 for k in range(len(tokens))]},
                    }
                    for i in reversed(range(body["n"]))
                ]
                self.answer({"choices": choices})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kill(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def replica():
    """Makes servers, and ends them."""
    made = []

    def make(**settings):
        made.append(Replica(**settings))
        return made[-1]

    yield make
    for one in made:
        one.kill()


SAMPLER = SimpleNamespace(max_new_tokens=7, ends=[2], pad=0)
IDS = torch.tensor([[0, 5, 6], [7, 8, 9], [0, 0, 4], [5, 5, 5]])
MASK = (IDS != 0).long()


def test_every_replica_is_told_and_prompts_are_spread(replica, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    one, two = replica(), replica()
    engine = ReplicaEngine(f"{one.url}, {two.url}/", SAMPLER)
    expert = policy()
    assert engine.publish("a@0", expert) == 2 * len(memory.pack(expert, whole=True))
    assert engine.publish("a@1", expert) == 2 * len(memory.pack(expert))
    assert one.rows == two.rows == {"a@0": expert, "a@1": expert}
    out = engine.draw(IDS, MASK, ["a@0", "a@1", None, "a@1"], Draw(0.7, 2, 100))
    assert [len(one.bodies), len(two.bodies)] == [2, 2]
    asked = sorted((b["seed"], b["model"], b["prompt"]) for b in one.bodies + two.bodies)
    assert asked == [
        (100, "a@0", [5, 6]), (102, "a@1", [7, 8, 9]), (104, "the-base", [4]), (106, "a@1", [5, 5, 5])
    ]  # fmt: skip
    body = one.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["stop_token_ids"], body["logprobs"]) == (0.7, 7, [2], 0)
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert out.completion_ids() == [c for c in ([7, 8], [10, 11, 12], [5], [6, 7, 8]) for _ in range(2)]
    assert out.sampled[0].tolist() == [0, -0.25, 0]
    assert Counter(one.keys) == {"Bearer secret": 1}
    engine.drop(["a@0"])
    assert list(one.rows) == list(two.rows) == ["a@1"]
    with pytest.raises(StateError, match=f"replica {one.url} refused 'a@0': HTTP 404"):
        engine.draw(IDS, MASK, ["a@0"] * 4, Draw(1.0, 1))
    engine.close()


def test_a_replica_that_cannot_draw_for_the_trainer_is_named(replica):
    good, lying, raw, gone = replica(), replica(lies=True), replica(mode="raw_logprobs", takes_seeds=False), Replica()
    gone.kill()
    with pytest.raises(StateError, match=f"replica {lying.url} took 'a@0' with digest 0000"):
        ReplicaEngine(f"{good.url},{lying.url}", SAMPLER).publish("a@0", policy())
    with pytest.raises(StateError, match=f"replica {gone.url} does not answer about 'a@0'"):
        ReplicaEngine(f"{good.url},{gone.url}", SAMPLER).publish("a@0", policy())
    engine = ReplicaEngine(raw.url, SAMPLER)
    engine.publish("a@0", policy())
    with pytest.raises(StateError, match=f"replica {raw.url} gives log-probabilities before the temperature"):
        engine.draw(IDS, MASK, ["a@0"] * 4, Draw(0.7, 1))
    assert len(engine.draw(IDS, MASK, ["a@0"] * 4, Draw(1.0, 1))) == 4
    assert {body["seed"] for body in raw.bodies} == {None}
    for url in ("localhost:8000", "ftp://a", "http://"):
        with pytest.raises(InputError, match="no server's address"):
            ReplicaEngine(url, SAMPLER)
