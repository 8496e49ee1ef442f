"""A task: prompts in splits, and a reward that says whether a completion is right."""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    rows: (split, n, seed) -> problems, dicts with at least `prompt` and `answer`; n None means the split's usual size.
    extract: the answer in a completion.
    max_new_tokens: enough for the longest right completion, working and end of text included.
    """

    name: str
    rows: Callable[[str, int | None, int], list[dict]] = field(repr=False)
    extract: Callable[[str], str] = field(default=whole, repr=False)
    max_new_tokens: int = 64

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
            raise ValueError(f"task {self.name!r} has {len(rows)} problems in its {split} split; {n or 'at least one'} wanted")
        return rows

    def reward(self, prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns) -> list[float]:
        """+1 for each completion whose extracted answer is the right one, -1 for any other: wrong, empty, cut short or not text.

        prompts, completions: [B] str, or chats as lists of {"role", "content"} dicts, of which the last message counts.
        answer: [B] str, the right answers. columns: ignored; here so that TRL can call it as a reward function.
        Raises ValueError if the lengths differ.
        """
        if not len(prompts) == len(completions) == len(answer):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers; one of each is wanted")
        return [1.0 if self.right(c, a) else -1.0 for c, a in zip(completions, answer, strict=True)]

    def right(self, completion, answer: str) -> bool:
        """Whether a completion ends in the right answer."""
        if isinstance(completion, list):
            last = completion[-1] if completion else None
            completion = last.get("content") if isinstance(last, dict) else None
        return isinstance(completion, str) and self.extract(completion) == answer


def from_jsonl(path: str | Path) -> Task:
    """A task from a file with one JSON object a line: `prompt` and `answer`, both text; further columns reach the reward.

    A column `split` (train, validation or test) says where a row belongs; where it is missing the hash of the prompt decides.
    Raises ValueError with the file, the line and what is wrong with it.
    """
    path = Path(path)
    parts: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            row = _row(line, f"{path}, line {number}")
            parts[row.pop("split", None) or bucket(row["prompt"])].append(row)
    if not any(parts.values()):
        raise ValueError(f'{path} holds no problem; wanted is one a line, as {{"prompt": "2+2=", "answer": "4"}}')
    return Task(path.name.removesuffix(".jsonl"), lambda split, n, seed: [dict(row) for row in parts[split][:n]])


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with prompt and answer")
    for column in ("prompt", "answer"):
        if column not in row:
            raise ValueError(f"{where}: no {column!r}; its columns are {', '.join(row) or 'none'}")
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{where}: {column!r} is {row[column]!r}; wanted is text in quotes, not empty")
    if row.get("split") not in (None, *SPLITS):
        raise ValueError(f"{where}: 'split' is {row['split']!r}; it must be one of {', '.join(SPLITS)}")
    return row
