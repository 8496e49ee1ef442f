"""`Question`: how a model is asked what a prompt is about, and the expert that each answer stands for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from t2kernels import InputError
from t2kernels.experts.names import CLASSIFIER
from t2kernels.rollout.chat import AnyPrompt, has_template, user_message
from t2kernels.tasks.base import Task, whole

ASK = (
    "Sort a task into a category. The categories are: {categories}. Take {other} if none of them fits.\n"
    "Answer with the name of the category and nothing else.\n\nTask:\n{{prompt}}\n\nCategory:"
)


@dataclass(frozen=True)
class Question:
    """A question about a prompt, with the expert that each answer stands for.

    template: the text of the question, {prompt} where the prompt goes
    labels: {answer as the model writes it: expert, or None for the base model}
    strip: an ending that is removed from a prompt first
    chat: True to ask as a chat message

    Raises ValueError: a template without {prompt}, fewer than two labels, an empty label or one that begins another.
    """

    template: str
    labels: Mapping[str, str | None]
    strip: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InputError(f"the question {self.template[:60]!r} has no {{prompt}} in it")
        if len(self.labels) < 2 or not all(isinstance(k, str) and k.strip() for k in self.labels):
            raise InputError(
                f"labels={dict(self.labels)!r}; wanted at least two answers that are not empty, each with its expert "
                "or None"
            )
        for a, b in pairwise(sorted(self.labels)):
            if b.startswith(a):
                raise InputError(
                    f"the label {a!r} begins the label {b!r}, so the likelihood of the first includes the second: "
                    "rename one"
                )

    @classmethod
    def about(
        cls, categories: Mapping[str, str | None] | Sequence[str], other: str | None = "other", chat: bool = False
    ) -> Question:
        """The question in English, for any instruction-tuned model.

        categories: {category: expert}, or experts that are called what they are for
        other: the answer that keeps the base model, or None
        chat: True to ask as a chat message
        """
        named = _by_name(categories)
        listed = ", ".join([*named, *([other] if other else [])])
        text = ASK if other else ASK.replace(" Take {other} if none of them fits.", "")
        space = "" if chat else " "
        labels = {space + c: e for c, e in {**named, **({other: None} if other else {})}.items()}
        return cls(text.format(categories=listed, other=other), labels, chat=chat)

    @classmethod
    def tiny(cls, experts: Mapping[str, str] | Sequence[str] = ("math", "code", "reason")) -> Question:
        """The built-in model's own: kind(47+8+6)? -> =m, the first letter of a family.

        experts: {family: expert}, or experts that are called like a family
        Raises ValueError for two with the same first letter.
        """
        named = _by_name(experts)
        if len({name[:1] for name in named}) < len(named):
            raise InputError(
                f"the built-in model names a family by its first letter, and two of {', '.join(named)} share one"
            )
        return cls("kind({prompt})?", {f"={name[0]}": expert for name, expert in named.items()}, strip="?")

    @classmethod
    def for_experts(
        cls,
        experts: Mapping[str, str] | Sequence[str],
        tokenizer: Any,
        tiny: bool = False,
        other: bool = True,
        chat: bool | None = None,
    ) -> Question:
        """Which of the experts fits: `Question.tiny` for the built-in model, else `Question.about`.

        experts: {name in the question: name in the bank}, or names; tokenizer: the model's
        other: False to leave out "other", so that the base model answers only below the margin
        chat: True to ask as a chat message; None: if the tokenizer has a template
        Raises ValueError without experts.
        """
        if not experts:
            raise InputError("there are no experts to choose from")
        if tiny:
            return cls.tiny(experts)
        chat = has_template(tokenizer) if chat is None else chat
        return cls.about(experts, other="other" if other else None, chat=chat)

    def ask(self, prompt: AnyPrompt) -> AnyPrompt:
        """The question about a prompt, or about the last message of a chat."""
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        text = self.template.replace("{prompt}", text.removesuffix(self.strip))
        return user_message(text) if self.chat or not isinstance(prompt, str) else text

    def parse(self, completion: AnyPrompt) -> str | None:
        """The one label in a completion. None if there is no label or more than one."""
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        found = [label for label in self.labels if label.strip().lower() in text.lower()]
        return found[0] if len(found) == 1 else None

    def record(self) -> dict[str, Any]:
        """The question as JSON, for the manifest of an expert that was trained on it."""
        return {"template": self.template, "labels": dict(self.labels), "strip": self.strip, "chat": self.chat}


def _by_name(experts: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    return dict(experts) if isinstance(experts, Mapping) else {name: name for name in experts}


def choosable(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The experts that answer prompts, of {name: manifest}.

    The others answer questions about prompts: they have a question in their manifest, or the name "classify".
    """
    return [name for name, manifest in manifests.items() if "question" not in manifest and name != CLASSIFIER]


def asked_of(
    manifests: Mapping[str, Mapping[str, Any]], tokenizer: Any, tiny: bool = False
) -> tuple[str | None, Question]:
    """(the expert that is asked, or None for the base model; its question), of {name: manifest} of all experts.

    The first expert with a question in its manifest answers that. Otherwise the expert "classify", or else the base
    model, is asked which of the others fits. Raises ValueError without experts to choose from.
    """
    for name, manifest in manifests.items():
        if recorded := manifest.get("question"):
            return name, Question(**recorded)
    judge = CLASSIFIER if CLASSIFIER in manifests else None
    return judge, Question.for_experts(choosable(manifests), tokenizer, tiny)


def labelled(tasks: Mapping[str, Task], question: Question, name: str = "classify") -> Task:
    """The task that a classification expert is trained on: to name the category of a prompt.

    tasks: {label of the question: Task}. The answer to a prompt of a task is its label. Prompts keep the split of their
        task and are in random order.
    Raises ValueError for a label that the question lacks, for a label with an expert but without a task, and for fewer
    than two tasks.
    """
    unknown = [label for label in tasks if label not in question.labels]
    if unknown:
        raise InputError(f"the question has no label {unknown[0]!r}; it has {', '.join(map(repr, question.labels))}")
    without = [label for label, expert in question.labels.items() if expert is not None and label not in tasks]
    if without:
        raise InputError(
            f"label {without[0]!r} has no task to take prompts from; wanted {{label: task}} for every label with an "
            "expert"
        )
    if len(tasks) < 2:
        raise InputError("a classification task needs prompts of at least two tasks")

    def rows(split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
        each = None if n is None else -(-n // len(tasks))
        drawn = [(label, row) for label, task in tasks.items() for row in _some(task, split, each, seed)]
        random.Random(f"{name}/{split}/{seed}").shuffle(drawn)
        return [{"prompt": question.ask(row["prompt"]), "answer": label.strip()} for label, row in drawn[:n]]

    longest = max(map(len, question.labels))
    return Task(
        name, rows, extract=lambda text: (question.parse(text) or whole(text)).strip(), max_new_tokens=longest + 2
    )


def _some(task: Task, split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
    """At most n problems."""
    try:
        return task.split(split, n, seed)
    except ValueError:
        return task.split(split, None, seed)  # fewer than n: all of them
