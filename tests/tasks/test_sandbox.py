"""Right programs pass, wrong ones do not, values arrive as they are, and a layer that is missing is an error."""

import datetime
import os
import subprocess
import sys
from collections import Counter, deque
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest

from t2kernels.tasks.sandbox import Job, Limits, SandboxError, probes, report, run, run_many, runner, wire
from tests.helpers.sandboxes import LAYERS, MARK, SMALL, SQUARE, processes, wait_for


def test_this_machine_can_confine_programs():
    assert LAYERS, "neither user namespaces nor Landlock with seccomp: sampled code cannot be run here"


# --- right answers pass


def check(program: str, tests: str, *names: str, layer: str = "auto", setup: str = ""):
    return run(Job(program, tests, names, setup), replace(SMALL, isolation=layer))


@pytest.mark.parametrize("layer", LAYERS)
def test_right_and_wrong(layer):
    result = run(SQUARE, replace(SMALL, isolation=layer))
    assert (result.verdict, result.detail, result.layers) == ("passed", "", (layer, "seccomp"))
    wrong = run(
        replace(SQUARE, program="def f(x):\n    print('seen')\n    return x * 3"), replace(SMALL, isolation=layer)
    )
    assert (wrong.verdict, wrong.output) == ("wrong", "seen\nseen\n")
    broken = run(replace(SQUARE, program="def f(x):\n    return x / 0"), replace(SMALL, isolation=layer))
    assert (broken.verdict, broken.detail) == ("error", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    "program", ["def f(x) return", "def g(x):\n    return x * x", "", "raise ValueError('no')", "\0", "\ud800"]
)
def test_a_program_that_does_not_load(program):
    assert run(replace(SQUARE, program=program), SMALL).verdict == "error"


@pytest.mark.parametrize("layer", LAYERS)
def test_what_answers_may_do(layer):
    program = """
import dataclasses, functools, heapq, itertools, json, math, random, re, sqlite3, tempfile, threading, typing
@dataclasses.dataclass
class Point:
    x: int
    y: "typing.Optional[int]" = None
@functools.lru_cache
def f(n):
    out = []
    t = threading.Thread(target=lambda: out.append(Point(n).x ** 2))
    t.start()
    t.join()
    with tempfile.TemporaryFile("w+") as file:
        file.write(str(out[0]))
        file.seek(0)
        return int(file.read())
"""
    result = check(program, "assert f(3) == 9 and f(-2) == 4", "f", layer=layer)
    assert result.passed, result


def test_objects_of_the_answer_stay_there_and_can_be_used():
    program = """
class Node:
    def __init__(self, v): self.v, self.left = v, None
    def __iter__(self): return iter([self.v])
    def __len__(self): return 7
def depth(n): return 0 if n is None else 1 + depth(n.left)
def count(n):
    yield from range(n)
"""
    tests = "assert depth(root) == 2 and depth(None) == 0 and root.left.v == 5\n"
    tests += "assert list(root) == [4] and len(root) == 7 and root\n"
    tests += "assert list(count(3)) == [0, 1, 2] and next(count(2)) == 0 and root == root and not root == Node(4)\n"
    setup = "root = Node(4)\nroot.left = Node(5)"
    assert check(program, tests, "Node", "depth", "count", setup=setup).passed


def test_the_setup_s_stubs_do_not_count_and_its_helpers_do():
    setup = "def double(x):\n    return 2 * x\ndef f(x):\n    'a stub'\n"
    assert check(
        "def f(x):\n    return x + x\ndef double(x):\n    return 0", "assert f(4) == double(4) == 8", "f", setup=setup
    ).passed


def test_exceptions_of_the_answer_reach_the_tests():
    tests = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    raise AssertionError"
    assert check("def f(x):\n    return 1 / x", tests, "f").passed
    assert check("def f(x):\n    return 1", tests, "f").verdict == "wrong"
    assert check("def f(x):\n    raise SystemExit", tests, "f").verdict == "error"


def test_tests_cannot_be_run_out_of_time_by_the_answer():
    slow = Job("def f():\n    return 1", "while f():\n    pass", ("f",))
    assert run(slow, SMALL).verdict == "timeout"


class Text(str):
    pass


VALUES = [
    None,
    True,
    0,
    -1,
    2**53,
    -(2**70),
    10**5000,
    0.1,
    -0.0,
    float("inf"),
    "",
    "é\ud800\n",
    b"\0\xff",
    1 + 2j,
    range(3, 9, 2),
    [],
    (),
]
VALUES += [
    [1, [2, (3,)]],
    {1: "a", (2, 3): [4]},
    {"h": 1},
    {1, 2},
    frozenset({1}),
    deque([1]),
    Decimal("1.10"),
    Fraction(-1, 3),
    {(): {}},
]
VALUES += [
    datetime.date(2020, 1, 2),
    datetime.datetime(2020, 1, 2, 3),
    datetime.timedelta(1, 2, 3),
    datetime.time(1, 2),
]


def no_reference(value):
    raise TypeError(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_values_arrive_as_they_are(value):
    read, write = os.pipe()
    wire.send(write, wire.encode(value, no_reference))
    found = wire.decode(wire.receive(read), no_reference)
    assert found == value
    assert type(found) is type(value)
    os.close(read)
    os.close(write)


def test_subclasses_arrive_as_plain_data_and_objects_do_not_arrive():
    assert wire.encode([Text("a"), Counter("aa")], no_reference) == ["a", {"d": [["a", 2]]}]
    assert type(wire.encode(Text("a"), no_reference)) is str
    with pytest.raises(TypeError):
        wire.encode(object(), no_reference)
    for nonsense in ({"i": "x"}, {"?": 1}, {}, {"s": [[]]}, {"t": 1}, {"d": [1]}, {"m": ["eval", "1"]}, {"f": "1"}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            wire.decode(nonsense, no_reference)
    assert check("def f(x):\n    return x", "f(object())", "f").verdict == "error"


def test_a_program_too_long_for_a_message_is_an_error_and_not_raised():
    result = run(replace(SQUARE, program="#" * (wire.LARGEST + 1)), SMALL)
    assert result.verdict == "error"
    assert f"{wire.LARGEST} is the most" in result.detail


@pytest.mark.parametrize("said", [b'\0\0\0\x0a{"verdict"', b'\0\0\0\x05{"ver'])
def test_half_a_verdict_is_no_verdict(said, monkeypatch):
    """The judge can be killed while it writes."""
    monkeypatch.setattr(runner, "_ask_warden", lambda *_: (said, b""))
    assert run(SQUARE, replace(SMALL, isolation="none")).verdict == "timeout"


# --- the machinery


def test_many_keep_their_order():
    jobs = [replace(SQUARE, program=f"def f(x):\n    return x * {n}") for n in (3, 1, -2, 3)]
    jobs[1] = SQUARE
    seen = []
    results = run_many(jobs, SMALL, workers=3, done=seen.append)
    assert [r.passed for r in results] == [False, True, False, False]
    assert sum(seen) == 4
    assert run_many([], SMALL) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_report_says_what_holds(layer):
    found = report(replace(SMALL, isolation=layer))
    assert found.pop("isolation") == f"{layer} + seccomp"
    assert len(found) >= 13
    assert all(found.values()), found


def test_the_report_says_what_does_not_hold(monkeypatch):
    monkeypatch.setattr(probes, "ATTEMPTS", {"arithmetic": "1 + 1", "network": probes.ATTEMPTS["network"]})
    found = report(SMALL)
    assert not found["arithmetic"]
    assert found["network"]


def test_without_isolation_there_are_limits_only(monkeypatch):
    """Asked for by name, and said in the result. As root it needs an interpreter that others may read."""
    if os.getuid() == 0 and os.path.exists("/usr/bin/python3"):
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    result = run(SQUARE, replace(SMALL, isolation="none"))
    assert result.passed
    assert set(result.layers) <= {"seccomp"}
    assert run(Job("while True: pass", "", ()), replace(SMALL, isolation="none")).verdict != "passed"
    assert not processes(MARK)


@pytest.fixture
def refusing(monkeypatch, tmp_path):
    """Machines that refuse some layers: refusing("namespaces") makes the warden say so."""

    def refuse(*layers: str) -> None:
        message = '{"verdict": "refused", "detail": "no", "layers": []}'
        answer = f"printf '\\0\\0\\0\\{len(message):o}%s' '{message}'"
        tests = " ".join(f"""*'"isolation": "{layer}"'*) cat >/dev/null; {answer}; exit;;""" for layer in layers)
        stub = tmp_path / "python"
        stub.write_text(f'#!/bin/sh\ncase "$*" in {tests} esac\nexec {sys.executable} "$@"\n')
        stub.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stub))

    monkeypatch.setattr(runner, "_works", [])
    return refuse


def test_auto_takes_what_there_is_and_a_name_means_that_or_an_error(refusing):
    refusing("namespaces")
    assert run(SQUARE, SMALL).layers == ("filters", "seccomp")
    assert runner._works == ["filters"]
    with pytest.raises(SandboxError, match=r"isolation='namespaces' \(namespaces: no\)"):
        run(SQUARE, replace(SMALL, isolation="namespaces"))


def test_nothing_runs_where_nothing_confines(refusing):
    refusing("namespaces", "filters")
    with pytest.raises(SandboxError, match=r"isolation='auto' \(namespaces: no; filters: no\).*isolation='none'"):
        run(SQUARE, SMALL)


def test_what_is_asked_for_must_be_possible(monkeypatch):
    with pytest.raises(ValueError, match="isolation='docker'; it must be one of auto, namespaces"):
        Limits(isolation="docker")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="only be confined on Linux, and this is darwin"):
        run(SQUARE, SMALL)


def test_the_end_of_the_caller_is_the_end_of_everything(tmp_path):
    code = "from t2kernels.tasks.sandbox import *\n"
    code += "run(Job('import time; time.sleep(1000)', '', ()), Limits(wall_seconds=float(1000 + %s)))"
    process, mark = (
        subprocess.Popen([sys.executable, "-c", code % MARK], env={**os.environ, "TMPDIR": str(tmp_path)}),
        f'"wall_seconds": {1000 + float(MARK)}',
    )
    wait_for(lambda: len(processes(mark)) >= 3)
    process.kill()
    process.wait()
    wait_for(lambda: not processes(mark))
