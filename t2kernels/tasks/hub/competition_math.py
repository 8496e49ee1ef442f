"""MATH (arXiv 2103.03874): competition problems. The answer is an expression in LaTeX.

Two checkers decide whether two expressions are equal. `Task.checker` names the one in use:

    plain         this file: it makes the notation uniform and compares numbers, lists and sets by value.
                  It knows no algebra: 2\\sqrt{2} is not \\sqrt{8}.
    math-verify   if the plain checker says no, the package math-verify compares with sympy, within a time limit
"""

import re
from collections.abc import Callable
from fractions import Fraction

from t2kernels import InputError, PackageError
from t2kernels.tasks.base import Task
from t2kernels.tasks.extract import before_next, boxed, numbers, written
from t2kernels.tasks.records import Row, text

from .source import INSTALL, Dataset, Rows, Source

STOP = ("\nProblem:",)
CHECKERS = ("auto", "plain", "math-verify")


def problem(raw: Row) -> Row:
    """The problem in a row of MATH-500 or hendrycks_math.

    raw: problem, solution, level; MATH-500 has answer and subject too, hendrycks_math has type. Raises ValueError.
    """
    asked, solution = text(raw, "problem"), text(raw, "solution")
    answer = text(raw, "answer") if raw.get("answer") is not None else boxed(solution)
    if not answer:
        raise InputError(
            f"'solution' ends in {solution[-60:]!r}; expected an answer in \\boxed{{}}, or a column 'answer'"
        )
    ask = "Think step by step, and put the final answer in \\boxed{}."
    return {
        "prompt": f"Problem: {asked}\nSolution:",
        "messages": [{"role": "user", "content": f"{asked}\n\n{ask}"}],
        "answer": answer.strip(),
        "target": f" {solution}",
        "chat_target": solution,
        "category": str(raw.get("subject") or raw.get("type") or "MATH"),
        "level": str(raw.get("level", "")).removeprefix("Level "),
    }


SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def judge(checker: str) -> tuple[Callable[[str, Row], bool], str]:
    """The checker as a function (completion, row) -> whether it is right, and its description.

    checker: "plain", "math-verify", or "auto", which is math-verify if it is installed.
    Raises ValueError for an unknown checker, ImportError for math-verify without its package.
    """
    if checker not in CHECKERS:
        raise InputError(f"checker={checker!r}; it must be one of {', '.join(CHECKERS)}")
    version = None if checker == "plain" else _installed()
    if checker == "math-verify" and version is None:
        raise PackageError(f"checker='math-verify' needs the package math-verify: {INSTALL}; or checker='plain'")
    if version is None:
        why = "" if checker == "plain" else " (math-verify is not installed)"
        return (lambda completion, row: equal(extract(completion), row["answer"])), f"plain comparison of LaTeX{why}"
    from .mathverify import Verifier

    verify = Verifier()

    def right(completion: str, row: Row) -> bool:
        given = extract(completion)
        return equal(given, row["answer"]) or verify(row["answer"], given)

    return right, f"math-verify {version}, after a plain comparison of LaTeX"


def _installed() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("math-verify")
    except PackageNotFoundError:
        return None


def extract(completion: str) -> str:
    """The expression that a completion gives as its answer; "" if it has none. Text after the next problem is ignored.

    The first of these that is found: the last \\boxed{} (an unclosed one means that the completion was cut short: no
    answer), the text after the last "answer is", the text between the last dollar signs, the last number.
    """
    completion = before_next(completion)
    if (found := boxed(completion)) or re.search(r"\\(?:boxed|fbox)\s*\{", completion):
        return found
    stated = re.split(r"(?i)answer(?:\s+is\b|\s*[:=])[ \t]*:?", completion)[1:]
    for rest in (re.sub(r"[*_]{2}", "", part.split("\n")[0]).strip() for part in reversed(stated)):
        if math := re.match(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", rest):
            return next(g for g in math.groups() if g).strip()
        if rest:
            return re.split(r"\.(?:\s|$)|;|\s(?:because|since|so|and|as)\s", rest)[0].strip()
    if formulas := re.findall(r"\$([^$]+)\$", completion):
        return formulas[-1].strip()
    found = numbers(completion)
    return written(found[-1]) if found else ""


def equal(given: str, wanted: str) -> bool:
    """Whether two expressions differ in notation only."""
    if not given.strip() or len(given) > 500:
        return False
    a, b = normal(given), normal(wanted)
    return a == b or _same(a, b)


def _same(a: str, b: str) -> bool:
    x, y = value(a), value(b)
    if x is not None and y is not None:
        return x == y
    one, other = _parts(a), _parts(b)
    if one is None or other is None or one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    if one[0] in ("{}", ""):  # a set, or several solutions: any order
        left = list(other[1])
        for part in one[1]:
            match = next((i for i, o in enumerate(left) if part == o or _same(part, o)), None)
            if match is None:
                return False
            del left[match]
        return True
    return all(p == q or _same(p, q) for p, q in zip(one[1], other[1], strict=True))


_DROPPED = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits|,|;|:|!|>|quad|qquad|\$|%| )(?![a-zA-Z])"
    r"|[$~%°]|\\(?:deg|degree)(?![a-z])"
)
_UNIT = r"\\(?:text|mathrm|mbox|textrm|textbf)\s*\{[^{}]*\}(?:\^\{?\d\}?)?"


def normal(expression: str) -> str:
    """Make notation uniform: drop spaces, dollar signs, units and sizes; write \\frac{a}{b} and \\sqrt{a} in full."""
    s = expression.strip().strip("$").strip().rstrip(".,;").strip()
    s = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", s, flags=re.DOTALL)
    s = s.replace("\u2212", "-").replace("\\{", "⟨").replace("\\}", "⟩").replace("{,}", "").replace("\\\\", " ")
    s = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", s)
    s = re.sub(r"(?<=\d),\\!(?=\d{3})", "", s)
    s = _DROPPED.sub("", s)
    s = re.sub(rf"(?<=[\d}}])\s*{_UNIT}$", "", s)  # a number's unit
    s = re.sub(r"(?<=\d)\s+[a-zA-Z]{2,}(?:\s+[a-zA-Z]+)*$", "", s)  # the same, in plain words
    s = re.sub(r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"\\[dtc]frac", r"\\frac", s)
    s = re.sub(r"\s+", "", s)
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", s)
    s = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", s)
    s = re.sub(r"\\sqrt([^{\[\\])", r"\\sqrt{\1}", s)
    s = re.sub(r"([_^])\{([^{}])\}", r"\1\2", s)
    s = re.sub(r"^[a-zA-Z](?:=|\\in)(?=[^=]+$)", "", s)  # x = 5
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", s):
        s = s.replace(",", "")
    if letter := re.fullmatch(r"\(([A-Z])\)", s):
        s = letter[1]
    return s.casefold() if re.fullmatch(r"[a-zA-Z]{2,}", s) else s


def value(s: str) -> Fraction | None:
    """The value of a `normal` expression if it is an integer, decimal, fraction or mixed number, else None."""
    match = re.fullmatch(r"([-+]?)(\d+(?=\\frac))?(.+)", s)
    if not match or len(s) > 100:
        return None
    sign, whole, rest = match.groups()
    fraction = re.fullmatch(r"\\frac\{(-?\d+)\}\{(-?\d+)\}|(\d+)/(\d+)", rest)
    if fraction:
        top, bottom = (int(g) for g in fraction.groups() if g is not None)
        if not bottom:
            return None
        number = Fraction(top, bottom) + int(whole or 0)
    elif not whole and re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", rest):
        number = Fraction(rest.rstrip("."))
    else:
        return None
    return -number if sign == "-" else number


def _parts(s: str) -> tuple[str, list[str]] | None:
    """The brackets and parts of an expression; None for a single expression.

    ("()", parts) for a tuple or interval, ("{}", parts) for a set, ("", parts) for several solutions.
    """
    ends = s[:1] + s[-1:]
    ends = {"⟨⟩": "{}"}.get(ends, ends)
    inner = s[1:-1] if ends in ("()", "[]", "(]", "[)", "{}") else s
    if inner is not s and _closes_early(inner):  # (1,2),(3,4): the outer brackets do not belong together
        inner = s
    parts = _split(inner)
    if inner is s:
        return ("", parts) if len(parts) > 1 else None
    return (ends, parts) if len(parts) > 1 or ends == "{}" else None


def _closes_early(s: str) -> bool:
    depth = 0
    for c in s:
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if depth < 0:
            return True
    return False


def _split(s: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(s):
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if c == "," and not depth:
            parts.append(s[start:i])
            start = i + 1
    return [*parts, s[start:]]


def _make(name: str, rows: Rows, checker: str) -> Task:
    right, words = judge(checker)
    return Task(name, rows, judge=right, checker=words, max_new_tokens=1024, stop=STOP)


TASKS: dict[str, Dataset] = {
    "math500": Dataset(Source("HuggingFaceH4/MATH-500", problem, train=None), _make),
    "hendrycks_math": Dataset(Source("EleutherAI/hendrycks_math", problem, SUBJECTS), _make),
}
