"""ARC (arXiv 1803.05457): science questions with three to five options, of which one is right."""

import re

from t2kernels.tasks.records import text, texts

from .gsm8k import before_next
from .source import Source

STOP = ("\nQuestion:",)
LETTERS = "ABCDEFGH"


def problem(raw: dict) -> dict:
    """A row of allenai/ai2_arc: question, choices {text, label}, answerKey. Raises ValueError.

    Some rows label their options 1 to 4; here all are lettered, in the same order.
    """
    question, key = text(raw, "question"), text(raw, "answerKey")
    choices = raw.get("choices")
    if not isinstance(choices, dict):
        raise ValueError(f"'choices' is {choices!r:.60}; wanted is {{'text': [...], 'label': [...]}}")
    options, labels = texts(choices, "text"), texts(choices, "label")
    if not len(options) == len(labels) <= len(LETTERS) or key not in labels:
        raise ValueError(
            f"'answerKey' is {key!r} and the labels are {labels} for {len(options)} options; wanted is a label for each"
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
    }


EASY = Source("allenai/ai2_arc", problem, ("ARC-Easy",))
CHALLENGE = Source("allenai/ai2_arc", problem, ("ARC-Challenge",))


def judge(completion: str, row: dict) -> bool:
    return choice(completion, row.get("options") or []) == row["answer"]


def choice(completion: str, options: list[str]) -> str:
    """The letter of the option that a completion decides for, or nothing. Options are also known by number, 1 for A, and by their text.

    In this order: what the last "answer is" names; an option at the very start; one in \\boxed{}; the only letter that stands alone in
    brackets or on a line; the only option whose text occurs. What follows the next question does not count.
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
    """The label that a text starts with: "B", "(B)", "B)", "B. text", "option B", "2". "A dog" starts with a word."""
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
    """The letter of the only option that a text is, or else holds; of options that hold each other the longer counts."""
    plain = lambda t: " ".join(re.findall(r"[\w.%/-]+", t.casefold())).strip(".")  # noqa: E731
    said, names = plain(said), [plain(option) for option in options]
    exact = [i for i, name in enumerate(names) if name == said]
    if len(exact) == 1:
        return LETTERS[exact[0]]
    held = [i for i, name in enumerate(names) if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said)]
    held = [i for i in held if not any(i != j and names[i] in names[j] for j in held)]
    return LETTERS[held[0]] if len(held) == 1 else ""
