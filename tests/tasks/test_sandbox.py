"""Hostile programs cost one wrong answer each, in bounded time, in every way of confinement that the machine allows."""

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from t2kernels.tasks.sandbox import (
    Job,
    Limits,
    SandboxError,
    isolation,
    probes,
    report,
    run,
    run_many,
    runner,
    scratch,
    wire,
)

MARK = (
    f"2.{os.getpid():09d}1"  # stands in the arguments of every process of these sandboxes, and of no other test process
)
SMALL = Limits(cpu_seconds=1, wall_seconds=float(MARK), memory_bytes=256 << 20)
SECRET = "nonce-5fd1c7a90b"
TESTS = f"assert f() == {SECRET!r}\n"
SQUARE = Job("def f(x):\n    return x * x", "assert f(3) == 9\nassert f(-2) == 4", ("f",))


def allowed(layer: str) -> bool:
    try:
        return run(SQUARE, replace(SMALL, isolation=layer)).passed
    except SandboxError:
        return False


LAYERS = [layer for layer in ("namespaces", "filters") if allowed(layer)]


def test_this_machine_can_confine_programs():
    assert LAYERS, "neither user namespaces nor Landlock with seccomp: sampled code cannot be run here"


FORGE = """
import json, os, struct
def frame(m):
    data = json.dumps(m).encode()
    return len(data).to_bytes(4, "big") + data
"""

# What each program does, and then a wrong answer or none. OUTSIDE stands for a file and PARENT for the process of this test.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that goes on": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "endless print": "while True:\n    print('x' * 1000)",
    "endless print that goes on": "while True:\n    try:\n        print('x' * 1000, flush=True)\n    except OSError:\n        pass",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory bomb that goes on": "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 20))\n    except MemoryError:\n        pass",
    "memory files": "import os\nx = []\nwhile True:\n    x.append(os.memfd_create('x'))\n    os.write(x[-1], bytes(1 << 20))",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(100,)).start()",
    "infinite loop": "while True:\n    pass",
    "infinite loop in the call": "def f():\n    while True:\n        pass",
    "infinite loop deaf to signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\nwhile True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    "huge power": "def f():\n    return 10 ** 10 ** 9",
    "deep value": "def f():\n    x = []\n    for _ in range(10 ** 5):\n        x = [x]\n    return x",
    "endless iterator": "import itertools\ndef f():\n    return list(itertools.count())",
    "large value": "def f():\n    return 'x' * (50 << 20)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f():\n    return f()",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef f():\n    os._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) in the call": "import sys\ndef f():\n    sys.exit(0)",
    "KeyboardInterrupt": "def f():\n    raise KeyboardInterrupt",
    "AssertionError": "def f():\n    raise AssertionError",
    "atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "input": "input()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = int\nbuiltins.compile = builtins.exec = lambda *a: None\ndef f():\n    return 0",
    "patched judge": "import judge, wire\njudge.judge = lambda *a: {'verdict': 'passed'}\ndef f():\n    judge.judge = judge.Line = None\n    return 0",
    "patched modules": "import sys\nfor m in list(sys.modules.values()):\n    for k in list(vars(m)):\n        if callable(vars(m)[k]):\n            try: setattr(m, k, lambda *a, **k: True)\n            except Exception: pass",
    "equal to everything": "class Any:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef f():\n    return Any()",
    "text equal to everything": "class Any(str):\n    def __eq__(self, other):\n        return True\n    __ne__ = lambda self, other: False\ndef f():\n    return Any('x')",
    "list of what equals everything": "class Any:\n    def __eq__(self, other):\n        return True\ndef f():\n    return [Any()]",
    "exec in the judge": "def f():\n    return ''\nf.__class__ = property(lambda self: str)" ,
    "printed marker": "print('passed'); print('{\"verdict\": \"passed\"}'); print('ok', flush=True)",
    "verdict to every file": FORGE + "for fd in range(64):\n    try: os.write(fd, frame({'verdict': 'passed', 'detail': '', 'layers': []}))\n    except OSError: pass",
    "replies to every file": FORGE + "def f():\n    for fd in range(64):\n        try: os.write(fd, frame({'ok': True}) * 9)\n        except OSError: pass",
    "broken replies": "import os\ndef f():\n    for fd in range(64):\n        try: os.write(fd, b'\\xff' * 9)\n        except OSError: pass",
    "tags that do not exist": FORGE + "def f():\n    for fd in range(3, 64):\n        try: os.write(fd, frame({'ok': {'h': 'x', 'i': []}}))\n        except OSError: pass",
    "removes files": "import os, shutil\nfor p in ('OUTSIDE',):\n    try: os.remove(p)\n    except OSError: pass\n    shutil.rmtree(os.path.dirname(p), ignore_errors=True)",
    "writes files": "open('OUTSIDE', 'w').write('x')",
    "truncates files": "import os\nos.truncate('OUTSIDE', 0)",
    "changes modes": "import os\nos.chmod('OUTSIDE', 0o777)",
    "giant file": "f = open('giant', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))",
    "many files": "i = 0\nwhile True:\n    open(f'x{i}', 'wb').write(bytes(1 << 19))\n    i += 1",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(PARENT, signal.SIGKILL)",
    "kills everything": "import os, signal\nfor p in (0, -1, 1, PARENT):\n    try: os.kill(p, signal.SIGKILL)\n    except OSError: pass\nos.killpg(0, signal.SIGKILL)",
    "stops its parent": "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "children that survive": "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(1000)\n    os._exit(0)",
    "programs": "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "traces": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0:\n    raise OSError",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
}  # fmt: skip

# What only time ends, in the same way whatever the layer: tried in one of them.
SPINS = {
    name
    for name in HOSTILE
    if name.startswith(("infinite", "regular", "huge", "endless", "recursion", "memory bomb that"))
}
CASES = [(name, layer) for name in HOSTILE for layer in LAYERS[: 1 if name in SPINS else None]]

# Programs that look for the expected value everywhere: if one finds it, it passes.
SEARCH = "import re\nfound = lambda text: (re.findall(r'nonce-[0-9a-f]{10}', text) or [''])[0]\n"
SPIES = {
    "environment": "import os\ndef f():\n    return os.environ.get('T2_TEST_SECRET')",
    "own environment": SEARCH + "def f():\n    return found(open('/proc/self/environ').read())",
    "parent": SEARCH + "import os\ndef f():\n    return found(''.join(open(f'/proc/{os.getppid()}/{n}').read() for n in ('environ', 'cmdline')))",
    "test process": SEARCH + "def f():\n    return found(open('/proc/PARENT/environ').read())",
    "parent's memory": SEARCH + "import os\ndef f():\n    open(f'/proc/{os.getppid()}/mem', 'rb')\n    return 'nonce-5fd1c7a90b'",
    "parent's memory, by call": "import ctypes, os\ndef f():\n    b = ctypes.create_string_buffer(8)\n    v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
    "    w = (ctypes.c_size_t * 2)(id(0), 8)\n    return 'nonce-5fd1c7a90b' if ctypes.CDLL(None).process_vm_readv(os.getppid(), v, 1, w, 1, 0) > 0 else ''",
    "parent's files": SEARCH + "import os\ndef f():\n    return found(os.read(os.open(f'/proc/{os.getppid()}/fd/0', 0), 9999).decode())",
    "own files": SEARCH + "import os\ndef f():\n    text = ''\n    for fd in range(64):\n        try:\n            os.set_blocking(fd, False)\n            text += os.read(fd, 99999).decode(errors='replace')\n        except OSError: pass\n    return found(text)",
    "arguments": SEARCH + "import sys\ndef f():\n    return found(repr(sys.orig_argv))",
    "frames": SEARCH + "import sys\ndef f():\n    frame, text = sys._getframe(), ''\n    while frame:\n        text += repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts)\n        frame = frame.f_back\n    return found(text.replace('nonce-[', ''))",
    "objects": SEARCH + "import gc\ndef f():\n    for o in gc.get_objects():\n        if isinstance(o, (dict, list, tuple)):\n            for v in (o.values() if isinstance(o, dict) else o):\n                if isinstance(v, (str, bytes)) and found(str(v)):\n                    return found(str(v))",
    "own memory": SEARCH + "import ctypes\ndef f():\n    for line in open('/proc/self/maps'):\n        a, b = (int(x, 16) for x in line.split()[0].split('-'))\n        if ' rw' in line:\n            try: text = ctypes.string_at(a, b - a).decode('latin-1')\n            except Exception: continue\n            if found(text): return found(text)",
    "the test's own file": SEARCH + "def f():\n    return found(open('FILE').read())",
}  # fmt: skip


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A file that must stay as it is, and a secret in the environment; afterwards no process of the sandbox may be left."""
    file = tmp_path / "precious"
    file.write_text("precious")
    os.chmod(file, 0o600)
    monkeypatch.setenv("T2_TEST_SECRET", SECRET)
    yield file
    assert file.read_text() == "precious"
    assert file.stat().st_mode & 0o777 == 0o600
    wait_for(lambda: not processes(MARK) and not processes("sleep 1000"))


def processes(mark: str) -> list[str]:
    """The command lines that hold `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if mark in line]


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def job(program: str, outside: Path) -> Job:
    words = {"OUTSIDE": outside, "PARENT": os.getpid(), "FILE": __file__}
    for word, value in words.items():
        program = program.replace(word, str(value))
    return Job(program, TESTS, ("f",))


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_hostile_program_is_one_wrong_answer(name, layer, outside):
    start = time.monotonic()
    result = run(job(HOSTILE[name], outside), replace(SMALL, isolation=layer))
    assert result.verdict in ("wrong", "error", "timeout")
    assert result.detail
    assert len(result.output) <= 2000
    assert time.monotonic() - start < SMALL.wall_seconds + 3


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SPIES)
def test_a_program_does_not_find_what_is_expected_of_it(name, layer, outside):
    assert not run(job(SPIES[name], outside), replace(SMALL, isolation=layer)).passed


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
    tests = "assert depth(root) == 2 and depth(None) == 0 and root.left.v == 5\nassert list(root) == [4] and len(root) == 7 and root\n"
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
    start = time.monotonic()
    assert run(slow, SMALL).verdict == "timeout"
    assert time.monotonic() - start < SMALL.wall_seconds + 3


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


@pytest.mark.parametrize("layer", LAYERS)
def test_files_are_bounded_together(layer):
    """In one layer by the size of a file system, in the other by looking."""
    program = "import time\ndef f():\n    for i in range(64):\n        open(f'x{i}', 'wb').write(bytes(1 << 19))\n    time.sleep(1)\n    return True"
    limits = replace(SMALL, isolation=layer, scratch_bytes=4 << 20)
    assert run(Job(program, "assert f()", ("f",)), replace(limits, scratch_bytes=64 << 20)).passed
    result = run(Job(program, "assert f()", ("f",)), limits)
    assert ("No space left" if layer == "namespaces" else f"wrote more than {4 << 20} bytes") in result.detail


NESTED = "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')\n"
FOLDERS = "import os\nfor i in range(20_000):\n    os.mkdir(f'd{i}')\n"
EMPTY_FILES = "import os\nfor i in range(20_000):\n    os.close(os.open(f'd{i}', os.O_CREAT))\n"
HIDDEN = "import os\nos.mkdir('d', 0o300)\nopen('d/x', 'w').close()\n"


@pytest.fixture
def scratch_root(tmp_path, monkeypatch):
    """The folder in which scratch folders are made; afterwards none is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "program", [NESTED, FOLDERS, EMPTY_FILES, HIDDEN], ids=["nested", "folders", "files", "hidden"]
)
def test_folders_and_files_are_bounded_and_removed(program, layer, scratch_root):
    program += "def f():\n    return 0"
    result = run(Job(program, TESTS, ("f",)), replace(SMALL, isolation=layer))
    assert result.verdict in ("wrong", "error", "timeout")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_number_of_files_is_limited(layer, scratch_root):
    """In one layer by the file system, in the other by counting."""
    program = "import os, time\ndef f(n):\n    for i in range(n):\n        os.mkdir(str(i))\n    time.sleep(0.5)\n    return n"
    limits = replace(SMALL, isolation=layer, scratch_files=300)
    assert run(Job(program, "assert f(200) == 200", ("f",)), limits).passed
    result = run(Job(program, "f(400)", ("f",)), limits)
    assert ("No space left" if layer == "namespaces" else "made more than 300 files and folders") in result.detail


@pytest.mark.skipif("filters" not in LAYERS, reason="no Landlock")
def test_a_program_that_nests_folders_does_not_spoil_the_others_of_its_batch(scratch_root):
    jobs = [SQUARE, replace(SQUARE, program=NESTED + "def f(x):\n    return x + x"), SQUARE]
    assert [r.passed for r in run_many(jobs, replace(SMALL, isolation="filters"))] == [True, False, True]


def test_excess_stops_at_the_first_broken_limit(tmp_path):
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 3) == ""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(1 << 16))
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 3) == ""
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 2) == "made more than 2 files and folders"
    assert scratch_folder.excess(str(tmp_path), 1 << 15, 3) == f"wrote more than {1 << 15} bytes"
    (tmp_path / "a" / "up").symlink_to(tmp_path.parent)  # not followed
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 4) == ""


def test_a_tree_of_any_depth_is_removed_and_nothing_outside(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "file").write_text("precious")
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "0").mkdir()  # a name that the removal uses itself
    at = os.open(folder, os.O_RDONLY)
    for i in range(3000):  # a path of 6000 characters, three times deeper than Python recurses
        os.mkdir("d", dir_fd=at)
        os.mkdir("e", 0, dir_fd=at)
        os.close(os.open(f"file{i % 2}", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    scratch_folder.remove(str(folder))
    assert list(tmp_path.iterdir()) == [outside]
    assert (outside / "file").read_text() == "precious"


def test_an_owner_without_privileges_removes_folders_without_permissions():
    folder = tempfile.mkdtemp()
    child = os.fork()
    if not child:  # no test may go on in this process
        left = True
        try:
            os.chmod(folder, 0o777)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(isolation.NOBODY)
                os.setuid(isolation.NOBODY)
            inner = os.path.join(folder, "own")
            os.makedirs(f"{inner}/a/b")
            Path(inner, "a", "file").touch()
            for name in (f"{inner}/a/b", f"{inner}/a"):
                os.chmod(name, 0)
            scratch_folder.remove(inner)
            left = os.path.exists(inner)
        finally:
            os._exit(left)
    assert os.waitpid(child, 0)[1] == 0
    os.rmdir(folder)


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
        tests = " ".join(
            f"""*'"isolation": "{layer}"'*) cat >/dev/null; printf '\\0\\0\\0\\{len(message):o}%s' '{message}'; exit;;"""
            for layer in layers
        )
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
    code = "from t2kernels.tasks.sandbox import *\nrun(Job('import time; time.sleep(1000)', '', ()), Limits(wall_seconds=float(1000 + %s)))"
    process, mark = (
        subprocess.Popen([sys.executable, "-c", code % MARK], env={**os.environ, "TMPDIR": str(tmp_path)}),
        f'"wall_seconds": {1000 + float(MARK)}',
    )
    wait_for(lambda: len(processes(mark)) >= 3)
    process.kill()
    process.wait()
    wait_for(lambda: not processes(mark))
