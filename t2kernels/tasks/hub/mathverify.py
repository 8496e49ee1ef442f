"""Compare LaTeX with the package math-verify, in a separate process.

sympy may never return, as for 9^{9^{9^9}}. A process can be killed.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time

from t2kernels import StateError

_WORKER = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
out, sys.stdout = sys.stdout, sys.stderr
out.write("ready\\n")
out.flush()
for line in sys.stdin:
    try:
        gold, given = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        same = bool(gold and given and verify(gold, given, timeout_seconds=None))
    except Exception:
        same = False
    out.write(f"{int(same)}\\n")
    out.flush()
"""


class Verifier:
    """(wanted, given) -> whether they are equal. A comparison over `seconds` or `memory_bytes` counts as unequal.

    The process starts at the first comparison and ends with this object, or with the program.
    """

    def __init__(self, seconds: float = 3.0, memory_bytes: int = 2 << 30) -> None:
        self.seconds: float = seconds
        self.memory_bytes: int = memory_bytes
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(self, wanted: str, given: str) -> bool:
        if not given.strip() or len(given) > 500:
            return False
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._ask(json.dumps([wanted, given]).encode() + b"\n")
            if answer is None:
                self.close()
            return answer == b"1\n"

    def _ask(self, question: bytes) -> bytes | None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except OSError:  # the process died of the last question
            return None
        return self._line(self.seconds)

    def close(self) -> None:
        """End the process. The next comparison starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        import resource

        self.close()
        limit = (self.memory_bytes, self.memory_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, limit)
        if self._line(120.0) != b"ready\n":
            self.close()
            raise StateError(
                "math-verify could not be started: python -c 'import math_verify' says why; or use checker='plain'"
            )

    def _line(self, seconds: float) -> bytes | None:
        """The next line from the process; None if it does not come in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        end, line, fd = time.monotonic() + seconds, b"", self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            part = os.read(fd, 100) if left > 0 and select.select([fd], [], [], left)[0] else b""
            if not part:
                return None
            line += part
        return line

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()
