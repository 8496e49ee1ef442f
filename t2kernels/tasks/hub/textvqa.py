"""TextVQA (arXiv 1904.08920): questions about text in photographs. Ten people answered each question.

With chat=True a row is for a vision-language model: its message has a place for the image, and its column `image` holds
the undecoded file. No path of this package shows an image to a model yet: `t2 eval`, `t2 train` and the servers read
text only. The task is for programs that give `messages` and `image` to a processor themselves, and for the path to
come.
Without chat the prompt is text: it lists the words that a text recogniser found in the photograph.
"""

import re
from collections import Counter

from t2kernels.tasks.base import Task
from t2kernels.tasks.records import Row, text, texts

from .source import Dataset, Rows, Source

ENOUGH = 3
"""How many people must have given an answer for it to be fully right (VQA's measure)."""


def problem(raw: Row) -> Row:
    """The problem in a row of lmms-lab/textvqa.

    raw: question, answers (ten), ocr_tokens, image (undecoded: {"bytes", "path"}). `messages` are for a
        vision-language model; the image itself stays in the column `image`. `prompt` is for a text model. Raises
        ValueError.
    """
    question, answers = text(raw, "question"), texts(raw, "answers")
    words = [word for word in raw.get("ocr_tokens") or [] if isinstance(word, str)]
    counts = Counter(map(plain, answers))
    ask = f"{question}\nAnswer with a single word or phrase."
    return {
        "prompt": f"Words in the picture: {', '.join(words)}\nQuestion: {question}\nAnswer:",
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask}]}],
        "answer": counts.most_common(1)[0][0],
        "target": f" {counts.most_common(1)[0][0]}",
        "chat_target": counts.most_common(1)[0][0],
        "answers": answers,
        "image": raw.get("image"),
    }


def judge(completion: str, row: Row) -> bool:
    """Whether at least three people gave this answer. If no answer has three, one of the most frequent is right."""
    counts = Counter(map(plain, row.get("answers") or [row["answer"]]))
    given = plain(completion.strip().split("\n")[0])
    return bool(given) and counts[given] >= min(ENOUGH, max(counts.values()))


def accuracy(completion: str, answers: list[str]) -> float:
    """VQA's measure: the mean over people of min(1, number of others with this answer / 3)."""
    given, said = plain(completion.strip().split("\n")[0]), [plain(a) for a in answers]
    others = [sum(other == given for j, other in enumerate(said) if j != i) for i in range(len(said))]
    return sum(min(1.0, n / ENOUGH) for n in others) / len(said)


_NUMBERS: dict[str, str] = dict(
    zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
)


def plain(answer: str) -> str:
    """An answer in lower case, with digits for number words, without articles and most punctuation."""
    answer = re.sub(r"(?<![\d])[.,](?!\d)|[.,](?!\d)", " ", answer.casefold())
    answer = re.sub(r"[;/\[\]\"{}()=+_><@`?!*]", " ", answer).replace(",", "")
    words = [_NUMBERS.get(word, word) for word in answer.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _make(name: str, rows: Rows, checker: str) -> Task:
    checker = "an answer of three people or more"
    return Task(name, rows, judge=judge, max_new_tokens=32, stop=("\n",), images=True, checker=checker)


# The answers of its test split are not public.
TASKS: dict[str, Dataset] = {"textvqa": Dataset(Source("lmms-lab/textvqa", problem, test="validation"), _make)}
