"""GSM8K (arXiv 2110.14168): grade-school word problems. The answer is a number."""

import re

from t2kernels import InputError
from t2kernels.tasks.base import Task
from t2kernels.tasks.extract import before_next, boxed, canonical, numbers, written
from t2kernels.tasks.records import Row, text

from .source import Dataset, Rows, Source

STOP = ("\nQuestion:",)


def problem(raw: Row) -> Row:
    """The problem in a row of openai/gsm8k: question, answer (ends in `#### number`). Raises ValueError."""
    question, solution = text(raw, "question"), text(raw, "answer")
    worked, mark, final = solution.rpartition("####")
    answer = canonical(final)
    if not mark or not answer:
        raise InputError(f"'answer' ends in {solution[-40:]!r}; expected '#### ' and a number")
    ask = "Think step by step. End with a line that holds nothing but #### and the number."
    target = f"{re.sub('<<.*?>>', '', worked)}#### {answer}"
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "messages": [{"role": "user", "content": f"{question}\n\n{ask}"}],
        "answer": answer,
        "target": f" {target}",
        "chat_target": target,
    }


def extract(completion: str) -> str:
    """The number that a completion gives as its answer; "" if it has none. Text after the next question is ignored.

    The first of these that holds a number: the text after the last `####`, the last \\boxed{}, the text after the last
    "answer is", the last number.
    """
    completion = before_next(completion)
    marked = re.findall(r"####[ \t]*(?=[^\w\n]{0,6}\d)(.*)", completion)
    if marked:
        return canonical(marked[-1])
    inside = boxed(completion)
    if inside and canonical(inside):
        return canonical(inside)
    for rest in reversed(re.split(r"(?i)answer(?:\s+is\b|\s*[:=])", completion)[1:]):
        if found := canonical(rest.split("\n")[0]):
            return found
    found = numbers(completion)
    return written(found[-1]) if found else ""


def _make(name: str, rows: Rows, checker: str) -> Task:
    return Task(name, rows, extract=extract, max_new_tokens=512, stop=STOP, checker="equality of numbers")


SOURCE = Source("openai/gsm8k", problem, ("main",))
TASKS: dict[str, Dataset] = {"gsm8k": Dataset(SOURCE, _make)}
