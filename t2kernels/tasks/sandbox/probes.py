"""Check the sandbox on this machine with programs that attempt what it must prevent."""

import os
import secrets
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

from .runner import Job, Limits, SandboxError, run, run_many

# Each value is the body of a function of `at`, which holds the targets. Without an exception the attempt succeeded.
ATTEMPTS: dict[str, str] = {
    "network": "import socket; socket.create_connection(('127.0.0.1', at['port']), timeout=1)",
    "files outside are not written": "open(at['file'], 'a').write('x')",
    "files outside are not removed": "import os; os.remove(at['file'])",
    "files outside are not read": "open(at['file']).read()",
    "the root directory": "import os; os.mkdir('/t2-probe')",
    "environment": "import os; 1 / len(set(at['variables']) & set(os.environ))",
    "processes": "import os; os.fork() or os._exit(0)",
    "programs": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "memory of others": "import os; open(f'/proc/{os.getppid()}/mem', 'rb')",
    "signals to others": "import os; os.kill(os.getppid(), 0)",
    "memory": "at['x'] = bytearray(at['memory'] + 1)",
    "file size": "f = open('large', 'wb', buffering=0)\n    while f.tell() <= at['size']: 1 / f.write(bytes(1 << 16))",
}


def report(limits: Limits | None = None) -> dict[str, str | bool]:
    """Find out by attempts which protections hold on this machine.

    Returns {"isolation": the layers, "network": True, ...}; True means that the attempt failed. Raises SandboxError
    if not even a harmless program can be run.
    """
    limits = replace(limits or Limits(), cpu_seconds=1, wall_seconds=30.0)
    works = run(Job("def ok(): return 1", "assert ok() == 1", ("ok",)), limits)
    if not works.passed:
        raise SandboxError(f"a harmless program did not pass: {works.verdict}, {works.detail}")
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outside")
        file.write_text(secrets.token_hex())
        at = {
            "port": server.getsockname()[1],
            "file": str(file),
            "memory": limits.memory_bytes,
            "size": limits.file_bytes,
        }
        at["variables"] = sorted(os.environ)
        jobs = [
            Job(f"def attempt(at):\n    {code}", f"assert attempt({at!r}) is None", ("attempt",))
            for code in ATTEMPTS.values()
        ]
        got_through = {name: result.passed for name, result in zip(ATTEMPTS, run_many(jobs, limits), strict=True)}
    spins = run(Job("while True: pass", "", ()), limits)
    return {
        "isolation": " + ".join(works.layers) or "none",
        **{name: not through for name, through in got_through.items()},
        "CPU time": spins.verdict == "error",
    }
