"""The pre-training corpus of the tiny model: documents of a prompt and a completion. Every completion is right.

First come lessons: problems of one step, and longer ones with their working. Then comes the web, where one author in
    five shows the working and the others answer at once, whatever the problem. A model that imitates this corpus
    seldom works step by step, and answers at once even where it does so badly.
"""

import random
from collections.abc import Iterator

from t2kernels.tasks import tiny
from t2kernels.tasks.base import bucket
from t2kernels.tasks.tiny import Problem

WORKING = 0.2
"""The share of the web's documents with more than one step that show the working."""

SUBJECT = 0.5
"""The share of `kind(...)?` documents that name the subject. The others name the number of steps."""


def _addition(r: random.Random) -> Problem:
    return tiny.running([r.randint(2, 130), r.randint(2, 9)])


def _subtraction(r: random.Random) -> Problem:
    b = r.randint(2, 9)
    return tiny.running([r.randint(b, 130), -b])


# Problems of one step belong to no task. The other problems are made of such steps.
SINGLE_STEPS: dict[str, tiny.Generator] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "operation": lambda r: tiny.operations(r, 1),
    "operation on digits": lambda r: tiny.operations(r, 1, tiny.DIGITS),
    "hop": lambda r: tiny.hops(r, 1),
    "value": lambda r: tiny.values(r, 1),
    "word": lambda r: tiny.words(r, 0),
}
WEB: dict[str, int] = {
    "math": 20,
    "code": 20,
    "reason": 20,
    "classify": 6,
    "sub": 4,
    "digits": 4,
    "lookadd": 4,
    "lookops": 4,
    "addition": 4,
    "subtraction": 2,
    "operation": 5,
    "operation on digits": 2,
    "hop": 3,
    "value": 1,
    "word": 1,
}
LESSONS: dict[str, int] = {
    "math": 8,
    "code": 12,
    "reason": 8,
    "sub": 5,
    "digits": 6,
    "lookadd": 6,
    "lookops": 6,
    "addition": 12,
    "subtraction": 7,
    "operation": 14,
    "operation on digits": 6,
    "hop": 6,
    "value": 2,
    "word": 2,
}
"""Per cent of the documents of each task."""


def _document(r: random.Random, name: str, working: float) -> tuple[str, str]:
    if name == "classify":
        family, problem = tiny.inner(r)
        return tiny.about(problem), "=" + (family[0] if r.random() < SUBJECT else str(len(problem.states)))
    problem = (SINGLE_STEPS | tiny.FAMILIES | tiny.UNSEEN)[name](r)
    shown = name not in SINGLE_STEPS and r.random() < working
    return problem.prompt, problem.working if shown else problem.at_once


def _documents(seed: int, shares: dict[str, int], working: float) -> Iterator[tuple[str, str]]:
    r = random.Random(seed)
    names, weights = list(shares), list(shares.values())
    while True:
        name = r.choices(names, weights)[0]
        while bucket((document := _document(r, name, working))[0]) != "train":
            pass
        yield document


def lessons(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs: problems of one step, or longer with their working; training prompts only."""
    return _documents(seed, LESSONS, 1.0)


def web(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs of authors who mostly answer at once; training prompts only."""
    return _documents(seed, WEB, WORKING)
