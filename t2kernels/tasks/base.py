"""A task: prompts in splits, and a reward that says whether a completion is right."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2kernels import InputError

from .judging import of_row
from .records import Row

SPLITS: tuple[str, ...] = ("train", "validation", "test")

Message = Mapping[str, Any]
"""A chat message: {"role", "content"}."""


def bucket(prompt: str) -> str:
    """The split of a prompt, from its crc32: 70 % train, 10 % validation, 20 % test. Equal prompts are in one split."""
    hashed = zlib.crc32(prompt.encode()) % 10
    return "train" if hashed < 7 else "validation" if hashed == 7 else "test"


def whole(completion: str) -> str:
    """The whole completion as the answer, without surrounding white space."""
    return completion.strip()


@dataclass(frozen=True)
class Task:
    """Prompts with answers that a program can check.

    name: the name that `load` takes.
    rows: (split, n, seed) -> problems, dicts with at least `prompt` and `answer`; n=None means the usual size of the
        split. Optional columns: `messages`, the prompt for a chat model; `target`, a complete right completion;
        `chat_target`, the same for a chat model; `category`, a label.
    extract: completion -> its answer. The completion is right if this equals the column `answer`.
    judge: (completion, columns of its row) -> whether it is right, for tasks where equality is not enough.
        It replaces `extract`.
    max_new_tokens: enough for the longest right completion, including its working and the end of text.
    stop: texts that start the next problem. Generation stops there, as a base model does not stop by itself.
    checker: a description of how an answer is checked.
    chat: if True, prompts are messages for the chat template.
    system: the system message of chats that have none; None: the template's own. An empty text is a message too.
    check: the name of a check (`judging.CHECKS`), which replaces `extract` and `judge`; "mixed": each row names its own
        in its column `check`; None: `extract` or `judge` decide. "choice": nothing is written; the likeliest of
        `options(row)` is the answer.
    labels: the options of every row without a column `choices`, for "label" and "choice".
    made_of_chats: if True, the prompts of the rows are chats themselves, and cannot be text.
    norm: how likelihoods of options are compared for "choice": "sum"; or "length", divided by the characters of the
        option, as lm-eval's acc_norm, for options of different lengths.
    form: (completion, columns of its row) -> whether it has the form of an answer, for reports. A check brings its own.
    images: if True, the prompts contain an image, which only a vision-language model can read.
        No path of this package gives an image to a model yet (see `hub/textvqa.py`).
    """

    name: str
    rows: Callable[[str, int | None, int], list[Row]] = field(repr=False)
    extract: Callable[[str], str] = field(default=whole, repr=False)
    max_new_tokens: int = 64
    judge: Callable[[str, Row], bool] | None = field(default=None, repr=False)
    stop: tuple[str, ...] = ()
    checker: str = "equality"
    chat: bool = False
    images: bool = False
    check: str | None = None
    labels: tuple[str, ...] = ()
    system: str | None = None
    norm: str = "sum"
    form: Callable[[str, Row], bool] | None = field(default=None, repr=False)
    made_of_chats: bool = False

    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The texts that a row's answer is one of: its column `choices`, else the task's labels; empty if it has none.

        They have no white space around them: whoever appends one to a prompt sets the boundary.
        """
        return tuple(row.get("choices") or self.labels)

    def split(self, split: str, n: int | None = None, seed: int = 0) -> list[Row]:
        """The first `n` problems of a split, or all of them.

        seed: selects other training problems, for tasks that generate them.
        Raises ValueError if the split is not train, validation or test, or has no problem or fewer than `n`.
        """
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if n is not None and n < 1:
            raise InputError(f"n is {n}; ask for at least one problem")
        rows = self.rows(split, n, seed)
        if not rows or (n is not None and len(rows) < n):
            raise InputError(
                f"task {self.name!r} has {len(rows)} problems in its {split} split; {n or 'at least one'} wanted"
            )
        return [self._styled(row) for row in rows]

    def held_out(self, n: int | None = None) -> list[Row]:
        """At most the first `n` test problems; those of the validation split if the task has no test problems.

        Raises ValueError if it has neither.
        """
        try:
            return self.split("test")[:n]
        except InputError as e:
            try:
                return self.split("validation")[:n]
            except InputError:
                raise e from None

    def _styled(self, row: Row) -> Row:
        row = dict(row)
        messages, target = row.pop("messages", None), row.pop("chat_target", None)
        if self.chat and isinstance(row["prompt"], str):
            row["prompt"] = messages or [{"role": "user", "content": row["prompt"]}]
            if target:
                row["target"] = target
        chat = row["prompt"]
        if self.system is not None and not isinstance(chat, str) and chat[0].get("role") != "system":
            row["prompt"] = [{"role": "system", "content": self.system}, *chat]
        return row

    def reward(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[str | Sequence[Message] | None],
        answer: Sequence[str],
        **columns: Any,
    ) -> list[float]:
        """+1 for each completion whose answer is right, -1 for any other: wrong, empty, cut short or not a text.

        prompts, completions: [B] texts, or chats as lists of {"role", "content"}; the last message is the completion.
        answer: [B] texts, the right answers.
        columns: [B] each, the other columns of the rows. Other arguments that TRL passes are ignored.
        Raises ValueError if the lengths differ.
        """
        if not len(prompts) == len(completions) == len(answer):
            raise InputError(
                f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers; "
                "expected one completion and one answer per prompt"
            )
        kept = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == len(answer)}
        rows = [{"answer": a, **{k: v[i] for k, v in kept.items()}} for i, a in enumerate(answer)]
        return [1.0 if right else -1.0 for right in self.verdicts([text_of(c) for c in completions], rows)]

    def verdicts(self, completions: Sequence[str | None], rows: Sequence[Row]) -> list[bool]:
        """Whether each completion is right, given the columns of its row. None (no text) is wrong."""
        return [c is not None and self._right(c, row) for c, row in zip(completions, rows, strict=True)]

    def formed(self, completions: Sequence[str | None], rows: Sequence[Row]) -> list[bool] | None:
        """Whether each completion has the form of an answer: one label, a number, ...; None if any text has.

        The rows have the columns of `verdicts`.
        """
        judges = [self._form(row) for row in rows]
        if not any(judges):
            return None
        return [c is not None and (form is None or form(c)) for c, form in zip(completions, judges, strict=True)]

    def _form(self, row: Row) -> Callable[[str], bool] | None:
        if self.check is None:
            form = self.form
            return None if form is None else lambda completion: form(completion, row)
        formed = of_row(self.check, row).formed
        return None if formed is None else lambda completion: formed(completion, self.options(row))

    def _right(self, completion: str, row: Row) -> bool:
        if self.check is not None:
            return of_row(self.check, row).right(completion, row["answer"], self.options(row))
        return self.judge(completion, row) if self.judge else self.extract(completion) == row["answer"]

    def right(self, completion: str | Sequence[Message] | None, answer: str, **row: Any) -> bool:
        """Whether one completion is right. row: other columns of its problem, if the task needs them."""
        return self.verdicts([text_of(completion)], [{"answer": answer, **row}])[0]


def text_of(completion: str | Sequence[Message] | None) -> str | None:
    """The text of a completion, or of the last message of a chat with its text parts joined; None if there is none."""
    found: Any = completion
    if isinstance(found, list):
        last = found[-1] if found else None
        found = last.get("content") if isinstance(last, dict) else None
        if isinstance(found, list):
            parts = [part.get("text") for part in found if isinstance(part, dict)]
            found = "".join(part for part in parts if isinstance(part, str))
    return found if isinstance(found, str) else None


def split_of(row: Mapping[str, Any], prompt: str) -> str:
    """The split in the row's column `split`, else the `bucket` of its prompt. Raises ValueError."""
    split = row.get("split")
    if split not in (None, *SPLITS):
        raise InputError(f"'split' is {split!r}; it must be one of {', '.join(SPLITS)}")
    return split or bucket(prompt)
