"""ARC (arXiv 1803.05457): science questions with three to five options. One option is right."""

import re
from dataclasses import replace

from t2kernels import InputError
from t2kernels.tasks.base import Task
from t2kernels.tasks.extract import before_next
from t2kernels.tasks.records import MissingColumnError, Row, text, texts

from .source import Dataset, Rows, Source

STOP = ("\nQuestion:",)
LETTERS = "ABCDEFGH"


def problem(raw: Row) -> Row:
    """The problem in a row of allenai/ai2_arc: question, choices {text, label}, answerKey. Raises ValueError.

    Some rows label their options 1 to 4. The prompt always uses letters, in the same order.
    """
    question, key = text(raw, "question"), text(raw, "answerKey")
    if "choices" not in raw:
        raise MissingColumnError("no 'choices'; expected {'text': [...], 'label': [...]}")
    choices = raw["choices"]
    if not isinstance(choices, dict):
        raise InputError(f"'choices' is {choices!r:.60}; expected {{'text': [...], 'label': [...]}}")
    options, labels = texts(choices, "text"), texts(choices, "label")
    if not len(options) == len(labels) <= len(LETTERS) or key not in labels:
        raise InputError(
            f"'answerKey' is {key!r} and the labels are {labels} for {len(options)} options; "
            f"expected one label per option, at most {len(LETTERS)} options, and a key among the labels"
        )
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    answer = LETTERS[labels.index(key)]
    return {
        "prompt": f"Question: {question}\n{listed}\nAnswer:",
        "messages": [
            {
                "role": "user",
                "content": f"{question}\n{listed}\n\nAnswer with the letter of the right option and nothing else.",
            }
        ],
        "answer": answer,
        "target": f" {answer}",
        "chat_target": answer,
        "options": options,
        "question": question,
    }


def by_likelihood(task: Task) -> Task:
    """The task without the list of options in its prompts: the answer is the likeliest text of an option.

    Likelihoods are divided by the characters of the option, as acc_norm of lm-eval's arc_easy and arc_challenge, which
    have the same prompt.
    """

    def rows(split: str, n: int | None, seed: int) -> list[Row]:
        return [_open(row) for row in task.rows(split, n, seed)]

    return replace(
        task, rows=rows, judge=None, form=None, check="choice", norm="length", checker="the likeliest option"
    )


def _open(row: Row) -> Row:
    options, question = row["options"], row["question"]
    right = options[LETTERS.index(row["answer"])]
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "messages": [{"role": "user", "content": question}],
        "answer": right,
        "target": f" {right}",
        "chat_target": right,
        "choices": options,
    }


def judge(completion: str, row: Row) -> bool:
    """Whether a completion decides for the right option."""
    return choice(completion, row.get("options") or []) == row["answer"]


def formed(completion: str, row: Row) -> bool:
    """Whether a completion decides for one option."""
    return bool(choice(completion, row.get("options") or []))


def choice(completion: str, options: list[str]) -> str:
    """The letter of the option that a completion decides for; "" if it decides for none.

    Options are also recognised by number, 1 for A, and by their text. Text after the next question is ignored. The
    first
    of these that is found counts: the option after the last "answer is"; an option at the very start; an option in
    \\boxed{}; the only letter that stands alone in brackets or on a line; the only option whose text occurs.
    """
    known = LETTERS[: len(options) or 5]
    said = re.sub(r"[*_`]+", "", before_next(completion)).strip()
    for rest in reversed(re.split(r"(?i)(?:answer|choice|option)(?:\s+is\b|\s*[:=])[ \t:]*", said)[1:]):
        rest = rest.split("\n")[0]
        if found := _leading(rest, known) or _by_text(rest, options):
            return found
    if found := _leading(said, known):
        return found
    for pattern in (
        rf"\\boxed\{{\s*(?:\\text\{{)?\s*\(?([{known}])\b",
        rf"\(([{known}])\)",
        rf"(?m)^\s*([{known}])[.):]?\s*$",
    ):
        if len(found := set(re.findall(pattern, said))) == 1:
            return found.pop()
    return _by_text(said, options)


def _leading(said: str, known: str) -> str:
    """The label at the start of a text, as in "B", "(B)", "B. text", "option B", "2"; "" if there is none ("A dog")."""
    label = rf"[{known}{known.lower()}]|[1-{len(known)}]"
    start = re.match(
        rf"\s*(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)?\s*[(\[]?({label})[)\]](?!\s*(?:or|and)\b)", said, re.I
    )
    start = start or re.match(
        rf"\s*(?i:option\s+|choice\s+)?([{known}]|[1-{len(known)}])(?:\s*$|\s*\n|[.):,;](?:\s|$)|\s+[-–(])", said
    )
    if not start:
        return ""
    found = start[1].upper()
    return known[int(found) - 1] if found.isdigit() else found


def _by_text(said: str, options: list[str]) -> str:
    """The letter of the only option that equals the text, or else occurs in it; "" if there is none or several.

    If one option contains another, the longer one counts.
    """
    plain = lambda t: " ".join(re.findall(r"[\w.%/-]+", t.casefold())).strip(".")  # noqa: E731
    said, names = plain(said), [plain(option) for option in options]
    exact = [i for i, name in enumerate(names) if name == said]
    if len(exact) == 1:
        return LETTERS[exact[0]]
    held = [i for i, name in enumerate(names) if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said)]
    held = [i for i in held if not any(i != j and names[i] in names[j] for j in held)]
    return LETTERS[held[0]] if len(held) == 1 else ""


def _make(name: str, rows: Rows, checker: str) -> Task:
    return Task(name, rows, judge=judge, max_new_tokens=32, stop=STOP, checker="the option named", form=formed)


TASKS: dict[str, Dataset] = {
    "arc_easy": Dataset(Source("allenai/ai2_arc", problem, ("ARC-Easy",)), _make, by_likelihood),
    "arc_challenge": Dataset(Source("allenai/ai2_arc", problem, ("ARC-Challenge",)), _make, by_likelihood),
}
