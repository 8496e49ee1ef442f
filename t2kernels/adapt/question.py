"""`Question`: how a model is asked what a prompt is about, and which expert each answer stands for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from t2kernels.tasks.base import Task, whole

ASK = (
    "Sort a task into a category. The categories are: {categories}. Take {other} if none of them fits.\n"
    "Answer with the name of the category and nothing else.\n\nTask:\n{{prompt}}\n\nCategory:"
)


@dataclass(frozen=True)
class Question:
    """template: the text of the question, {prompt} where the prompt goes; labels: {answer as the model writes it: expert, or None for the base}
    strip: an ending that is taken off a prompt first; chat: whether the question is asked as a chat message

    Raises ValueError: a template without {prompt}, fewer than two labels, an empty label or one that begins another.
    """

    template: str
    labels: Mapping[str, str | None]
    strip: str = ""
    chat: bool = False

    def __post_init__(self):
        if "{prompt}" not in self.template:
            raise ValueError(f"the question {self.template[:60]!r} has no {{prompt}} in it")
        if len(self.labels) < 2 or not all(isinstance(k, str) and k.strip() for k in self.labels):
            raise ValueError(
                f"labels={dict(self.labels)!r}; wanted at least two answers that are not empty, each with its expert or None"
            )
        for a, b in pairwise(sorted(self.labels)):
            if b.startswith(a):
                raise ValueError(
                    f"the label {a!r} begins the label {b!r}: the likelihood of the first includes the second; rename one"
                )

    @classmethod
    def about(
        cls, categories: Mapping[str, str | None] | Sequence[str], other: str | None = "other", chat: bool = False
    ) -> Question:
        """The question in English for any instruction-tuned model.

        categories: {category: expert}, or experts that are called what they are for; other: the answer that keeps the base model, or None
        chat: whether it is put into the model's chat template, as a user's message
        """
        named = dict(categories) if isinstance(categories, Mapping) else {c: c for c in categories}
        listed = ", ".join([*named, *([other] if other else [])])
        text = ASK if other else ASK.replace(" Take {other} if none of them fits.", "")
        space = "" if chat else " "
        labels = {space + c: e for c, e in {**named, **({other: None} if other else {})}.items()}
        return cls(text.format(categories=listed, other=other), labels, chat=chat)

    @classmethod
    def tiny(cls, experts: Sequence[str] = ("math", "code", "reason")) -> Question:
        """The built-in model's own: kind(47+8+6)? -> =m, the first letter of a family. Raises ValueError for two with one first letter."""
        if len({e[:1] for e in experts}) < len(experts):
            raise ValueError(
                f"the built-in model names a family by its first letter, and two of {', '.join(experts)} share one"
            )
        return cls("kind({prompt})?", {f"={e[0]}": e for e in experts}, strip="?")

    def ask(self, prompt):
        """The question about a prompt; about the last message of a chat."""
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        text = self.template.replace("{prompt}", text.removesuffix(self.strip))
        return [{"role": "user", "content": text}] if self.chat or not isinstance(prompt, str) else text

    def parse(self, completion) -> str | None:
        """The label in a completion: the only one that it holds, or None."""
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        found = [label for label in self.labels if label.strip().lower() in text.lower()]
        return found[0] if len(found) == 1 else None

    def record(self) -> dict:
        """As JSON, for the manifest of an expert that was trained on it."""
        return {"template": self.template, "labels": dict(self.labels), "strip": self.strip, "chat": self.chat}


def labelled(tasks: Mapping[str, Task], question: Question, name: str = "classify") -> Task:
    """The task of naming a prompt's category, from the prompts of any tasks: what a classification expert is trained on.

    tasks: {label of the question: Task}; the answer is the label. Prompts keep the split of their own task; tasks take turns at random.
    Raises ValueError for a label that the question lacks, one without a task (None excepted: the abstaining answer), or fewer than two.
    """
    unknown = [label for label in tasks if label not in question.labels]
    if unknown:
        raise ValueError(f"the question has no label {unknown[0]!r}; it has {', '.join(map(repr, question.labels))}")
    without = [label for label, expert in question.labels.items() if expert is not None and label not in tasks]
    if without:
        raise ValueError(
            f"label {without[0]!r} has no task to take prompts from; wanted {{label: task}} for every label that names an expert"
        )
    if len(tasks) < 2:
        raise ValueError("a classification task needs prompts of at least two tasks")

    def rows(split: str, n: int | None, seed: int) -> list[dict]:
        each = None if n is None else -(-n // len(tasks))
        drawn = [(label, row) for label, task in tasks.items() for row in _some(task, split, each, seed)]
        random.Random(f"{name}/{split}/{seed}").shuffle(drawn)
        return [{"prompt": question.ask(row["prompt"]), "answer": label.strip()} for label, row in drawn[:n]]

    longest = max(map(len, question.labels))
    return Task(
        name, rows, extract=lambda text: (question.parse(text) or whole(text)).strip(), max_new_tokens=longest + 2
    )


def _some(task: Task, split: str, n: int | None, seed: int) -> list[dict]:
    try:
        return task.split(split, n, seed)
    except ValueError:
        return task.split(split, None, seed)  # fewer than n: all of them
