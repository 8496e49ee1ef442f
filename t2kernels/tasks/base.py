"""A task: prompts in splits, and a reward that says whether a completion is right."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2kernels import InputError

from .records import Row, json_lines, text

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

    def _styled(self, row: Row) -> Row:
        row = dict(row)
        messages, target = row.pop("messages", None), row.pop("chat_target", None)
        if self.chat and isinstance(row["prompt"], str):
            row["prompt"] = messages or [{"role": "user", "content": row["prompt"]}]
            if target:
                row["target"] = target
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

    def _right(self, completion: str, row: Row) -> bool:
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


def from_jsonl(path: str | Path) -> Task:
    """A task from a file with one JSON object per line: `prompt` and `answer`, both strings.

    The reward gets the other columns too. A column `split` (train, validation or test) sets the split of a row;
    without it the hash of the prompt decides.
    Raises ValueError with the file, the line and the reason.
    """
    path = Path(path)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for where, row in json_lines(path):
        try:
            text(row, "answer")
            parts[split_of(row, text(row, "prompt"))].append({k: v for k, v in row.items() if k != "split"})
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None
    if not any(parts.values()):
        raise InputError(f'{path} has no problem; expected one per line, as {{"prompt": "2+2=", "answer": "4"}}')
    return Task(path.name.removesuffix(".jsonl"), lambda split, n, seed: [dict(row) for row in parts[split][:n]])


def split_of(row: Mapping[str, Any], prompt: str) -> str:
    """The split in the row's column `split`, else the `bucket` of its prompt. Raises ValueError."""
    split = row.get("split")
    if split not in (None, *SPLITS):
        raise InputError(f"'split' is {split!r}; it must be one of {', '.join(SPLITS)}")
    return split or bucket(prompt)
