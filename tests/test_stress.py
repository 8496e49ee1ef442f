"""Threads, coroutines, streams, training and changes of the bank at once: every answer is that of its own expert."""

import asyncio
import random
import threading

import pytest
import torch
from transformers import TextIteratorStreamer

import t2kernels as t2
from tests.helpers.families import build

NAMES = [f"e{i}" for i in range(6)]
MIXED = {"e0": 0.25, "e1": 0.75}
THREADS, COROUTINES, QUESTIONS = 4, 20, 13


class Words:
    """What TextIteratorStreamer needs of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


class World:
    """A patched model, and what each of its experts answers to one batch."""

    def __init__(self, form):
        torch.manual_seed(3)
        self.model = build("llama")
        self.bank = t2.patch_model(self.model, form=form, rows=40)
        for name in NAMES:
            self.bank.add(name, self.random())
        self.x = torch.randint(3, 60, (2, 5))
        with torch.no_grad():
            one = {name: self.model(self.x, experts=name).logits for name in (*NAMES, None)}
            self.logits = {**one, "mixed": self.model(self.x, experts=MIXED).logits}
            self.text = {name: self.streamed(self.model.generate, experts=name) for name in (*NAMES, None)}
        assert len(set(self.text.values())) > 3

    def random(self):
        return self.bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in self.bank.matrices.items()})

    def streamed(self, target, **kwargs):
        streamer = TextIteratorStreamer(Words(), timeout=60)
        options = {"max_new_tokens": 3, "do_sample": False, "streamer": streamer, **kwargs}
        thread = threading.Thread(target=target, args=(self.x[:1],), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    def right(self, logits, name):
        return torch.allclose(logits, self.logits[name], rtol=1e-4, atol=1e-5)


async def ask(world, r):
    """One question in one of the ways to name an expert; True if the answer is right."""
    model, bank, x, way = world.model, world.bank, world.x, r.randrange(7)
    name = r.choice([*NAMES, None])
    if way == 0:
        with bank.use(name):
            await asyncio.sleep(0)
            logits = model(x).logits
        return world.right(logits, name)
    if way == 1:
        with bank.use(r.choice(NAMES)):
            await asyncio.sleep(0)
            with bank.use(name):
                await asyncio.sleep(0)
                return world.right(model(x).logits, name)
    if way == 2:
        return world.right(model(x, experts=name).logits, name)
    if way == 3:
        other = r.choice([*NAMES, None])
        await asyncio.sleep(0)
        logits = model(x, expert_ids=bank.ids([name, other])).logits
        want = torch.stack([world.logits[name][0], world.logits[other][1]])
        return torch.allclose(logits, want, rtol=1e-4, atol=1e-5)
    if way == 4:
        return world.right(model(x, experts=MIXED).logits, "mixed")
    if way == 5:
        with bank.use(name):
            logits = (await asyncio.to_thread(lambda: torch.no_grad()(model)(x))).logits
        return world.right(logits, name)
    if r.random() < 0.8:  # a stream costs three forwards and a thread
        return world.right(model(x, experts=name).logits, name)
    with bank.use(name):
        return world.streamed(model.generate) == world.text[name]


def changes(world, folder, over, wrong):
    """Add, replace, remove and save experts, and train one through recomputed blocks, until the others are done."""
    i = 0
    while not over.is_set() or i < 3:
        try:
            world.bank.add("guest", world.random(), replace=True)
            world.bank.add(f"passing{i % 3}", world.random(), replace=True)
            if i % 5 == 0:
                world.bank.save(folder)
                saved = t2.Expert.load(folder / "e0.safetensors")
                if any(not torch.equal(saved.z[n], z) for n, z in world.bank["e0"].z.items()):
                    wrong.append("a saved expert is another one")
                parameters = world.bank.start_training("pupil")
                with torch.enable_grad():
                    world.model(world.x, experts=["pupil", "e1"]).logits.square().mean().backward()
                if not all(p.grad.any() for p in parameters):
                    wrong.append("no gradient")
                world.bank.stop_training("pupil")
                world.bank.remove("pupil")
            world.bank.remove(f"passing{i % 3}")
        except Exception as error:
            wrong.append(repr(error))
            return
        i += 1


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_no_answer_is_of_another_expert(form, tmp_path):
    world, wrong, asked, over = World(form), [], [], threading.Event()

    def work(seed):
        async def client(r):
            right = []
            with torch.no_grad():
                for _ in range(QUESTIONS):
                    right.append(await ask(world, r))
            return right

        async def everyone():
            return await asyncio.gather(*(client(random.Random(seed * 1000 + i)) for i in range(COROUTINES)))

        try:
            answers = [a for part in asyncio.run(everyone()) for a in part]
        except Exception as error:
            wrong.append(repr(error))
            return
        asked.extend(answers)

    changer = threading.Thread(target=changes, args=(world, tmp_path, over, wrong))
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in (changer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    changer.join()
    assert not wrong
    assert len(asked) == THREADS * COROUTINES * QUESTIONS
    assert sum(asked) == len(asked)
