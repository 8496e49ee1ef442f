"""A task: prompts in splits, and a reward that says whether a completion is right."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .records import json_lines, text

SPLITS = ("train", "validation", "test")


def bucket(prompt: str) -> str:
    """The split a prompt belongs to, by its crc32: 70 % train, 10 % validation, 20 % test. The same prompt never changes sides."""
    hashed = zlib.crc32(prompt.encode()) % 10
    return "train" if hashed < 7 else "validation" if hashed == 7 else "test"


def whole(completion: str) -> str:
    """The answer in a completion that is nothing but the answer: surrounding white space is dropped."""
    return completion.strip()


@dataclass(frozen=True)
class Task:
    """Prompts with verifiable answers.

    name: what `load` finds it by.
    rows: (split, n, seed) -> problems, dicts with at least `prompt` and `answer`; n None means the split's usual size. Where a chat model
        should be asked in other words, they are in `messages`; `target`, if there, is a whole right completion, and `chat_target` that of a
        chat model; `category` a label.
    extract: the answer in a completion; right is what equals the column `answer`.
    judge: (completion, columns of its row) -> whether it is right, for tasks where equality is not enough. extract does not count then.
    max_new_tokens: enough for the longest right completion, working and end of text included.
    stop: text that begins the next problem, where a base model goes on after its answer.
    checker: what decides whether an answer is right, in words.
    chat: prompts are messages, for the chat template. images: they hold an image, which only a vision-language model can read.
    """

    name: str
    rows: Callable[[str, int | None, int], list[dict]] = field(repr=False)
    extract: Callable[[str], str] = field(default=whole, repr=False)
    max_new_tokens: int = 64
    judge: Callable[[str, dict], bool] | None = field(default=None, repr=False)
    stop: tuple[str, ...] = ()
    checker: str = "equality"
    chat: bool = False
    images: bool = False

    def split(self, split: str, n: int | None = None, seed: int = 0) -> list[dict]:
        """The problems of a split: the first `n`, or all of it. `seed` draws other training problems where these are generated.

        Raises ValueError if the split is not train, validation or test, or has no problem or fewer than `n`.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if n is not None and n < 1:
            raise ValueError(f"n is {n}; ask for at least one problem")
        rows = self.rows(split, n, seed)
        if not rows or (n is not None and len(rows) < n):
            raise ValueError(
                f"task {self.name!r} has {len(rows)} problems in its {split} split; {n or 'at least one'} wanted"
            )
        return [self._styled(row) for row in rows]

    def _styled(self, row: dict) -> dict:
        row = dict(row)
        messages, target = row.pop("messages", None), row.pop("chat_target", None)
        if self.chat and isinstance(row["prompt"], str):
            row["prompt"] = messages or [{"role": "user", "content": row["prompt"]}]
            if target:
                row["target"] = target
        return row

    def reward(self, prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns) -> list[float]:
        """+1 for each completion whose extracted answer is the right one, -1 for any other: wrong, empty, cut short or not text.

        prompts, completions: [B] str, or chats as lists of {"role", "content"} dicts, of which the last message counts.
        answer: [B] str, the right answers. columns: [B] each, the other columns of the rows; whatever else TRL passes is ignored.
        Raises ValueError if the lengths differ.
        """
        if not len(prompts) == len(completions) == len(answer):
            raise ValueError(
                f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers; one of each is wanted"
            )
        kept = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == len(answer)}
        rows = [{"answer": a, **{k: v[i] for k, v in kept.items()}} for i, a in enumerate(answer)]
        return [1.0 if right else -1.0 for right in self.verdicts([text_of(c) for c in completions], rows)]

    def verdicts(self, completions: Sequence[str | None], rows: Sequence[dict]) -> list[bool]:
        """Whether each completion is right, by the columns of its row. None is not text, and wrong."""
        return [c is not None and self._right(c, row) for c, row in zip(completions, rows, strict=True)]

    def _right(self, completion: str, row: dict) -> bool:
        return self.judge(completion, row) if self.judge else self.extract(completion) == row["answer"]

    def right(self, completion, answer: str, **row) -> bool:
        """Whether one completion ends in the right answer. row: further columns of its problem, where the task needs them."""
        return self.verdicts([text_of(completion)], [{"answer": answer, **row}])[0]


def text_of(completion) -> str | None:
    """The text of a completion: itself, or the content of the last message of a chat, parts of text joined; None if there is none."""
    if isinstance(completion, list):
        last = completion[-1] if completion else None
        completion = last.get("content") if isinstance(last, dict) else None
        if isinstance(completion, list):
            parts = [part.get("text") for part in completion if isinstance(part, dict)]
            completion = "".join(part for part in parts if isinstance(part, str))
    return completion if isinstance(completion, str) else None


def from_jsonl(path: str | Path) -> Task:
    """A task from a file with one JSON object a line: `prompt` and `answer`, both text; further columns reach the reward.

    A column `split` (train, validation or test) says where a row belongs; where it is missing the hash of the prompt decides.
    Raises ValueError with the file, the line and what is wrong with it.
    """
    path = Path(path)
    parts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for where, row in json_lines(path):
        try:
            text(row, "prompt")
            text(row, "answer")
            parts[split_of(row, row["prompt"])].append({k: v for k, v in row.items() if k != "split"})
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    if not any(parts.values()):
        raise ValueError(f'{path} holds no problem; wanted is one a line, as {{"prompt": "2+2=", "answer": "4"}}')
    return Task(path.name.removesuffix(".jsonl"), lambda split, n, seed: [dict(row) for row in parts[split][:n]])


def split_of(row: dict, prompt: str) -> str:
    """What a row's column `split` says, else the `bucket` of its prompt. Raises ValueError."""
    split = row.get("split")
    if split not in (None, *SPLITS):
        raise ValueError(f"'split' is {split!r}; it must be one of {', '.join(SPLITS)}")
    return split or bucket(prompt)
