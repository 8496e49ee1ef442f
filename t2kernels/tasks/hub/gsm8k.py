"""GSM8K (arXiv 2110.14168): grade-school word problems. The answer is a number."""

import re

from t2kernels import InputError
from t2kernels.tasks.base import Task
from t2kernels.tasks.extract import canonical
from t2kernels.tasks.extract import final_number as extract
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


def formed(completion: str, row: Row) -> bool:
    """Whether a completion has a number."""
    return bool(extract(completion))


def _make(name: str, rows: Rows, checker: str) -> Task:
    return Task(name, rows, extract=extract, max_new_tokens=512, stop=STOP, checker="equality of numbers", form=formed)


SOURCE = Source("openai/gsm8k", problem, ("main",))
TASKS: dict[str, Dataset] = {"gsm8k": Dataset(SOURCE, _make)}
