"""Two thousand answers from four threads while experts come, change and go: each is that of its own expert.

Everything that a program may do with a patched model happens at once: scopes in coroutines, experts in the call,
mixtures, mixed batches, ids, streams, experts that are added, replaced and removed, checkpoints of the bank, and
training with blocks that are computed again in the backward pass. There are more experts than rows. Every answer is
compared with what the same expert answered alone, before any of this began.
"""

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import TextIteratorStreamer

import t2kernels as t2
from t2kernels.layers.routing.scopes import AmbiguousScopeError
from tests.helpers.families import build

THREADS, COROUTINES, ROUNDS = 4, 20, 20
AT_ONCE = 5  # coroutines of a thread that hold rows at the same time, each at most 4
ROWS = 1 + THREADS * AT_ONCE * 4 + 4  # base; requests; one that is held open; training; some to take turns
EXPERTS, MIXTURES = 48, 48
PROMPTS, NEW = 6, 5
CLOSE = 1e-4  # batches of other sizes round differently; experts differ by more than a thousand times that


class Words:
    """What TextIteratorStreamer needs of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


class World:
    """A patched model, what each expert answers alone, and a count of what was asked."""

    def __init__(self, form):
        torch.manual_seed(0)
        self.model = build("llama")
        self.bank = t2.patch_model(self.model, form=form, rows=ROWS)
        apply_activation_checkpointing(
            self.model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda m: isinstance(m, type(self.model.model.layers[0])),
        )
        self.model.eval()
        self.x = torch.randint(3, 60, (PROMPTS, 6))
        self.names = [f"e{i}" for i in range(EXPERTS)]
        for name in self.names:
            self.bank.add(name, self.random_expert())
        r = random.Random(0)
        self.mixtures = [{n: r.uniform(0.2, 0.8) for n in r.sample(self.names, 2)} for _ in range(MIXTURES)]
        self.routes = [None, *self.names, *self.mixtures]
        self.alone = {str(route): self.ask(route) for route in self.routes}
        self.texts = {name: [self.text(name, i) for i in range(PROMPTS)] for name in (None, *self.names)}
        self.kept = {name: self.bank[name] for name in self.names}
        self.newcomers = [self.random_expert() for _ in range(8)]
        for i, expert in enumerate(self.newcomers):
            self.bank.add("newcomer", expert)
            self.alone[f"newcomer {i}"] = self.ask("newcomer")
            self.bank.remove("newcomer")
        answers = torch.stack([v.flatten() for v in self.alone.values()])
        apart = torch.cdist(answers, answers, p=float("inf")).fill_diagonal_(1.0)
        assert apart.min() > 1000 * CLOSE, "the experts must be told apart"
        self.student = self.random_expert()
        self.gradients = self.train("student")
        self.answers, self.wrong, self.lock = Counter(), [], threading.Lock()

    def random_expert(self):
        return self.bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in self.bank.matrices.items()})

    @torch.no_grad()
    def ask(self, route, rows=slice(None)):
        return self.model(self.x[rows], experts=route).logits

    @torch.no_grad()
    def say_nothing(self, rows):
        return self.model(self.x[rows]).logits

    def text(self, name, i):
        out = self.model.generate(self.x[i : i + 1], experts=name, max_new_tokens=NEW, do_sample=False)
        return Words().decode(out[0, -NEW:])

    def train(self, name):
        """Gradients of an expert in training whose blocks are computed again, when its scope is closed."""
        parameters = self.bank.start_training(name, init=self.student)
        with self.bank.use(name):
            loss = self.model(self.x).logits.square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in parameters]
        assert self.bank.stop_training(name) == self.bank[name]
        self.bank.remove(name)
        return gradients

    def check(self, kind, right, what):
        with self.lock:
            self.answers[kind] += 1
            if not right:
                self.wrong.append((kind, str(what)))

    def check_logits(self, kind, got, route, rows=slice(None)):
        want = self.alone[str(route)][rows]
        self.check(kind, got.shape == want.shape and bool((got - want).abs().max() < CLOSE), route)


async def ask_in_a_scope(world, r, rows):
    route = r.choice(world.routes)
    with world.bank.use(route):
        await asyncio.sleep(0)
        world.check_logits("scope", world.say_nothing(rows), route, rows)
        await asyncio.sleep(0)
        inner = r.choice(world.routes)
        with world.bank.use(inner):
            await asyncio.sleep(0)
            world.check_logits("inner scope", world.say_nothing(rows), inner, rows)
        world.check_logits("after an inner scope", world.say_nothing(rows), route, rows)


async def ask_in_the_call(world, r, rows):
    route = r.choice(world.routes)
    world.check_logits("call", world.ask(route, rows), route, rows)


async def ask_for_none(world, r, rows):
    world.check_logits("None", world.ask(None, rows), None, rows)


async def ask_a_mixed_batch(world, r, rows):
    routes = [r.choice(world.routes) for _ in range(4)]
    got = world.ask(routes, slice(0, 4))
    for i, route in enumerate(routes):
        world.check_logits("mixed batch", got[i : i + 1], route, slice(i, i + 1))


async def ask_by_ids(world, r, rows):
    route = r.choice(world.routes)
    ids = world.bank.ids(route)
    await asyncio.sleep(0)
    with torch.no_grad():
        got = world.model(world.x[rows], expert_ids=ids).logits
    world.check_logits("ids", got, route, rows)


async def ask_in_another_thread(world, r, rows):
    route = r.choice(world.routes)
    with world.bank.use(route):
        got = await asyncio.to_thread(world.say_nothing, rows)
    world.check_logits("to_thread", got, route, rows)


async def say_nothing(world, r, rows):
    """Another thread has a scope open, so it cannot be told what is meant."""
    try:
        world.say_nothing(rows)
        world.check("nothing said", False, "no error")
    except AmbiguousScopeError:
        world.check("nothing said", True, None)


async def stream(world, r, rows):
    name, i = r.choice([None, *world.names]), rows.start
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    arguments = {"experts": name, "max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=world.model.generate, args=(world.x[i : i + 1],), kwargs=arguments)
    thread.start()
    text = ""
    while (piece := await asyncio.to_thread(next, streamer, None)) is not None:
        text += piece
    thread.join()
    world.check("stream", text == world.texts[name][i], name)


async def come_change_and_go(world, r, rows):
    name, (first, second) = f"guest-{r.randrange(10**9)}", r.sample(range(len(world.newcomers)), 2)
    world.bank.add(name, world.newcomers[first])
    await asyncio.sleep(0)
    world.check_logits("added", world.ask(name, rows), f"newcomer {first}", rows)
    ids = world.bank.ids(name)
    world.bank.add(name, world.newcomers[second], replace=True)
    await asyncio.sleep(0)
    world.check_logits("replaced", world.ask(name, rows), f"newcomer {second}", rows)
    with torch.no_grad():
        old = world.model(world.x[rows], expert_ids=ids).logits
    world.check_logits("before it was replaced", old, f"newcomer {first}", rows)
    with world.bank.use(name):
        world.bank.remove(name)
        await asyncio.sleep(0)
        world.check_logits("removed while in use", world.say_nothing(rows), f"newcomer {second}", rows)
    try:
        world.ask(name, rows)
        world.check("removed", False, name)
    except KeyError:
        world.check("removed", True, name)


WAYS = {
    ask_in_a_scope: 6,
    ask_in_the_call: 4,
    ask_for_none: 2,
    ask_a_mixed_batch: 3,
    ask_by_ids: 3,
    ask_in_another_thread: 1,
    say_nothing: 2,
    stream: 1,
    come_change_and_go: 1,
}


async def requests(world, thread):
    """Twenty coroutines, of which a few run at once."""
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(number):
        r = random.Random(1000 * thread + number)
        for _ in range(ROUNDS):
            (way,) = r.choices(list(WAYS), WAYS.values())
            i = r.randrange(PROMPTS)
            async with at_once:
                await way(world, r, slice(i, i + 1))

    await asyncio.gather(*[one(number) for number in range(COROUTINES)])


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_two_thousand_answers(form, tmp_path):
    world = World(form)
    held, done = threading.Event(), threading.Event()

    def hold_a_scope():
        with world.bank.use("e0"):
            held.set()
            done.wait()
            world.check_logits("held", world.say_nothing(slice(0, 1)), "e0", slice(0, 1))

    def save_and_train():
        for count in range(1000):
            folder = tmp_path / str(count % 2)
            saved = {p.stem: p for p in world.bank.save(folder)}
            for name in random.Random(count).sample(world.names, 4):
                world.check("saved", t2.Expert.load(saved[name]) == world.kept[name], name)
            gradients = world.train("student")
            right = all(
                torch.allclose(g, w, rtol=1e-4, atol=1e-7) and w.abs().max() > 0
                for g, w in zip(gradients, world.gradients, strict=True)
            )
            world.check("gradient", right, count)
            if done.is_set():
                return

    with ThreadPoolExecutor(THREADS + 2) as pool:
        others = [pool.submit(hold_a_scope), pool.submit(save_and_train)]
        try:
            assert held.wait(60)
            for job in [pool.submit(asyncio.run, requests(world, thread)) for thread in range(THREADS)]:
                job.result(timeout=300)
        finally:
            done.set()
        for job in others:
            job.result(timeout=300)

    assert world.wrong == []
    assert sum(world.answers.values()) >= 2000
    assert min(world.answers.values()) >= 1
    assert {"scope", "mixed batch", "stream", "removed", "nothing said", "saved", "gradient"} <= set(world.answers)
    assert world.bank.evictions > 0, "there must be more experts than rows"
    assert set(world.bank.names) == set(world.names)
    for route in world.routes:
        world.check_logits("afterwards", world.ask(route), route)
    assert world.wrong == []
