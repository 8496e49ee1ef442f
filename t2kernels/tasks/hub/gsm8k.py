"""GSM8K (arXiv 2110.14168): grade-school word problems, whose answer is a number."""

import re
from fractions import Fraction

from t2kernels.tasks.records import text

from .source import Source

STOP = ("\nQuestion:",)


def problem(raw: dict) -> dict:
    """A row of openai/gsm8k: question, answer (the solution, which ends in `#### number`). Raises ValueError."""
    question, solution = text(raw, "question"), text(raw, "answer")
    worked, mark, final = solution.rpartition("####")
    answer = canonical(final)
    if not mark or not answer:
        raise ValueError(f"'answer' ends in {solution[-40:]!r}; wanted is '#### ' and a number")
    ask = "Think step by step. End with a line that holds nothing but #### and the number."
    target = f"{re.sub('<<.*?>>', '', worked)}#### {answer}"
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "messages": [{"role": "user", "content": f"{question}\n\n{ask}"}],
        "answer": answer,
        "target": f" {target}",
        "chat_target": target,
    }


SOURCE = Source("openai/gsm8k", problem, ("main",))

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w)\]}.])[-−–]\s?)?[$€£¥]?\s?(?:(?<=[$€£¥])[-−–])?)"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?(?P<digits>{_DIGITS})(?:\s?/\s?(?P<below>\d+)(?![\d.]))?"
)
_NEXT = re.compile(r"\n[ \t]*(?:Question|Problem|Example|Exercise|Q)[ \t]*\d*[ \t]*[:.)]")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def before_next(completion: str) -> str:
    """A completion without the next problem that a base model went on to. A prompt that it repeats at its start is left in."""
    for found in _NEXT.finditer(completion):
        if completion[: found.start()].strip():
            return completion[: found.start()]
    return completion


def _value(match: re.Match) -> Fraction | None:
    digits, below, whole = match["digits"].replace(",", ""), match["below"], match["whole"]
    if max(map(len, (digits, below or "", whole or ""))) > 100 or (
        below is not None and (not int(below) or "." in digits)
    ):
        return None
    value = Fraction(digits) / int(below or 1) + int(whole or 0)
    return -value if any(sign in match["sign"] for sign in "-−–") else value


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order. Currency, per cent, thousands separators and LaTeX's fractions are read over; 1 1/2 is one number."""
    text = _FRACTION.sub(r" \1/\2", text).replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def canonical(text: str) -> str:
    """The first number of a text, written in the one way that answers are: 1234, -0.5, 2/3; nothing if there is none."""
    found = numbers(text)
    return written(found[0]) if found else ""


def written(value: Fraction) -> str:
    """An integer or a finite decimal where it is one, else a fraction in lowest terms."""
    top, bottom = value.numerator, value.denominator
    places = 0
    while bottom > 1 and 10**places % bottom and places < 30:
        places += 1
    if 10**places % bottom:
        return f"{top}/{bottom}"
    digits = str(abs(top) * 10**places // bottom).rjust(places + 1, "0")
    sign = "-" if top < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def extract(completion: str) -> str:
    """The number that a completion gives as its answer: after the last `####` with a number behind it, in the last \\boxed{}, after
    the last "answer is", else the last number. What follows the next question does not count."""
    from .competition_math import boxed

    completion = before_next(completion)
    marked = re.findall(r"####[ \t]*(?=[^\w\n]{0,6}\d)(.*)", completion)
    if marked:
        return canonical(marked[-1])
    inside = boxed(completion)
    if inside and canonical(inside):
        return canonical(inside)
    for rest in reversed(re.split(r"(?i)answer(?:\s+is\b|\s*[:=])", completion)[1:]):
        if found := canonical(rest.split("\n")[0]):
            return found
    found = numbers(completion)
    return written(found[-1]) if found else ""
