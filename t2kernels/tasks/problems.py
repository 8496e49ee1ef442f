"""Tasks from a file of one's own: prompts with answers (JSONL), or texts with labels (CSV or JSONL)."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2kernels import InputError, MissingFileError

from .base import SPLITS, Task, split_of
from .judging import CHECKS, CHOICE, MIXED, check_answer, check_name
from .records import Raw, Row, json_lines, text, texts

INSTRUCTION = "Which of these fits the text best: {labels}? Answer with one"
"""It ends in " word." or " of them.". SmolLM2-135M-Instruct uses all labels with it. Asked to "classify the text", it
gave one label to all of 80 texts of SST-2, and to all of 32 support tickets."""


def from_jsonl(path: str | Path, check: str | None = None, labels: Sequence[str] | None = None) -> Task:
    """A task from a file with one JSON object per line: `prompt` and `answer`.

    The columns of a row:
        prompt: a text, or a chat: a list of messages {"role", "content"}. A file has one of the two.
        answer: a text
        check: how a completion is checked, one of `judging.CHECKS`; without it `check`, or else "exact"
        choices: a list of texts that the answer is one of, for "label" and "choice"; without it `labels`
        split: train, validation or test; without it the hash of the prompt decides
    The reward gets the other columns too.

    check: for every row without a column `check`
    labels: the options of rows without `choices`; None: the answers in the file

    Raises ValueError with the file, the line and the reason.
    """
    path = Path(path)
    read = [(where, _row(where, raw, check)) for where, raw in json_lines(path)]
    if not read:
        raise InputError(f'{path} has no problem; expected one per line, as {{"prompt": "2+2=", "answer": "4"}}')
    kinds = {isinstance(row["prompt"], str) for _, row in read}
    if len(kinds) > 1:
        raise InputError(f"{path}: some prompts are text and some are chats; expected one of the two throughout")
    checks = list(dict.fromkeys(row["check"] for _, row in read))
    if len(checks) > 1 and CHOICE in checks:
        raise InputError(f"{path}: some rows have check 'choice' and some {checks}; 'choice' goes with no other")
    closed = [row for _, row in read if row["check"] in ("label", CHOICE)]
    known = tuple(labels or sorted({row["answer"] for row in closed if not row.get("choices")}))
    own = any(row.get("choices") for row in closed)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for where, row in read:
        split = row.pop("split")
        if own:
            row.setdefault("choices", None)
        try:
            check_answer(row["check"], row["answer"], row.get("choices") or known)
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None
        if len(checks) == 1:
            del row["check"]
        parts[split].append(row)
    one = checks[0] if len(checks) == 1 else MIXED
    return Task(
        path.name.removesuffix(".jsonl"),
        lambda split, n, seed: [dict(row) for row in parts[split][:n]],
        chat=False in kinds,
        made_of_chats=False in kinds,
        check=one,
        labels=known,
        norm="length" if own else "sum",
        checker=CHECKS[one].says if one in CHECKS else "the check of each row",
    )


def _row(where: str, raw: Row, check: str | None) -> Row:
    """A row with its columns checked, one by one, and with `check` and `split`."""
    try:
        answer, found, prompt = text(raw, "answer"), {**raw}, _prompt(raw)
        found["check"] = raw.get("check") or check or "exact"
        check_name(found["check"])
        found["split"] = split_of(raw, prompt if isinstance(prompt, str) else json.dumps(prompt))
        if found["check"] in ("label", CHOICE) and raw.get("choices") is not None:
            found["choices"] = [option.strip() for option in texts(raw, "choices")]
            found["answer"] = answer.strip()
        return found
    except ValueError as e:
        raise InputError(f"{where}: {e}") from None


def _prompt(raw: Row) -> str | list[Mapping[str, Any]]:
    """The prompt of a row: a text, or a list of messages. Raises ValueError."""
    prompt = raw.get("prompt")
    if not isinstance(prompt, list):
        return text(raw, "prompt")
    for message in prompt or [None]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f'\'prompt\' is {prompt!r:.60}; expected a text, or messages: [{{"role": "user", "content": "..."}}]'
            )
        text(message, "content")
    return prompt


def question(labels: Sequence[str], instruction: str | None = None) -> str:
    """The instruction of a classification with its labels in it, as `classification` puts it before the text."""
    one_word = all(len(label.split()) == 1 for label in labels)
    return (instruction or INSTRUCTION + (" word." if one_word else " of them.")).replace("{labels}", ", ".join(labels))


def about(text: str, question: str) -> str:
    """The message that asks a question of a classification about a text."""
    return f"{question}\n\nText: {text}"


def classification(
    path: str | Path,
    instruction: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    check: str = CHOICE,
) -> Task:
    """A task from texts with labels: a CSV file with a header, or JSONL, with the columns `text` and `label`.

    The prompt is the instruction, the text, and "Label:"; a chat has no "Label:". A column `split` sets the split of a
    row; without it the hash of the text decides.

    instruction: {labels} in it becomes the list of labels; None: "Which of these fits the text
        best: {labels}? Answer with one word.", or "with one of them" if a label has several
    labels: the labels in the order of the prompt, or {label in the file: word for it in the prompt and the answer};
        None: those of the file, sorted. A word that the model would say itself is learned faster than "LABEL_2".
    check: "choice", the likeliest label, with nothing written; "label", the one label that a completion names; "exact"

    Raises ValueError with the file, the line and the reason.
    """
    path = Path(path)
    if check not in ("label", CHOICE, "exact"):
        raise InputError(f"check is {check!r}; for a classification it must be choice, label or exact")
    read = [(where, *_labelled(where, raw)) for where, raw in _table(path)]
    found = sorted({label for _, _, label, _ in read})
    names = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels or found}
    if len(set(names.values())) < 2:
        raise InputError(f"{path} has the labels {found!r:.80}; a classification needs at least two")
    ask = question(list(dict.fromkeys(names.values())), instruction)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for where, said, label, split in read:
        if label not in names:
            raise InputError(f"{where}: 'label' is {label!r:.60}; it must be one of {', '.join(names)}")
        answer = names[label]
        parts[split].append(
            {
                "prompt": f"{about(said, ask)}\nLabel:",
                "messages": [{"role": "user", "content": about(said, ask)}],
                "answer": answer,
                "target": f" {answer}",
                "chat_target": answer,
            }
        )
    return Task(
        path.stem,
        lambda split, n, seed: [dict(row) for row in parts[split][:n]],
        max_new_tokens=16,
        stop=("\n",),
        check=check,
        labels=tuple(dict.fromkeys(names.values())),
        checker=CHECKS[check].says,
    )


def is_classification(path: str | Path) -> bool:
    """Whether a file has the columns `text` and `label` in its first row, and no `prompt`. Raises ValueError."""
    first = next(_table(Path(path)), None)
    return first is not None and {"text", "label"} <= first[1].keys() and "prompt" not in first[1]


def load_file(path: str | Path, check: str | None = None) -> Task:
    """The task in a CSV or JSONL file, recognised by its columns: text and label, or prompt and answer.

    Raises ValueError for malformed rows, FileNotFoundError for a missing file.
    """
    if not Path(path).is_file():
        raise MissingFileError(
            f"no file {str(path)!r}; expected a JSONL file with the columns prompt and answer, or a CSV or JSONL file "
            "with the columns text and label"
        )
    if is_classification(path):
        return classification(path, check=check or CHOICE)
    if str(path).endswith(".csv"):
        first = next(_table(Path(path)), None)
        raise InputError(f"{path}: the columns are {', '.join(first[1]) if first else 'none'}; expected text and label")
    return from_jsonl(path, check)


def _table(path: Path) -> Iterator[Raw]:
    """The rows of a CSV file with a header, or of a JSONL file."""
    if path.suffix != ".csv":
        yield from json_lines(path)
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns = reader.fieldnames or []
            if twice := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
                raise InputError(f"{path}: there are several columns {twice[0]!r:.60}; expected one of each name")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(more := row.pop(None, [])):
                    raise InputError(
                        f"{where}: {len(columns) + len(more)} cells, of which the last is {more[-1]!r:.40}, and the "
                        f'header has {len(columns)}; put a text with commas into quotes: "..."'
                    )
                yield where, row
        except (csv.Error, UnicodeDecodeError) as e:
            raise InputError(f"{path}, line {reader.line_num}: no CSV that can be read ({e})") from None


def _labelled(where: str, raw: Row) -> tuple[str, str, str]:
    """(text, label, split) of a row of a classification."""
    try:
        said = text(raw, "text").strip()
        label = raw.get("label")
        named = str(label) if isinstance(label, int) else text(raw, "label").strip()
        return said, named, split_of({"split": raw.get("split") or None}, said)
    except ValueError as e:
        raise InputError(f"{where}: {e}") from None
