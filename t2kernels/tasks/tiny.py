"""The tasks of the built-in tiny model: problems that are hard to answer at once and easy step by step.

A generator draws one problem: its prompt, the states on the way to the answer (the last state *is* the answer), and the
separator, a character that precedes each state where the states are written out. A completion is right if it ends in
the answer, with or without the states before it.

    task      prompt                    at once   with working
    math      47+8+6?                   =61       ,55,61                running totals of three to five numbers
    code      rsxt(gcafd)?              =cdfag    >dfacg>acdfg>gcdfa>cdfag  four operations, applied from left to right
    reason    ab,fj,cd,be,ci,ef;3a?     =f        :b:e:f                two to four links, followed from a letter
    classify  kind(47+8+6)?             =m                              the family of a prompt: m, c or r

Eight more tasks have no expert; they are for adaptation. Four of them (`ABSENT`) are not in the pre-training corpus
either.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from t2kernels import InputError

from .base import Task, bucket
from .records import Row

LETTERS = "abcdefghij"
DIGITS = "0123456789"
OPERATIONS = "rstxnu"


class Problem(NamedTuple):
    """One problem.

    prompt: the text that the model reads. states: the steps to the answer; the last one is the answer.
    separator: the character before each state in `working`.
    """

    prompt: str
    states: tuple[str, ...]
    separator: str

    @property
    def answer(self) -> str:
        """The last state."""
        return self.states[-1]

    @property
    def at_once(self) -> str:
        """The completion that gives the answer at once."""
        return "=" + self.answer

    @property
    def working(self) -> str:
        """The completion that writes every state."""
        return "".join(self.separator + state for state in self.states)


Generator = Callable[[random.Random], Problem]
"""Draws one problem of a task."""


def _totals(numbers: list[int]) -> tuple[str, ...]:
    return tuple(map(str, accumulate(numbers)))[1:]


def running(numbers: list[int]) -> Problem:
    """The sum of signed numbers, by running totals."""
    return Problem("".join(f"{n:+d}" for n in numbers).removeprefix("+") + "?", _totals(numbers), ",")


def _sum(r: random.Random, terms: int) -> Problem:
    return running([r.randint(10, 99)] + [r.randint(2, 9) for _ in range(terms - 1)])


def _difference(r: random.Random, terms: int) -> Problem:
    """Additions and at least one subtraction; no running total is negative."""
    while True:
        numbers = [r.randint(10, 99)] + [r.choice((-1, 1)) * r.randint(2, 9) for _ in range(terms - 1)]
        problem = running(numbers)
        if min(numbers) < 0 and not any(state.startswith("-") for state in problem.states):
            return problem


def _shift(letter: str) -> str:
    symbols = DIGITS if letter in DIGITS else LETTERS
    return symbols[(symbols.index(letter) + 1) % len(symbols)]


def apply(operation: str, text: str) -> str:
    """Apply one operation to a word.

    r: reverse. s: sort. t: move the first symbol to the end. x: swap the first and the last symbol.
    n: replace each symbol by the next one (a after j). u: replace the first symbol by the next one.
    Raises ValueError for another operation.
    """
    match operation:
        case "r":
            return text[::-1]
        case "s":
            return "".join(sorted(text))
        case "t":
            return text[1:] + text[0]
        case "x":
            return text[-1] + text[1:-1] + text[0]
        case "n":
            return "".join(map(_shift, text))
        case "u":
            return _shift(text[0]) + text[1:]
    raise InputError(f"operation {operation!r} is not one of {OPERATIONS}")


def _word(r: random.Random, symbols: str = LETTERS) -> str:
    return "".join(r.choice(symbols) for _ in range(r.randint(4, 5)))


def operations(r: random.Random, count: int, symbols: str = LETTERS) -> Problem:
    """`count` operations on a word, applied from left to right."""
    names, word = "".join(r.choice(OPERATIONS) for _ in range(count)), _word(r, symbols)
    states = [word]
    for name in names:
        states.append(apply(name, states[-1]))
    return Problem(f"{names}({word})?", tuple(states[1:]), ">")


def hops(r: random.Random, count: int) -> Problem:
    """Follow `count` links. Six links form two chains, the first of three to five; the start leaves enough links."""
    letters = r.sample(LETTERS, 8)
    long = max(count, r.choice((3, 4)))
    chain, other = letters[: long + 1], letters[long + 1 :]
    links = [a + b for part in (chain, other) for a, b in pairwise(part)]
    r.shuffle(links)
    start = r.randint(0, long - count)
    return Problem(f"{','.join(links)};{count}{chain[start]}?", tuple(chain[start + 1 : start + 1 + count]), ":")


def values(r: random.Random, count: int) -> Problem:
    """Letters stand for digits; add `count` of them: reading and arithmetic. The first state is the first digit."""
    keys, digits = r.sample(LETTERS, 4), [r.randint(2, 9) for _ in range(4)]
    picked = [r.randrange(4) for _ in range(count)]
    prompt = (
        ",".join(f"{k}{v}" for k, v in zip(keys, digits, strict=True)) + ";" + "+".join(keys[i] for i in picked) + "?"
    )
    return Problem(prompt, tuple(map(str, accumulate(digits[i] for i in picked))), ",")


def words(r: random.Random, count: int) -> Problem:
    """Digits stand for words; apply `count` operations to one word: reading and string work. It is the first state."""
    keys, listed = r.sample(DIGITS, 2), [_word(r), _word(r)]
    picked, names = r.randrange(2), "".join(r.choice(OPERATIONS) for _ in range(count))
    states = accumulate(names, lambda word, name: apply(name, word), initial=listed[picked])
    return Problem(f"{keys[0]}:{listed[0]},{keys[1]}:{listed[1]};{names}({keys[picked]})?", tuple(states), ">")


def _reversed_sum(r: random.Random) -> Problem:
    """The sum of three numbers, reversed: arithmetic, then a string operation."""
    total = _sum(r, 3)
    return Problem(f"r({total.prompt[:-1]})?", (*total.states, total.answer[::-1]), ",")


def inner(r: random.Random) -> tuple[str, Problem]:
    """A family and one of its problems, as the subject of a prompt of the task `classify`."""
    family = r.choice(list(FAMILIES))
    return family, FAMILIES[family](r)


def about(problem: Problem) -> str:
    """The prompt that asks what kind of problem this is."""
    return f"kind({problem.prompt[:-1]})?"


def _kind(r: random.Random) -> Problem:
    family, problem = inner(r)
    return Problem(about(problem), (family[0],), ",")


FAMILIES: dict[str, Generator] = {
    "math": lambda r: _sum(r, r.randint(3, 5)),
    "code": lambda r: operations(r, r.randint(2, 4)),
    "reason": lambda r: hops(r, r.randint(2, 4)),
}

# Tasks with an expert, then tasks without one. Fewer than four operations are too easy to answer at once.
TRAINED: dict[str, Generator] = FAMILIES | {"code": lambda r: operations(r, 4), "classify": _kind}
UNSEEN: dict[str, Generator] = {
    "sub": lambda r: _difference(r, r.randint(3, 4)),
    "digits": lambda r: operations(r, r.randint(2, 3), DIGITS),
    "lookadd": lambda r: values(r, 3),
    "lookops": lambda r: words(r, 2),
    "add6": lambda r: _sum(r, 6),
    "ops5": lambda r: operations(r, 5),
    "hop5": lambda r: hops(r, 5),
    "revadd": _reversed_sum,
}
ABSENT = ("add6", "ops5", "hop5", "revadd")
"""The unseen tasks that are not in the pre-training corpus."""

FROZEN: Path = Path(__file__).parent.parent / "tiny" / "eval"
"""The test splits, one jsonl file per task, drawn once by t2kernels/tiny/freeze.py. Duplicates are kept."""


def problems(task: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless i.i.d. problems of `task` whose prompt falls into `split`, the same ones for the same seed."""
    generator = (TRAINED | UNSEEN)[task]
    r = random.Random(f"{task}/{split}/{seed}")
    while True:
        problem = generator(r)
        if bucket(problem.prompt) == split:
            yield problem


def final(completion: str) -> str:
    """The last state in a completion: the text after its last separator or `=`, or all of it if it has none."""
    return re.split("[=,>:]", completion)[-1].strip()


def task(name: str) -> Task:
    """The task called `name`: training and validation problems are generated, test problems are the frozen ones."""

    def rows(split: str, n: int | None, seed: int) -> list[Row]:
        if split == "test":
            return [json.loads(line) for line in (FROZEN / f"{name}.jsonl").read_text().splitlines()[:n]]
        count = n or (20_000 if split == "train" else 500)
        return [{"prompt": p.prompt, "answer": p.answer} for p in islice(problems(name, split, seed), count)]

    return Task(name, rows, extract=final, max_new_tokens={"code": 26, "ops5": 32}.get(name, 22))
