"""Rollouts of a trainer from a vLLM engine: each version answers as HF does with it, in memory, prefix cache on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

import t2kernels as t2
from t2kernels import InputError, StateError, tiny
from t2kernels.experts.expert import ExpertError
from t2kernels.integrations.vllm import engine_args
from t2kernels.integrations.vllm.rollouts import memory
from t2kernels.integrations.vllm.rollouts.colocated import ColocatedEngine
from t2kernels.integrations.vllm.rollouts.replicas import ReplicaEngine
from t2kernels.rollout.engines import Draw
from t2kernels.rollout.generation import Sampler, completion_logits, log_probs
from t2kernels.train import SVFConfig, SVFTrainer
from tests.vllm.test_server import Server
from tests.vllm.worlds import LONG, PROMPTS, SMALL, agrees_with_hf, engine

ROWS = [{"prompt": f"{i}+{i + 3}=", "answer": str(2 * i + 3)} for i in range(24)]
RANK = 16


def reward(prompts, completions, answer, **columns):
    return [float(c.startswith(a)) - 0.1 * len(c) for c, a in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def patched(world):
    """The model of a trainer, its bank, its tokenizer and a sampler."""
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, form="delta", rank=RANK, factors=str(world.factors))
    return model, bank, Sampler(model, tokenizer, 12)


@pytest.fixture(scope="module")
def colocated(world, patched):
    more: dict = {"enable_chunked_prefill": False, "max_num_batched_tokens": 128}  # else it takes no seeds
    more |= {"logprobs_mode": "processed_logprobs", "worker_extension_cls": memory.WORKER}
    with engine(world.model, **engine_args(factors=world.factors, rows=3, rank=RANK, **more)) as llm:
        yield ColocatedEngine(llm, patched[2])


def policy(bank, seed: int) -> t2.Expert:
    g = torch.Generator().manual_seed(seed)
    return bank.expert({n: 1 + 0.5 * torch.randn(k, generator=g) for n, k in bank.matrices.items()})


def agrees(drawn, patched, policies) -> None:
    """Greedy tokens and their log-probabilities are those of HF under each policy's row."""
    agrees_with_hf(drawn, *patched, PROMPTS, policies)


def publish(engine_, patched, names, seed) -> None:
    _, bank, _ = patched
    for at, name in enumerate(names):
        expert = policy(bank, seed + at)
        assert engine_.publish(name, expert) < 8 * expert.numel + 40_000
        if name not in bank:
            bank.add(name, expert)


def test_each_version_answers_as_hf_does_with_it(colocated, patched):
    ids, mask = patched[2].encode(PROMPTS, torch.device("cpu"))
    publish(colocated, patched, ["a@0", "b@0"], 10)
    mixed = ["a@0", "b@0", None] * 2
    agrees(colocated.draw(ids, mask, mixed, Draw(0.0, 1)), patched, mixed)
    publish(colocated, patched, ["a@1", "b@1"], 20)  # five policies in two slots
    mixed = ["a@1", "a@0", "b@1", "b@0", None, "a@1"]
    agrees(colocated.draw(ids, mask, mixed, Draw(0.0, 1)), patched, mixed)
    colocated.drop(["a@0", "b@0"])
    mixed = ["a@1", "b@1"] * 3
    agrees(colocated.draw(ids, mask, mixed, Draw(0.0, 1)), patched, mixed)


def test_an_update_is_seen_by_the_next_request_and_by_none_that_runs(colocated, patched):
    from vllm import SamplingParams

    model, bank, sampler = patched
    publish(colocated, patched, ["run@0"], 30)
    core, greedy = colocated.llm.llm_engine, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = {"prompt_token_ids": sampler.tokenizer(LONG)["input_ids"]}
    core.add_request("old", prompt, greedy, lora_request=colocated._requests["run@0"])
    for _ in range(4):
        core.step()
    assert core.has_unfinished_requests()
    publish(colocated, patched, ["run@1"], 31)
    core.add_request("new", prompt, greedy, lora_request=colocated._requests["run@1"])
    tokens, cached = {}, {}
    while core.has_unfinished_requests():
        for out in core.step():
            if out.finished:
                tokens[out.request_id] = list(out.outputs[0].token_ids)
                cached[out.request_id] = out.num_cached_tokens
    ids = torch.tensor([prompt["prompt_token_ids"]])
    for name, version in (("old", "run@0"), ("new", "run@1")):
        made = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, expert_ids=bank.ids([version])
        )
        assert tokens[name] == made[0, ids.shape[1] :].tolist()
    assert tokens["old"] != tokens["new"]
    assert cached["new"] == 0, "the prefix cache answered from the old policy"
    again = colocated.llm.generate([prompt], greedy, lora_request=[colocated._requests["run@1"]], use_tqdm=False)
    assert again[0].num_cached_tokens >= 32
    assert list(again[0].outputs[0].token_ids) == tokens["new"]


def test_samples_have_the_probabilities_that_they_were_drawn_with(colocated, patched):
    model, bank, sampler = patched
    publish(colocated, patched, ["warm@0"], 40)
    ids, mask = sampler.encode(PROMPTS[:2], torch.device("cpu"))
    drawn = [colocated.draw(ids, mask, ["warm@0", None], Draw(1.5, 4, seed)) for seed in (1, 2, 1)]
    assert drawn[0].completion_ids() == drawn[2].completion_ids() != drawn[1].completion_ids()
    assert len({tuple(c) for c in drawn[0].completion_ids()}) == 8
    policies = ["warm@0"] * 4 + [None] * 4
    with torch.no_grad():
        logits = completion_logits(model, drawn[0], expert_ids=bank.ids(policies))
    told = log_probs(logits, 1.5).gather(2, drawn[0].tokens[..., None])[..., 0]
    there = drawn[0].completion
    assert (told[there] - drawn[0].sampled[there]).abs().max() < 1e-3
    ends = torch.isin(drawn[0].tokens, torch.tensor(sampler.ends)) & there
    assert (ends.sum(1) <= 1).all()


def test_a_row_of_other_factors_or_numbers_is_refused(colocated, patched):
    _, bank, _ = patched
    good = policy(bank, 50)
    foreign = t2.Expert(good.z, {}, {n: s.flip(0) for n, s in good.sketch.items()})
    with pytest.raises(InputError, match="trained with a different decomposition"):
        colocated.publish("foreign@0", foreign)
    with pytest.raises(ExpertError, match="came with other numbers"):
        memory.keep("mem:good@0#0123456789abcdef", good)
    with pytest.raises(ExpertError, match="are no expert"):
        memory.unpack(b"nothing of that kind")
    assert memory.unpack(memory.pack(good)) == good
    assert len(memory.pack(good)) < 4 * good.numel + 200 * len(good.z)


def make(tmp_path, experts="a", **changes):
    model, tokenizer = tiny.load()
    t2.patch_model(model, form="delta", rank=RANK)
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 2, "max_new_tokens": 8, "use_cpu": True,
        "logging_steps": 1, "reward_range": None, "warmup_steps": 0,
    }  # fmt: skip
    train = None if isinstance(experts, dict) else ROWS
    return SVFTrainer(
        model, SVFConfig(str(tmp_path), **{**settings, **changes}), train, None, reward, experts,
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("stale", [0, 1])
def test_experts_train_with_an_engine_that_the_trainer_starts(tmp_path, world, stale):
    options = {k: v for k, v in SMALL.items() if k not in ("dtype", "max_num_batched_tokens")}
    tr = make(
        tmp_path, {"a": ROWS, "b": ROWS[:12]}, rollout="vllm", max_staleness=stale,
        rollout_options={**options, "factors": str(world.factors)},
    )  # fmt: skip
    tr.train()
    logs = [entry for entry in tr.state.log_history if "sampler_gap" in entry]
    assert [entry["staleness"] for entry in logs] == [0, stale, stale]
    assert logs[0]["sampler_gap"] < 1e-4
    if not stale:
        assert all(entry["sampler_gap"] < 1e-4 and abs(entry["importance_max"] - 1) < 1e-2 for entry in logs)
    moved = [torch.cat(list(tr.experts[n].z.values())) for n in "ab"]
    assert all((z - 1).abs().max() > 0.01 for z in moved)
    assert not torch.equal(*moved)


def test_the_same_seed_is_the_same_run(tmp_path, world):
    """An engine that the trainer starts takes seeds on a CPU as well: what it draws does not depend on which requests
    run together."""
    options = {k: v for k, v in SMALL.items() if k not in ("dtype", "max_num_batched_tokens")}
    runs = []
    for name in ("one", "two"):
        tr = make(tmp_path / name, rollout="vllm", rollout_options={**options, "factors": str(world.factors)})
        drawn, rollout = [], tr.rollout

        def noted(rows, drawn=drawn, rollout=rollout):
            drawn.append((out := rollout(rows)).completion_ids())
            return out

        tr.rollout = noted
        tr.train()
        runs.append((drawn, torch.cat(list(tr.experts["a"].z.values()))))
    (drawn, z), (again, z_again) = runs
    assert len(drawn) == 3
    assert len({tuple(c) for c in drawn[0]}) > 4, "samples differ"
    assert drawn == again
    torch.testing.assert_close(z, z_again, rtol=0, atol=1e-4)


# --- servers


@contextlib.contextmanager
def two_servers(world, folder):
    servers = []
    with contextlib.ExitStack() as stack:
        for name in ("one", "two"):
            place = folder / name
            place.mkdir()
            for expert, path in tiny.experts().items():
                (place / f"{expert}.safetensors").write_bytes(path.read_bytes())
            log = stack.enter_context(open(place / "log", "w"))
            server = Server(world.factors, place, log)
            servers.append(server)
            stack.callback(stop, server)
        for server in servers:
            started(server)
        yield servers


def started(server):
    """Wait until a server answers; two of them load at a time."""
    for _ in range(1000):
        assert server.process.poll() is None, "the server has ended"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=2)
            return
        time.sleep(0.5)
    raise TimeoutError


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.process.kill()
    with contextlib.suppress(ProcessLookupError):  # an engine that its server left behind
        os.killpg(server.process.pid, signal.SIGKILL)
    sys.stdout.write((server.folder / "log").read_text()[-2000:])


def test_two_servers_draw_and_a_killed_one_fails_the_step_by_name(world, patched, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with two_servers(world, tmp_path) as servers:
        urls = [server.url for server in servers]
        replicas = ReplicaEngine(",".join(urls), patched[2], timeout=120)
        ids, mask = patched[2].encode(PROMPTS, torch.device("cpu"))
        publish(replicas, patched, ["http@0"], 60)
        policies = ["http@0", "http@0", None, None, "http@0", "http@0"]
        agrees(replicas.draw(ids, mask, policies, Draw(0.0, 1)), patched, policies)
        publish(replicas, patched, ["http@1"], 61)
        policies = ["http@1", "http@0"] * 3
        agrees(replicas.draw(ids, mask, policies, Draw(0.0, 1)), patched, policies)
        samples = replicas.draw(ids, mask, policies, Draw(1.0, 3, 5))
        assert len(samples) == 18
        drawn = [tuple(c) for c in samples.completion_ids()]
        assert any(len(set(drawn[i : i + 3])) > 1 for i in range(0, 18, 3))  # samples of a prompt are not one text
        replicas.drop(["http@0"])
        with pytest.raises(StateError, match=r"replica http://.* refused 'http@0': HTTP 404"):
            replicas.draw(ids, mask, ["http@0"] * 6, Draw(0.0, 1))
        # A body that was changed on its way is not served.
        good = policy(patched[1], 62)
        status, body, _ = raw_post(servers[0], "bad@0", memory.pack(good), "0" * 64)
        assert status == 400
        assert "arrived with digest" in body
        assert servers[0].ask("bad@0", "a")[0] == 404

        settings = {"rollout": f"vllm:{','.join(urls)}", "save_strategy": "steps", "save_steps": 1}
        tr = make(tmp_path / "run", **settings)
        rollout = tr.rollout

        def killing(rows):
            if tr.state.global_step == 2:
                os.killpg(servers[1].process.pid, signal.SIGKILL)
                servers[1].process.wait()
            return rollout(rows)

        tr.rollout = killing
        with pytest.raises(StateError, match=f"replica {urls[1]} does not answer about 'a@2'"):
            tr.train()
        again = make(tmp_path / "run", **{**settings, "rollout": f"vllm:{urls[0]}"})
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3
        assert all(e["sampler_gap"] < 1e-4 for e in again.state.log_history if "sampler_gap" in e)


def raw_post(server, name, data, digest):
    request = urllib.request.Request(
        f"{server.url}/v1/upload_lora_adapter?lora_name={name}", data,
        {"Authorization": "Bearer secret", "x-digest": digest},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as r:
            return r.status, r.read().decode(), None
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode(), None
