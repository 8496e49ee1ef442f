"""The answer in a completion, and whether it is right."""

import time
from fractions import Fraction
from pathlib import Path

import pytest

from t2kernels import tasks
from t2kernels.tasks import extract
from t2kernels.tasks.hub import arc, competition_math, gsm8k, textvqa

# --- numbers


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("... #### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### $-5", "-5"),
        ("####-$5.25", "-5.25"),
        ("####18", "18"),
        ("#### 18 dollars", "18"),
        ("#### 18.00", "18"),
        ("#### €1,000", "1000"),
        ("#### 20%", "20"),
        ("#### 0.5\n", "0.5"),
        ("#### .5", "0.5"),
        ("#### 1/2", "0.5"),
        ("#### 2/3", "2/3"),
        ("#### 1 1/2", "1.5"),
        ("#### 18.", "18"),
        ("So she has 16 - 3 - 4 = 9 eggs and 9 * 2 = 18.", "18"),
        ("The answer is 18.", "18"),
        ("The answer is 18. She also had 3 left over.", "18"),
        ("The final answer is: $18", "18"),
        ("**Answer:** 18 (not 19)", "18"),
        ("Answer = -0.25", "-0.25"),
        ("The answer is \\boxed{1{,}234}.", "1234"),
        ("so \\boxed{\\frac{1}{2}} of 10", "0.5"),
        ("so \\boxed{\\$1,200} is 3 times", "1200"),
        ("The answer is $\\dfrac{3}{4}$", "0.75"),
        ("#### Step 1: 3 apples\n#### Step 2: 4\nAll in all 7.", "7"),
        ("#### 5\nNo, wait.\n#### 6", "6"),
        ("#### 18\n\nQuestion: Tom has 3 dogs.\nAnswer: #### 3", "18"),
        ("Question: How many?\nAnswer: 4 + 4 = 8\n#### 8", "8"),
        ("Question: How many?\nAnswer: #### 8\n\nQuestion: And 9?\nAnswer: #### 9", "8"),
        ("#### 18\n\nQ2: what is 5?", "18"),
        ("5-3 = 2", "2"),
        ("The answer is not known.", ""),
        ("", ""),
        ("####", ""),
        ("no number", ""),
        ("1/0", ""),
        ("#### " + "9" * 5000, ""),
    ],
)
def test_numbers(completion, answer):
    assert gsm8k.extract(completion) == answer


def test_a_number_is_written_in_one_way():
    values = [
        Fraction(7),
        Fraction(-7, 2),
        Fraction(1, 8),
        Fraction(2, 3),
        Fraction(0),
        Fraction(-1, 100),
        Fraction(10**20),
    ]
    assert [extract.written(v) for v in values] == ["7", "-3.5", "0.125", "2/3", "0", "-0.01", "1" + 20 * "0"]
    assert all(extract.numbers(extract.written(v)) == [v] for v in values)


HOSTILE = [
    "\n",
    " ",
    "1,",
    "#### ",
    "answer is ",
    "\\boxed{",
    "$",
    "(",
    "```\n",
    "-",
    "1/",
    "Question:\n",
    "{",
    "A. ",
    "\\frac{",
]


def cpu_seconds(text):
    """CPU time to judge a text by every task, the least of three."""
    took = []
    for _ in range(3):
        start = time.process_time()
        gsm8k.extract(text)
        competition_math.equal(competition_math.extract(text), "1")
        arc.choice(text, ["one", "two"])
        textvqa.judge(text, {"answer": "1"})
        took.append(time.process_time() - start)
    return min(took)


def test_extraction_takes_linear_time_for_hostile_text():
    """Eight times the text takes about 8 times as long; 64 times would be quadratic."""
    short = {piece: cpu_seconds(piece * 2000) for piece in HOSTILE}
    typical = sum(short.values()) / len(short)  # the fastest are too short to be timed alone
    for piece in HOSTILE:
        assert cpu_seconds(piece * 16000) < 24 * max(short[piece], typical), piece


# --- expressions


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        (
            "\\boxed{\\left\\{ x : \\sqrt{\\frac{a}{b}} \\right\\}} done",
            "\\left\\{ x : \\sqrt{\\frac{a}{b}} \\right\\}",
        ),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\fbox{7}", "7"),
        ("\\boxed 5 and", "5"),
        ("\\boxed{3", ""),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("The answer is \\(x^2\\).", "x^2"),
        ("Answer: 3\\sqrt{2}", "3\\sqrt{2}"),
        ("**Answer:** $\\pi$", "\\pi"),
        ("The answer is 5 because 2+3=5.", "5"),
        ("we get $x=1$ and so $y=2$", "y=2"),
        ("in total 12", "12"),
        ("\\boxed{1}\n\nProblem: what?\nSolution: \\boxed{2}", "1"),
        ("", ""),
    ],
)
def test_expressions(completion, answer):
    assert competition_math.extract(completion) == answer


EQUAL = [
    ("\\frac{1}{2}", "1/2"), ("0.5", "\\frac12"), ("\\dfrac{1}{2}", "\\tfrac12"), ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("1\\frac12", "1.5"),
    ("10\\text{ cm}", "10"), ("10 \\mbox{ cm}^2", "10"), ("5 units", "5"), ("90^\\circ", "90"), ("90°", "90"),
    ("50\\%", "50"), ("\\$12", "12"),
    ("1,234", "1234"), ("10{,}000", "10000"), ("10,\\!236", "10236"), ("x=5", "5"), ("x \\in [2,5)", "[2,5)"),
    ("(1, 2)", "(1,2)"),
    ("\\left(1,\\frac{1}{2}\\right)", "(1,0.5)"), ("\\{2,1\\}", "\\{1,2\\}"), ("-2, 1", "1,-2"),
    ("(3,4),(1,2)", "(1,2),(3,4)"),
    ("\\text{Monday}", "monday"), ("\\text{(C)}", "C"), ("2516_{8}", "2516_8"),
    ("\\frac{\\sqrt3}{2}", "\\frac{\\sqrt{3}}{2}"), ("$7$", "7."),
    ("+3", "3"), ("3.0", "3"), ("\u22123", "-3"), ("\\(4\\)", "4"), ("x^{2}+1", "x^2 + 1"),
    ("[0,\\infty)", "[0, \\infty )"),
]  # fmt: skip
DIFFERENT = [
    ("1", "2"), ("", "1"), ("(1,2)", "(2,1)"), ("(1,2]", "(1,2)"), ("[1,2]", "\\{1,2\\}"), ("\\{1,1\\}", "\\{1,2\\}"),
    ("1,2", "1,2,3"), ("a", "A"),
    ("\\sqrt{2}", "2"), ("x", "y"), ("-1", "1"), ("\\frac{1}{0}", "0"), ("(1,234)", "1234"), ("12", "1,2"),
    ("2^3", "8_3"), ("cm", "10\\text{ cm}"),
    ("1" * 501, "1" * 501),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert competition_math.equal(a, b)
    assert competition_math.equal(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not competition_math.equal(a, b)


@pytest.fixture(scope="module")
def verifier():
    from t2kernels.tasks.hub.mathverify import Verifier

    verifier = Verifier(seconds=5.0)
    yield verifier
    verifier.close()


def test_math_verify_knows_algebra(verifier):
    algebra = [
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("x^2+1", "1+x^2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\frac{2}{\\sqrt2}", "\\sqrt{2}"),
    ]
    assert not any(competition_math.equal(a, b) for a, b in algebra)
    assert all(verifier(a, b) for a, b in algebra)
    assert not any(verifier(a, b) for a, b in DIFFERENT[:7])


def test_math_verify_is_ended_when_it_takes_too_long(verifier):
    verifier.seconds = 1.0
    assert not verifier("2", "9^{9^{9^9}}")
    assert verifier._process is None  # it was killed, and is not waited for
    verifier.seconds = 5.0
    assert verifier("\\sqrt{8}", "2\\sqrt{2}")  # by a new process
    assert not verifier("2", "\\frac{")


def test_the_checker_is_chosen_and_stated(monkeypatch):
    path = str(Path(__file__).parents[1] / "data" / "math.jsonl")
    task = tasks.load("math500", path, checker="math-verify")
    assert task.checker.startswith("math-verify 0")
    assert tasks.load("math500", path).checker == task.checker
    plain = tasks.load("math500", path, checker="plain")
    assert plain.checker == "plain comparison of LaTeX"
    assert task.right("\\boxed{1+x^2}", "x^2+1")
    assert not plain.right("\\boxed{1+x^2}", "x^2+1")
    assert plain.right("\\boxed{\\frac12}", "0.5")
    assert not task.right("\\boxed{3}", "x^2+1")
    with pytest.raises(ValueError, match="checker='sympy'; it must be one of auto, plain, math-verify"):
        tasks.load("math500", path, checker="sympy")
    monkeypatch.setattr(competition_math, "_installed", lambda: None)
    assert tasks.load("math500", path).checker == "plain comparison of LaTeX (math-verify is not installed)"
    with pytest.raises(ImportError, match=r"pip install 't2kernels\[tasks\]'; or checker='plain'"):
        tasks.load("math500", path, checker="math-verify")


# --- options

OPTIONS = ["the Sun", "the Moon", "an iron nail", "a nail"]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("B", "B"), (" B", "B"), ("B.", "B"), ("B)", "B"), ("(B)", "B"), ("[B]", "B"), ("b)", "B"),
        ("B: the Moon", "B"), ("**B**", "B"), ("B\n\nBecause", "B"),
        ("The answer is B.", "B"), ("The answer is (B).", "B"), ("The correct answer is: B", "B"),
        ("Answer: (b) the Moon", "B"), ("answer is **B**", "B"),
        ("A is wrong, as it is hot. The answer is B.", "B"), ("The answer is option B", "B"),
        ("The answer is A. No: the answer is B.", "B"),
        ("2", "B"), ("(2)", "B"), ("The answer is 2.", "B"), ("\\boxed{B}", "B"), ("\\boxed{\\text{B}}", "B"),
        ("I choose (B) here", "B"), ("Reasoning.\n\nB", "B"),
        ("the Moon", "B"), ("The Moon.", "B"), ("It is the moon, of course", "B"), ("The answer is the Moon.", "B"),
        ("The answer is a nail", "D"),
        ("an iron nail", "C"), ("B\n\nQuestion: what?\nAnswer: C", "B"), ("Question: which?\nAnswer: B", "B"),
        ("A dog", ""), ("E", ""), ("5", ""), ("", ""), ("the Sun or the Moon", ""), ("(A) or (B)", ""),
        ("I do not know", ""), ("Because", ""), ("A nail", "D"),
    ],
)  # fmt: skip
def test_options(completion, letter):
    assert arc.choice(completion, OPTIONS) == letter


def test_options_of_another_number():
    assert arc.choice("E", ["1", "2", "3", "4", "5"]) == "E"
    assert arc.choice("D", ["x", "y", "z"]) == ""
    assert arc.choice("The answer is 30", ["10", "20", "30"]) == "C"


# --- TextVQA


def test_textvqa():
    answers = ["stop"] * 5 + ["stop sign"] * 3 + ["the sign", "go"]
    row = {"answer": "stop", "answers": answers}
    right = ["stop", "Stop.", " STOP\nQuestion: x", "a stop sign"]
    assert [textvqa.judge(c, row) for c in [*right, "go", "sign", "", "stop go"]] == [True] * 4 + [False] * 4
    assert textvqa.judge("go", {"answer": "go", "answers": ["go", "stop"]})
    assert textvqa.accuracy("stop", answers) == 1.0
    assert textvqa.accuracy("go", answers) == pytest.approx((9 * (1 / 3) + 0) / 10)
    assert textvqa.accuracy("no", answers) == 0.0
    assert [textvqa.plain(t) for t in ("The two dogs!", "1,000", "3.5", "St. Mary's", "")] == [
        "2 dogs",
        "1000",
        "3.5",
        "st mary's",
        "",
    ]
