"""Ways to check a completion that a file of problems can name: equality, one label, a number, a part, a pattern."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2kernels import InputError

from .extract import canonical, final_number

CHOICE = "choice"
"""The check that needs no completion: the model's likeliest option is its answer."""
MIXED = "mixed"
"""`Task.check` of a task whose rows name several checks in their column `check`."""


@dataclass(frozen=True)
class Check:
    """A way to check a completion.

    right: (completion, answer, options) -> whether it is right
    formed: (completion, options) -> whether it has the form of an answer, right or wrong; None if any text has
    says: what is checked, for reports
    """

    right: Callable[[str, str, Sequence[str]], bool]
    formed: Callable[[str, Sequence[str]], bool] | None
    says: str


def named(completion: str, labels: Sequence[str]) -> list[str]:
    """The labels in a text, by whole words, whatever their case. Of a label inside a longer one the longer counts."""
    known = {_plain(label): label for label in labels}
    any_of = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    if not any_of:
        return []
    found = re.findall(rf"(?<!\w)(?:{any_of})(?!\w)", _plain(completion))
    return [known[text] for text in dict.fromkeys(found)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


CHECKS: dict[str, Check] = {
    "exact": Check(lambda said, answer, _: said.strip() == answer.strip(), None, "equality"),
    "label": Check(
        lambda said, answer, labels: named(said, labels) == [answer],
        lambda said, labels: len(named(said, labels)) == 1,
        "the one label named",
    ),
    "number": Check(
        lambda said, answer, _: final_number(said) == canonical(answer) != "",
        lambda said, _: bool(final_number(said)),
        "the last number",
    ),
    "contains": Check(lambda said, answer, _: _plain(answer) in _plain(said), None, "the answer in the completion"),
    "regex": Check(lambda said, answer, _: re.search(answer, said) is not None, None, "a regular expression"),
    CHOICE: Check(lambda said, answer, _: said.strip() == answer.strip(), None, "the likeliest option"),
}
"""{name of a check: the check}."""


def check_name(check: object) -> None:
    """Raise ValueError if there is no check of this name."""
    if not isinstance(check, str) or check not in CHECKS:
        raise InputError(f"'check' is {check!r:.60}; it must be one of {', '.join(CHECKS)}")


def check_answer(check: str, answer: str, options: Sequence[str]) -> None:
    """Raise ValueError if a row's answer cannot be checked in this way: no number, no option, no regular expression."""
    check_name(check)
    if check in ("label", CHOICE):
        plain = {option: _plain(option) for option in options}
        if len(set(plain.values())) < 2:
            raise InputError(f"check {check!r} needs at least two different options; given are {list(options)!r:.80}")
        if not all(plain.values()):
            raise InputError(f"an option is empty: {list(options)!r:.120}; check {check!r} needs texts")
        if check == "label" and len(set(plain.values())) < len(plain):
            raise InputError(
                f"two of the options {list(options)!r:.120} differ only in case or spaces, and check 'label' cannot "
                "tell these apart in a completion: use check 'choice' or 'exact'"
            )
        if answer not in options:
            raise InputError(f"'answer' is {answer!r:.60}; it must be one of the options {list(options)!r:.120}")
    elif check == "number" and not canonical(answer):
        raise InputError(f"'answer' is {answer!r:.60}; check 'number' needs a number")
    elif check == "regex":
        try:
            re.compile(answer)
        except re.error as e:
            raise InputError(f"'answer' is {answer!r:.60}, no regular expression: {e}") from None


def of_row(check: str, row: Mapping[str, Any]) -> Check:
    """The check of a row of a task with this `check`."""
    return CHECKS[row["check"] if check == MIXED else check]
