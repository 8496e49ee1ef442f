"""Continuous batching with one expert per request, against `generate` and against merged models."""

import asyncio
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig

import t2kernels as t2
from tests.helpers.families import build
from tests.helpers.serving import PATIENCE

pytest.importorskip("fastapi")
from t2kernels.serve.engine import batching, engine
from t2kernels.serve.engine.batching import BatchSettings, ExpertIds
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.engine.sampling import Sampling
from t2kernels.serve.http.errors import APIError

SMALL = BatchSettings(page_size=4, kv_tokens=512, batch_tokens=24, batch_requests=8)
LENGTH = 6


def some_experts(bank, count, width=0.9):
    """Experts that differ enough to change greedy tokens."""
    return {
        f"e{i}": bank.expert({n: 1 + width * torch.randn(k) for n, k in bank.matrices.items()}) for i in range(count)
    }


@pytest.fixture(scope="module")
def served():
    """A model with 6 experts, two prompts longer than a step, short ones, and the greedy tokens of merged models."""
    torch.manual_seed(7)
    model = build("qwen2", max_position_embeddings=256)
    bank = t2.patch_model(model, rows=3)  # two rows for six experts
    experts = some_experts(bank, 6)
    for name, expert in experts.items():
        bank.add(name, expert)
    long = torch.randint(5, 55, (70,)).tolist()
    prompts = [long, long[:50], *(torch.randint(5, 55, (n,)).tolist() for n in (3, 9, 17))]
    wanted = {}
    for name in (None, *experts):
        merged = t2.unpatch_model(copy.deepcopy(model), expert=name)
        assert not hasattr(merged, "t2_bank")
        for i, prompt in enumerate(prompts):
            wanted[name, i] = greedy(merged, prompt)
    return SimpleNamespace(model=model, bank=bank, prompts=prompts, wanted=wanted, experts=experts)


def greedy(model, prompt, **kwargs):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, **kwargs)[
        0, len(prompt) :
    ].tolist()


async def everything(generation):
    return [token async for tokens in generation for token in tokens]


def run(model, work, settings=SMALL, **kwargs):
    """work(engine) on an engine that has started, and is stopped afterwards."""

    async def main():
        made = Engine(model, [], settings, **kwargs)
        await made.start()
        try:
            return await asyncio.wait_for(work(made), PATIENCE)
        finally:
            await made.drain(0)

    return asyncio.run(main())


async def until(condition, what):
    """Let the loop run until a condition holds. what: the condition in words, for the error if it stays false."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE / 2  # before `run` gives up
    while not condition():
        assert loop.time() < end, f"after {PATIENCE / 2} s it is still not so that {what}"
        await asyncio.sleep(0.01)


def logged(caplog, text):
    """The exception of the one record of the engine that has a text."""
    found = [r for r in caplog.records if r.name == engine.__name__ and text in r.getMessage()]
    assert len(found) == 1, caplog.text
    assert found[0].levelname == "ERROR"
    return found[0].exc_info and found[0].exc_info[1]


async def all_pairs(served, made):
    pairs = list(served.wanted)
    tokens = await asyncio.gather(*(everything(made.submit(served.prompts[i], LENGTH, name)) for name, i in pairs))
    return dict(zip(pairs, tokens, strict=True))


def test_every_pair_is_what_materialised_weights_and_generate_give(served):
    """Six experts in two rows, prompts cut into pieces, the same long prompt under every expert."""

    async def work(made):
        got = await all_pairs(served, made)
        assert made.bank.evictions > 0
        assert (made.free_cache(), made.bank.rows_in_use) == (1.0, 0)
        return got

    got = run(served.model, work)
    assert got == served.wanted
    for name, i in served.wanted:
        assert greedy(served.model, served.prompts[i], experts=name) == served.wanted[name, i]
    assert (
        len({tuple(served.wanted[name, 0]) for name in (None, *served.experts)}) >= 5
    )  # so that a wrong expert would show


def test_shared_prefixes_would_give_one_experts_cache_to_another(served, monkeypatch):
    """Why they are off: with them the very same run goes wrong."""
    real = ContinuousBatchingConfig.__init__

    def shared(self, **settings):
        real(self, **{**settings, "allow_block_sharing": True})

    monkeypatch.setattr(ContinuousBatchingConfig, "__init__", shared)
    got = run(served.model, lambda made: all_pairs(served, made))
    wrong = [pair for pair in served.wanted if got[pair] != served.wanted[pair]]
    assert wrong
    assert any(i in (0, 1) for _, i in wrong)  # the prompts that have a prefix in common


def test_a_request_that_waits_for_a_row_is_passed_only_so_often(served, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 3)

    async def work(made):
        order = []

        async def one(name, tokens):
            generation = made.submit(served.prompts[2], tokens, name)
            async for _ in generation:
                if generation.id not in order:
                    order.append(generation.id)
            return generation

        hold = [asyncio.ensure_future(one(name, 40)) for name in ("e0", "e1")]
        await asyncio.sleep(0)
        late = asyncio.ensure_future(one("e2", 2))  # no row for it until e0 or e1 has none left that run
        crowd = [asyncio.ensure_future(one("e0", 40)) for _ in range(12)]
        base = asyncio.ensure_future(one(None, 2))
        done = await asyncio.gather(*hold, late, *crowd, base)
        ids = [g.id for g in done]
        first = ids[2]
        passed = [i for i in ids[3:15] if order.index(i) < order.index(first)]
        assert 1 <= len(passed) <= 3
        assert order.index(ids[-1]) < order.index(first)  # the base model needs no row

    run(served.model, work)


def test_the_queue_is_bounded_and_what_is_cancelled_frees_everything(served):
    async def work(made):
        running = [made.submit(served.prompts[0], 100, f"e{i % 2}") for i in range(4)]
        waiting = [made.submit(served.prompts[0], 100, f"e{i}") for i in range(3)]
        with pytest.raises(APIError) as refused:
            made.submit(served.prompts[2], 1)
        assert (refused.value.status_code, refused.value.headers) == (429, {"Retry-After": "1"})
        with pytest.raises(APIError, match="do not fit into the KV cache, which holds 512"):
            made.submit([5] * 500, 20)
        assert len(made.waiting) == 3
        async for _ in running[0]:
            break
        assert made.free_cache() < 1
        ended = []
        for generation in (*waiting[:1], *running, *waiting[1:]):
            generation.on_end = lambda: ended.append(1)
            generation.cancel()
            generation.cancel()
        assert len(ended) == 7
        assert (made.bank.rows_in_use, len(made.waiting), len(made.running)) == (0, 0, 0)
        steps = made._manager.current_batch
        await until(lambda: made.free_cache() == 1, "the cache is free")
        assert made.free_cache() == 1
        assert made._manager.current_batch <= steps + 3  # it was not that they came to their end
        assert await everything(made.submit(served.prompts[2], LENGTH, "e5")) == served.wanted["e5", 2]

    run(served.model, work, max_running=4, max_waiting=3)


def test_a_cache_that_is_too_small_for_all_at_once_still_serves_all(served):
    """Requests are put back and begin again: the expert goes with them."""
    small = BatchSettings(page_size=4, kv_tokens=120, batch_tokens=24, batch_requests=8)
    assert run(served.model, lambda made: all_pairs(served, made), small) == served.wanted


def test_hundreds_that_wait_fail_with_the_thread_and_one_alone_fails_alone(served):
    async def work(made):
        lost = made.submit(served.prompts[2], 1, "e0")
        served.bank.add("gone", served.experts["e1"])
        hold = [made.submit(served.prompts[0], 50, name) for name in ("e2", "e3")]
        alone = made.submit(served.prompts[2], 4, "gone")
        served.bank.remove("gone")
        with pytest.raises(APIError, match="no expert named 'gone'"):
            await everything(alone)
        assert len(await everything(lost)) == 1
        for generation in hold:
            assert len(await everything(generation)) == 50
        faults = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
        crowd = [made.submit(served.prompts[0], 100, "e0") for _ in range(500)]
        made._manager.stop(block=True, hard_stop=True)  # behind the engine's back: each of them fails when it starts
        results = await asyncio.gather(*map(everything, crowd), return_exceptions=True)
        assert {r.status_code for r in results} <= {500, 503}
        assert not faults
        assert (made.bank.rows_in_use, len(made.waiting), len(made.running)) == (0, 0, 0)

    run(served.model, work, max_running=4)
    assert run(served.model, lambda made: all_pairs(served, made)) == served.wanted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("no more memory"), SystemExit("killed")])
def test_a_dead_thread_fails_what_runs_and_takes_nothing_new(served, error, monkeypatch, caplog):
    """An exception that the loop reports itself, and one that ends its thread without a word."""

    calls = 0

    async def work(made):
        real = served.model.forward

        def forward(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > 3:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(served.model, "forward", forward)
        several = [made.submit(served.prompts[0], 50, name) for name in ("e0", "e1", "e2", None)]
        results = await asyncio.gather(*map(everything, several), return_exceptions=True)
        assert {r.status_code for r in results} <= {500, 503}
        assert all(made.bank.rows_in_use == 0 for _ in results)
        await until(lambda: made.failure is not None, "the engine knows that its thread is dead")
        with pytest.raises(APIError) as refused:
            made.submit(served.prompts[2], 1)
        assert (refused.value.status_code, refused.value.code) == (503, "engine_dead")

    run(served.model, work)
    assert calls == 4  # nothing ran after the step that failed
    cause = logged(caplog, "the generation thread has ended")
    assert cause is (error if isinstance(error, RuntimeError) else None)


def test_an_expert_that_cannot_be_loaded_fails_its_requests_and_is_logged(served, monkeypatch, caplog):
    async def work(made):
        real = made.bank.pin
        monkeypatch.setattr(made.bank, "pin", lambda names: 1 / 0 if names == ["e1"] else real(names))
        lost, good = (made.submit(served.prompts[2], LENGTH, name) for name in ("e1", "e0"))
        assert await everything(good) == served.wanted["e0", 2]
        with pytest.raises(APIError, match="could not be loaded: division by zero") as failed:
            await everything(lost)
        assert (failed.value.status_code, failed.value.code) == (500, "expert_not_loaded")
        assert (made.bank.rows_in_use, len(made.waiting), len(made.running)) == (0, 0, 0)

    run(served.model, work)
    assert isinstance(logged(caplog, "expert 'e1' could not be loaded"), ZeroDivisionError)


@pytest.mark.parametrize("place", ["token", "end", "start"])
def test_a_fault_in_a_step_fails_its_own_request_and_is_logged(served, place, monkeypatch, caplog):
    """The event loop would only report the fault; the request, and all requests that wait, would hang."""

    async def work(made):
        faults = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
        first = made.submit(served.prompts[2], LENGTH, "e0")
        second = made.submit(served.prompts[2], LENGTH, "e1")
        later = made.submit(served.prompts[2], LENGTH, "e2")  # waits for the row of one of them
        if place == "token":
            put = first.events.put_nowait
            first.events.put_nowait = lambda event: 1 / 0 if isinstance(event, list) else put(event)
        elif place == "end":
            first.on_end = lambda: 1 / 0
        else:
            real = made._manager.add_request

            def refuse(ids, request_id, **kwargs):
                return 1 / 0 if request_id == later.id else real(ids, request_id=request_id, **kwargs)

            monkeypatch.setattr(made._manager, "add_request", refuse)
        broken = {"token": first, "start": later}.get(place)
        for generation, name in ((first, "e0"), (second, "e1"), (later, "e2")):
            if generation is broken:
                with pytest.raises(APIError, match="ZeroDivisionError") as failed:
                    await everything(generation)
                assert (failed.value.status_code, failed.value.code) == (500, "internal_error")
            else:
                assert await everything(generation) == served.wanted[name, 2]
        assert not faults
        assert (made.bank.rows_in_use, len(made.waiting), len(made.running)) == (0, 0, 0)
        await until(lambda: made.free_cache() == 1, "the cache is free")

    run(served.model, work)
    assert isinstance(logged(caplog, "on_end failed" if place == "end" else " failed"), ZeroDivisionError)


def test_seeded_sampling_does_not_depend_on_the_batch(served):
    async def work(made):
        def ask(seed, name):
            return everything(made.submit(served.prompts[3], 12, name, Sampling(temperature=0.9, top_p=0.9, seed=seed)))

        alone = [await ask(seed, "e1") for seed in range(4)]
        crowd = await asyncio.gather(*(ask(seed, name) for seed in range(4) for name in ("e1", "e2", None)))
        assert crowd[::3] == alone
        assert len({tuple(a) for a in alone}) > 1

    run(served.model, work)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mixtral"])
def test_other_families(family):
    """Sliding windows, fused and transposed projections, mixtures of experts."""
    torch.manual_seed(1)
    model = build(family)
    bank = t2.patch_model(model, rows=3)
    for name, expert in some_experts(bank, 3, 0.6).items():
        bank.add(name, expert)
    prompts = [torch.randint(5, 55, (n,)).tolist() for n in (4, 40)]
    wanted = {
        (name, i): greedy(model, p, experts=name) for name in (None, "e0", "e1", "e2") for i, p in enumerate(prompts)
    }
    assert run(model, lambda made: all_pairs(SimpleNamespace(wanted=wanted, prompts=prompts), made)) == wanted


def test_requests_with_a_key_that_is_too_large_are_found_by_their_tokens():
    found, largest = [], []
    update = batching.finite_update(lambda *given: found.append(given), largest)
    keys, values = torch.randn(2, 1, 2, 6, 4)
    wanted = keys.clone()
    keys[0, 1, 1, 2], wanted[0, :, 1] = float("nan"), 0
    keys[0, 0, 5, 0], wanted[0, :, 5] = float("-inf"), 0
    update(keys, values, 3)
    assert torch.equal(found[0][0], wanted)
    assert torch.equal(found[0][1], values)
    requests = [
        SimpleNamespace(query_length=n, state=SimpleNamespace(request_id=name))
        for n, name in ((1, "a"), (3, "b"), (2, "c"))
    ]
    assert batching.overflown(largest, requests) == {"b", "c"}
    assert batching.overflown(largest[1:], requests) == batching.overflown([], requests) == set()


def test_a_family_that_transformers_cannot_batch_is_refused_at_the_start():
    model = build("opt")
    t2.patch_model(model)
    with pytest.raises(RuntimeError, match="OPTForCausalLM does not run with transformers' continuous batching"):
        run(model, lambda made: None)


def test_another_version_of_transformers_is_refused(monkeypatch):
    batching.check_transformers()
    with monkeypatch.context() as m:
        m.setattr(batching.transformers, "__version__", "5.25.0")
        with pytest.raises(RuntimeError, match=r"transformers 5\.25\.0.*was tested with"):
            batching.check_transformers()
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    monkeypatch.setattr(ModelRunner, "_sample", lambda self, scores, output_ids, extra: None)
    with pytest.raises(RuntimeError, match=r"ModelRunner\._sample has the arguments"):
        batching.check_transformers()


class State:
    """A request of a batch, which counts how often its row and its length are read."""

    reads = 0

    def __init__(self, row, length):
        self._row, self._length = row, length
        self.state = self

    @property
    def logit_processor_kwargs(self):
        State.reads += 1
        return {batching.ROW: self._row}

    @property
    def query_length(self):
        State.reads += 1
        return self._length


@pytest.mark.parametrize(("requests", "length"), [(512, 1), (64, 8), (8192, 1), (256, 32), (3, 1), (0, 1)])
def test_ids_of_a_step_are_right_and_cheap(requests, length, monkeypatch):
    """Host work: each request is read once, or twice if it has several tokens. One copy and one fill in all."""
    rows = torch.randint(0, 64, (requests,)).tolist()
    states = [State(r, length) for r in rows]
    ids = ExpertIds(requests * length + 5, torch.device("cpu"))
    ids.ids.fill_(99)
    ids.filled = requests * length + 5
    monkeypatch.setattr(State, "reads", 0)
    with Operations() as operations:
        ids.fill(states, requests * length)
    assert State.reads == requests * (1 if length == 1 else 2)
    assert operations.writes == ["zero_", "copy_"]
    assert ids.of_batch(requests * length).tolist() == [[r for r in rows for _ in range(length)]]
    assert ids.ids[requests * length :].tolist() == [0] * 5


class Operations(TorchDispatchMode):
    """Within it the operations of torch that write are noted, in order."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.endswith("_"):
            self.writes.append(name)
        return function(*args, **(kwargs or {}))
