"""Hostile programs cost one wrong answer each, in bounded time, in every layer that the machine allows."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from t2kernels.tasks.sandbox import Job, run
from tests.helpers.sandboxes import LAYERS, MARK, SMALL, processes, wait_for

SECRET = "nonce-5fd1c7a90b"
TESTS = f"assert f() == {SECRET!r}\n"
FORGE = """
import json, os, struct
def frame(m):
    data = json.dumps(m).encode()
    return len(data).to_bytes(4, "big") + data
"""

# Name: a program that does harm and then gives a wrong answer or none. OUTSIDE is replaced by the path of a file, and
# PARENT by the id of the test's process.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that goes on": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "endless print": "while True:\n    print('x' * 1000)",
    "endless print that goes on": (
        "while True:\n    try:\n        print('x' * 1000, flush=True)\n    except OSError:\n        pass"
    ),
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory bomb that goes on": (
        "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 20))\n    except MemoryError:\n        pass"
    ),
    "memory files": (
        "import os\nx = []\nwhile True:\n    x.append(os.memfd_create('x'))\n    os.write(x[-1], bytes(1 << 20))"
    ),
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(100,)).start()",
    "infinite loop": "while True:\n    pass",
    "infinite loop in the call": "def f():\n    while True:\n        pass",
    "infinite loop deaf to signals": (
        "import signal\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\n"
        "while True: pass"
    ),
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
    "patched builtins": (
        "import builtins\n"
        "builtins.AssertionError = int\n"
        "builtins.compile = builtins.exec = lambda *a: None\n"
        "def f():\n"
        "    return 0"
    ),
    "patched judge": (
        "import judge, wire\n"
        "judge.judge = lambda *a: {'verdict': 'passed'}\n"
        "def f():\n"
        "    judge.judge = judge.Line = None\n"
        "    return 0"
    ),
    "patched modules": (
        "import sys\n"
        "for m in list(sys.modules.values()):\n"
        "    for k in list(vars(m)):\n"
        "        if callable(vars(m)[k]):\n"
        "            try: setattr(m, k, lambda *a, **k: True)\n"
        "            except Exception: pass"
    ),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef f():\n    return Any()"
    ),
    "text equal to everything": (
        "class Any(str):\n"
        "    def __eq__(self, other):\n"
        "        return True\n"
        "    __ne__ = lambda self, other: False\n"
        "def f():\n"
        "    return Any('x')"
    ),
    "list of what equals everything": (
        "class Any:\n    def __eq__(self, other):\n        return True\ndef f():\n    return [Any()]"
    ),
    "exec in the judge": "def f():\n    return ''\nf.__class__ = property(lambda self: str)",
    "printed marker": "print('passed'); print('{\"verdict\": \"passed\"}'); print('ok', flush=True)",
    "verdict to every file": (
        FORGE + "for fd in range(64):\n"
        "    try: os.write(fd, frame({'verdict': 'passed', 'detail': '', 'layers': []}))\n"
        "    except OSError: pass"
    ),
    "replies to every file": (
        FORGE + "def f():\n"
        "    for fd in range(64):\n"
        "        try: os.write(fd, frame({'ok': True}) * 9)\n"
        "        except OSError: pass"
    ),
    "broken replies": (
        "import os\n"
        "def f():\n"
        "    for fd in range(64):\n"
        "        try: os.write(fd, b'\\xff' * 9)\n"
        "        except OSError: pass"
    ),
    "tags that do not exist": (
        FORGE + "def f():\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, frame({'ok': {'h': 'x', 'i': []}}))\n"
        "        except OSError: pass"
    ),
    "removes files": (
        "import os, shutil\n"
        "for p in ('OUTSIDE',):\n"
        "    try: os.remove(p)\n"
        "    except OSError: pass\n"
        "    shutil.rmtree(os.path.dirname(p), ignore_errors=True)"
    ),
    "writes files": "open('OUTSIDE', 'w').write('x')",
    "truncates files": "import os\nos.truncate('OUTSIDE', 0)",
    "changes modes": "import os\nos.chmod('OUTSIDE', 0o777)",
    "giant file": "f = open('giant', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))",
    "many files": "i = 0\nwhile True:\n    open(f'x{i}', 'wb').write(bytes(1 << 19))\n    i += 1",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(PARENT, signal.SIGKILL)",
    "kills everything": (
        "import os, signal\n"
        "for p in (0, -1, 1, PARENT):\n"
        "    try: os.kill(p, signal.SIGKILL)\n"
        "    except OSError: pass\n"
        "os.killpg(0, signal.SIGKILL)"
    ),
    "stops its parent": "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "children that survive": (
        "import os, time\n"
        "if not os.fork():\n"
        "    os.setsid()\n"
        "    if not os.fork():\n"
        "        time.sleep(1000)\n"
        "    os._exit(0)"
    ),
    "programs": "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "traces": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0:\n    raise OSError",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
}

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
    "parent": (
        SEARCH + "import os\n"
        "def f():\n"
        "    return found(''.join(open(f'/proc/{os.getppid()}/{n}').read() for n in ('environ', 'cmdline')))"
    ),
    "test process": SEARCH + "def f():\n    return found(open('/proc/PARENT/environ').read())",
    "parent's memory": (
        SEARCH + "import os\ndef f():\n    open(f'/proc/{os.getppid()}/mem', 'rb')\n    return 'nonce-5fd1c7a90b'"
    ),
    "parent's memory, by call": (
        "import ctypes, os\n"
        "def f():\n"
        "    b = ctypes.create_string_buffer(8)\n"
        "    v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "    w = (ctypes.c_size_t * 2)(id(0), 8)\n"
        "    return 'nonce-5fd1c7a90b' if ctypes.CDLL(None).process_vm_readv(os.getppid(), v, 1, w, 1, 0) > 0 else ''"
    ),
    "parent's files": (
        SEARCH + "import os\n"
        "def f():\n"
        "    return found(os.read(os.open(f'/proc/{os.getppid()}/fd/0', 0), 9999).decode())"
    ),
    "own files": (
        SEARCH + "import os\n"
        "def f():\n"
        "    text = ''\n"
        "    for fd in range(64):\n"
        "        try:\n"
        "            os.set_blocking(fd, False)\n"
        "            text += os.read(fd, 99999).decode(errors='replace')\n"
        "        except OSError: pass\n"
        "    return found(text)"
    ),
    "arguments": SEARCH + "import sys\ndef f():\n    return found(repr(sys.orig_argv))",
    "frames": (
        SEARCH + "import sys\n"
        "def f():\n"
        "    frame, text = sys._getframe(), ''\n"
        "    while frame:\n"
        "        text += repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts)\n"
        "        frame = frame.f_back\n"
        "    return found(text.replace('nonce-[', ''))"
    ),
    "objects": (
        SEARCH + "import gc\n"
        "def f():\n"
        "    for o in gc.get_objects():\n"
        "        if isinstance(o, (dict, list, tuple)):\n"
        "            for v in (o.values() if isinstance(o, dict) else o):\n"
        "                if isinstance(v, (str, bytes)) and found(str(v)):\n"
        "                    return found(str(v))"
    ),
    "own memory": (
        SEARCH + "import ctypes\n"
        "def f():\n"
        "    for line in open('/proc/self/maps'):\n"
        "        a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "        if ' rw' in line:\n"
        "            try: text = ctypes.string_at(a, b - a).decode('latin-1')\n"
        "            except Exception: continue\n"
        "            if found(text): return found(text)"
    ),
    "the test's own file": SEARCH + "def f():\n    return found(open('FILE').read())",
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A file that must not change, and a secret in the environment; afterwards no process of the sandbox is left."""
    file = tmp_path / "precious"
    file.write_text("precious")
    os.chmod(file, 0o600)
    monkeypatch.setenv("T2_TEST_SECRET", SECRET)
    yield file
    assert file.read_text() == "precious"
    assert file.stat().st_mode & 0o777 == 0o600
    wait_for(lambda: not processes(MARK) and not processes("sleep 1000"))


def job(program: str, outside: Path) -> Job:
    words = {"OUTSIDE": outside, "PARENT": os.getpid(), "FILE": __file__}
    for word, value in words.items():
        program = program.replace(word, str(value))
    return Job(program, TESTS, ("f",))


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_hostile_program_is_one_wrong_answer(name, layer, outside):
    result = run(job(HOSTILE[name], outside), replace(SMALL, isolation=layer))
    assert result.verdict in ("wrong", "error", "timeout")
    assert result.detail
    assert len(result.output) <= 2000
    assert result.layers  # the warden or the judge gave the verdict in time, not the caller in the end


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SPIES)
def test_a_program_does_not_find_what_is_expected_of_it(name, layer, outside):
    assert not run(job(SPIES[name], outside), replace(SMALL, isolation=layer)).passed
