"""TextVQA (arXiv 1904.08920): questions about text in photographs, each answered by ten people."""

import re
from collections import Counter

from t2kernels.tasks.records import text, texts

from .source import Source

ENOUGH = 3
"""People who must have given an answer for it to be fully right, by the measure of VQA."""


def problem(raw: dict) -> dict:
    """A row of lmms-lab/textvqa: question, answers (ten), ocr_tokens, image (undecoded: {"bytes", "path"}). Raises ValueError.

    `messages` ask a vision-language model and hold a place for the image, which stays in its column. `prompt` asks a model that cannot see,
    and gives it the words that a text recogniser found.
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


SOURCE = Source("lmms-lab/textvqa", problem, test="validation")  # the answers of its test split are not public


def judge(completion: str, row: dict) -> bool:
    """Right is what at least three people said; where no answer has three, what most said."""
    counts = Counter(map(plain, row.get("answers") or [row["answer"]]))
    given = plain(completion.strip().split("\n")[0])
    return bool(given) and counts[given] >= min(ENOUGH, max(counts.values()))


def accuracy(completion: str, answers: list[str]) -> float:
    """VQA's measure: the mean over the people of min(1, others who said the same / 3)."""
    given, said = plain(completion.strip().split("\n")[0]), [plain(a) for a in answers]
    others = [sum(other == given for j, other in enumerate(said) if j != i) for i in range(len(said))]
    return sum(min(1.0, n / ENOUGH) for n in others) / len(said)


_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))


def plain(answer: str) -> str:
    """An answer in lower case, without articles, with digits for numbers, without punctuation that is not inside a number or a word."""
    answer = re.sub(r"(?<![\d])[.,](?!\d)|[.,](?!\d)", " ", answer.casefold())
    answer = re.sub(r"[;/\[\]\"{}()=+_><@`?!*]", " ", answer).replace(",", "")
    words = [_NUMBERS.get(word, word) for word in answer.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))
