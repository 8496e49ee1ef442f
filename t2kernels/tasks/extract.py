"""Find the answer in a completion: the part before the next problem, the numbers in it, the last LaTeX box."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w)\]}.])[-−–]\s?)?[$€£¥]?\s?(?:(?<=[$€£¥])[-−–])?)"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?(?P<digits>{_DIGITS})(?:\s?/\s?(?P<below>\d+)(?![\d.]))?"
)
_NEXT = re.compile(r"\n[ \t]*(?:Question|Problem|Example|Exercise|Q)[ \t]*\d*[ \t]*[:.)]")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\s\w\\-])")

LONGEST_NUMBER = 100
"""Digits. Longer numbers are ignored: arithmetic with them would be slow."""

MOST_BOXES = 19
"""Boxes to look at, from the end. Each unclosed box costs a pass over the rest of the text."""


def before_next(completion: str) -> str:
    """The completion up to the next problem, which a base model often writes by itself.

    A problem at the very start is kept: it is the prompt, repeated.
    """
    for found in _NEXT.finditer(completion):
        if completion[: found.start()].strip():
            return completion[: found.start()]
    return completion


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, in order.

    Currency signs, per cent signs and thousands separators are ignored. Fractions in LaTeX count. "1 1/2" is one
    number.
    """
    text = _FRACTION.sub(r" \1/\2", text).replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    digits, below, whole = match["digits"].replace(",", ""), match["below"], match["whole"]
    if max(map(len, (digits, below or "", whole or ""))) > LONGEST_NUMBER:
        return None
    if below is not None and (not int(below) or "." in digits):
        return None
    value = Fraction(digits) / int(below or 1) + int(whole or 0)
    return -value if any(sign in match["sign"] for sign in "-−–") else value


def canonical(text: str) -> str:
    """The first number in a text, in the form that `written` gives; "" if the text has no number."""
    found = numbers(text)
    return written(found[0]) if found else ""


def written(value: Fraction) -> str:
    """The one form in which answers are compared: 1234, -0.5, or 2/3 where the decimal would not end."""
    top, bottom = value.numerator, value.denominator
    places = 0
    while bottom > 1 and 10**places % bottom and places < 30:
        places += 1
    if 10**places % bottom:
        return f"{top}/{bottom}"
    digits = str(abs(top) * 10**places // bottom).rjust(places + 1, "0")
    sign = "-" if top < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def boxed(text: str) -> str:
    """The content of the last closed \\boxed{} or \\fbox{}, nested braces included; "" if there is none."""
    for found in list(_BOX.finditer(text))[: -MOST_BOXES - 1 : -1]:
        rest = text[found.end() :]
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,]+", rest)  # \boxed 5
            return word[0] if word else ""
        inside = braced(rest)
        if inside is not None:
            return inside.strip()
    return ""


def braced(text: str) -> str | None:
    """The text between the opening brace that `text` starts with and its closing brace; None if it is not closed."""
    depth = 0
    for i, c in enumerate(text):
        escaped = i > 0 and text[i - 1] == "\\" and (i < 2 or text[i - 2] != "\\")
        if c in "{}" and not escaped:
            depth += 1 if c == "{" else -1
            if not depth:
                return text[1:i]
    return None


def final_number(completion: str) -> str:
    """The number that a completion gives as its answer; "" if it has none. Text after the next question is ignored.

    The first of these that holds a number: the text after the last `####`, the last \\boxed{}, the text after the last
    "answer is", the last number.
    """
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
