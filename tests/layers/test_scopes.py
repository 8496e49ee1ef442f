"""A scope holds for the code inside it and for nothing else, or raises."""

import asyncio
import contextlib
import copy
import pickle
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from transformers import TextIteratorStreamer

import t2kernels as t2
from t2kernels.layers.routing.scopes import AmbiguousScopeError
from tests.helpers.families import build


@pytest.fixture(params=["factored", "delta"])
def world(request):
    """A patched model, its bank, a batch, and the logits of each expert."""
    model = build("llama")
    bank = t2.patch_model(model, form=request.param, rows=8)
    for name in "abc":
        bank.add(name, bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    x = torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        want = {n: model(x, experts=n).logits for n in ("a", "b", "c", None)}
    return model, bank, x, want


def answer(model, x):
    with torch.no_grad():
        return model(x).logits


def test_coroutines_keep_their_own_experts(world):
    model, bank, x, want = world

    async def ask(name):
        right = []
        with bank.use(name):
            for _ in range(3):
                await asyncio.sleep(0)
                right.append(torch.equal(answer(model, x), want[name]))
        await asyncio.sleep(0)
        return [*right, torch.equal(answer(model, x), want[None])]

    async def everyone():
        return await asyncio.gather(*[ask(n) for n in ("a", "b", None, "c", "a")])

    assert all(all(r) for r in asyncio.run(everyone()))


def test_what_a_coroutine_starts_inside_a_scope_belongs_to_it(world):
    model, bank, x, want = world

    async def main():
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        seen = {}
        with bank.use("a"):
            task = asyncio.create_task(asyncio.to_thread(answer, model, x))
            loop.call_soon(lambda: (seen.update(callback=answer(model, x)), called.set()))
            with bank.use("b"):
                seen["nested"] = answer(model, x)
            await called.wait()
        seen["task"] = await task
        seen["after"] = answer(model, x)
        return seen

    seen = asyncio.run(main())
    for place, name in {"callback": "a", "nested": "b", "task": "a", "after": None}.items():
        assert torch.equal(seen[place], want[name]), place


def in_thread(work):
    """The result of `work` in a thread, or the exception that it raised."""
    results = queue.SimpleQueue()

    def run():
        try:
            results.put(work())
        except Exception as e:
            results.put(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results.get()


def test_a_thread_that_says_nothing_is_refused_while_a_scope_is_open(world):
    model, bank, x, want = world
    with ThreadPoolExecutor(1) as warm:
        assert torch.equal(warm.submit(answer, model, x).result(), want[None])
        with bank.use("a"):
            for work in (lambda: answer(model, x), lambda: model.generate(x, max_new_tokens=2)):
                assert isinstance(in_thread(work), AmbiguousScopeError)
                with pytest.raises(AmbiguousScopeError, match=r"bank.use\('a'\)"):
                    warm.submit(work).result()
            # A thread that says what it wants has it.
            with torch.no_grad():
                assert torch.equal(in_thread(lambda: model(x, experts="b").logits.detach()), want["b"])
                assert torch.equal(in_thread(lambda: model(x, experts=None).logits.detach()), want[None])
            with bank.use("c"):
                assert torch.equal(answer(model, x), want["c"])
            assert torch.equal(answer(model, x), want["a"])
        assert torch.equal(warm.submit(answer, model, x).result(), want[None])


def test_a_call_with_experts_is_no_scope_for_other_threads(world):
    model, _, x, want = world
    inside, go_on = threading.Event(), threading.Event()

    class Stop:
        def put(self, value):
            inside.set()
            assert go_on.wait(60)

        def end(self):
            pass

    thread = threading.Thread(
        target=model.generate, args=(x[:1],), kwargs={"experts": "a", "max_new_tokens": 2, "streamer": Stop()}
    )
    thread.start()
    assert inside.wait(60)
    got = answer(model, x)
    go_on.set()
    thread.join()
    assert torch.equal(got, want[None])


class Words:
    """What TextIteratorStreamer needs of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


def streamed(target, x, **kwargs):
    streamer = TextIteratorStreamer(Words(), timeout=60)
    thread = threading.Thread(
        target=target, args=(x,), kwargs={"max_new_tokens": 6, "do_sample": False, "streamer": streamer, **kwargs}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def test_generate_in_a_thread_with_a_streamer(world):
    model, bank, x, _ = world
    x = x[:1]
    want = {n: streamed(model.generate, x, experts=n) for n in ("a", "b", None)}
    assert len(set(want.values())) == 3
    with bank.use("a"):
        assert streamed(model.generate, x) == want["a"]
        assert streamed(model.generate, x, experts="b") == want["b"]
        assert streamed(model.generate, x, experts=None) == want[None]
    assert streamed(model.generate, x) == want[None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_refused_generate_ends_its_streamer(world):
    model, bank, x, _ = world
    with bank.use("a"):
        assert streamed(lambda *args, **kwargs: model.generate(*args, **kwargs), x[:1]) == ""


def test_generators_cannot_leak_their_scope(world):
    model, bank, x, want = world

    def steps(name):
        with bank.use(name):
            while True:
                yield answer(model, x)

    one = steps("a")
    for _ in range(2):
        assert torch.equal(next(one), want["a"])
    with pytest.raises(AmbiguousScopeError, match="generator"):
        answer(model, x)  # between two steps
    two = steps("b")
    assert torch.equal(next(two), want["b"])
    with pytest.raises(AmbiguousScopeError, match="generator"):
        next(one)  # its own scope is not the innermost one any more
    two.close()
    assert torch.equal(answer(model, x), want[None])


def test_context_managers_made_of_generators(world):
    model, bank, x, want = world

    @contextlib.contextmanager
    def mine(name):
        with bank.use(name):
            yield

    with mine("a"), contextlib.ExitStack() as stack:
        assert torch.equal(answer(model, x), want["a"])
        stack.enter_context(bank.use("b"))
        assert torch.equal(answer(model, x), want["b"])
    assert torch.equal(answer(model, x), want[None])


class Entered:
    """A context manager of one's own around a scope."""

    def __init__(self, scope):
        self.scope = scope

    def __enter__(self):
        return self.scope.__enter__()

    def __exit__(self, *error):
        return self.scope.__exit__(*error)


@contextlib.contextmanager
def function_of(scope):
    with scope:
        yield


@pytest.mark.parametrize("how", [lambda scope: scope, Entered, function_of])
def test_a_scope_that_is_opened_for_a_generator_cannot_leak_either(world, how):
    model, bank, x, want = world

    def enter(stack):
        stack.enter_context(how(bank.use("a")))

    def steps():
        with contextlib.ExitStack() as stack:
            enter(stack)
            while True:
                yield answer(model, x)

    one = steps()
    assert torch.equal(next(one), want["a"])
    with pytest.raises(AmbiguousScopeError, match="generator"):
        answer(model, x)
    assert torch.equal(next(one), want["a"])
    one.close()
    assert torch.equal(answer(model, x), want[None])


def test_a_scope_is_entered_while_it_is_open(world):
    model, bank, x, want = world
    scope = bank.use("a")
    for _ in range(2):
        with scope, bank.use("b"), scope:
            assert torch.equal(answer(model, x), want["a"])
        assert torch.equal(answer(model, x), want[None])
    with scope:
        with scope:
            pass
        assert torch.equal(answer(model, x), want["a"])

    async def ask(other):
        with scope:
            await asyncio.sleep(0)
            with bank.use(other):
                await asyncio.sleep(0)
                one = torch.equal(answer(model, x), want[other])
            return one and torch.equal(answer(model, x), want["a"])

    async def everyone():
        return await asyncio.gather(*[ask(n) for n in "bcb"])

    assert all(asyncio.run(everyone()))
    assert torch.equal(answer(model, x), want[None])


def test_a_scope_that_another_thread_closes(world):
    model, bank, x, want = world
    scope = bank.use("a")
    with bank.use("b"):
        scope.__enter__()
        assert isinstance(in_thread(lambda: scope.__exit__(None, None, None)), AmbiguousScopeError)
        assert torch.equal(answer(model, x), want["b"])
        with pytest.raises(AmbiguousScopeError):
            scope.__exit__(None, None, None)
    assert torch.equal(answer(model, x), want[None])


def test_scopes_that_end_out_of_order(world):
    model, bank, x, want = world
    a, b = bank.use("a"), bank.use("b")
    a.__enter__()
    b.__enter__()
    with pytest.raises(AmbiguousScopeError, match="reverse order"):
        a.__exit__(None, None, None)
    assert torch.equal(answer(model, x), want["b"])
    b.__exit__(None, None, None)
    assert torch.equal(answer(model, x), want[None])


def test_a_default_that_every_thread_sees(world):
    model, bank, x, want = world
    bank.default = "a"
    assert bank.default == "a"
    assert torch.equal(answer(model, x), want["a"])
    assert torch.equal(in_thread(lambda: answer(model, x)), want["a"])
    assert torch.equal(answer(copy.deepcopy(model), x), want["a"])
    assert torch.equal(answer(pickle.loads(pickle.dumps(model)), x), want["a"])
    with torch.no_grad():
        assert torch.equal(model(x, experts=None).logits, want[None])
        assert torch.equal(model(x, experts=["b", None]).logits[0], model(x, experts="b").logits[0])
    with bank.use(None):
        assert torch.equal(answer(model, x), want[None])
    bank.default = {"a": 0.5, "b": 0.5}
    with torch.no_grad():
        assert torch.equal(answer(model, x), model(x, experts={"a": 0.5, "b": 0.5}).logits)
    bank.default = None
    assert torch.equal(answer(model, x), want[None])
    with pytest.raises(TypeError, match="one name"):
        bank.default = ["a", "b"]
    with pytest.raises(KeyError):
        bank.default = "nobody"


def test_two_models_have_scopes_of_their_own(world):
    model, bank, x, want = world
    other = copy.deepcopy(model)
    with bank.use("a"), other.t2_bank.use("b"):
        assert torch.equal(answer(model, x), want["a"])
        assert torch.equal(answer(other, x), want["b"])
    with bank.use("a"):
        assert torch.equal(answer(other, x), want[None])


def test_a_compiled_model_sees_scopes_or_refuses(world):
    model, bank, x, want = world
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")

    def ask(**kwargs):
        with torch.no_grad():
            return compiled(x, use_cache=False, **kwargs).logits

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ask(), want[None], **close)
    for name in ("a", "b"):
        with bank.use(name):
            torch.testing.assert_close(ask(), want[name], **close)

    async def inside(model):
        with bank.use("a"), torch.no_grad():
            return model(x, use_cache=False).logits

    # Tracing stops there, and the forward runs as it is; a model that must be one graph refuses.
    torch.testing.assert_close(asyncio.run(inside(compiled)), want["a"], **close)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="asyncio"):
        asyncio.run(inside(whole))
    torch._dynamo.reset()
