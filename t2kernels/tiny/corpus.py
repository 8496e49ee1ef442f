"""What the tiny model reads in pre-training: documents of a prompt and a completion, every completion right.

Most authors answer at once, one in five shows the working; which of the two does not depend on the problem. So a model that imitates the
corpus answers at once where it can not yet, and works step by step only now and then.
"""

import random
from collections.abc import Iterator

from t2kernels.tasks import tiny
from t2kernels.tasks.base import bucket
from t2kernels.tasks.tiny import Problem

WORKING = 0.2
"""The share of documents that show the working."""

SUBJECT = 0.5
"""The share of `kind(...)?` documents that name the subject; the others name the number of steps: the prompt is ambiguous."""


def _addition(r: random.Random) -> Problem:
    return tiny.running([r.choice((r.randint(10, 99), r.randint(100, 297))), r.randint(10, 99)])


def _subtraction(r: random.Random) -> Problem:
    b = r.randint(10, 99)
    return tiny.running([r.choice((r.randint(b, 99), r.randint(100, 198))), -b])


# Problems of one step are nobody's task: they are what the steps of the others are made of.
SINGLE_STEPS: dict[str, tiny.Generator] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "operation": lambda r: tiny.operations(r, 1),
    "hop": lambda r: tiny.hops(r, 1),
}
SHARES = {
    "math": 18,
    "code": 18,
    "reason": 18,
    "classify": 4,
    "sub": 4,
    "digits": 3,
    "lookadd": 4,
    "lookops": 4,
    "addition": 11,
    "subtraction": 4,
    "operation": 9,
    "hop": 3,
}
"""Per cent of the documents."""


def _document(r: random.Random, name: str) -> tuple[str, str]:
    if name == "classify":
        family, problem = tiny.inner(r)
        return tiny.about(problem), "=" + (family[0] if r.random() < SUBJECT else str(len(problem.states)))
    generator = SINGLE_STEPS.get(name) or (tiny.TRAINED | tiny.UNSEEN)[name]
    problem = generator(r)
    shown = name not in SINGLE_STEPS and r.random() < WORKING
    return problem.prompt, problem.working if shown else problem.at_once


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs; validation and test prompts never occur."""
    r = random.Random(seed)
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        name = r.choices(names, shares)[0]
        while bucket((document := _document(r, name))[0]) != "train":
            pass
        yield document
