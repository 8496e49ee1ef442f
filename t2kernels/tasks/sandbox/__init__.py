"""Run sampled programs against tests, where they can do no harm and cannot talk their way to a pass.

    passed = sandbox.run(Job(program="def inc(x): return x + 1", tests="assert inc(1) == 2", names=("inc",))).passed

Each program has a process of its own, with no network, no environment, no file of its caller, limits on CPU time, memory, file size and output,
and no way to start another process; when its time is up all of it is killed. The tests run in another process: it sends arguments,
gets plain values back, and compares them itself. What the program prints, patches, raises or exits with decides nothing, and it never sees the
tests. `warden.py` says how the processes stand to each other, `isolation.py` what the kernel is asked for, docs/reference/tasks.md what is not protected.

Linux only. Programs have the standard library, and nothing that was installed beside it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

WARDEN = Path(__file__).with_name("warden.py")
ISOLATED = ("namespaces", "filters")
ISOLATION = ("auto", *ISOLATED, "none")


class SandboxError(RuntimeError):
    """The program was not run: this machine cannot confine it as was asked."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    cpu_seconds: of the program; the tests have one second more. wall_seconds: of everything, the start of two processes included.
    memory_bytes: address space of each. file_bytes: of each file, and of everything that is printed. scratch_bytes: of all files together.
    isolation: "namespaces", "filters" (Landlock and seccomp), "auto" (the first of these that the kernel allows), or "none": limits and
        another process only, for machines that are thrown away afterwards. Each name means that or an error.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    isolation: str = "auto"

    def __post_init__(self):
        if self.isolation not in ISOLATION:
            raise ValueError(f"isolation={self.isolation!r}; it must be one of {', '.join(ISOLATION)}")


@dataclass(frozen=True)
class Job:
    """program: untrusted source. tests: source that raises if the program is wrong. names: what the tests use of the program.

    setup: source that runs before the tests, in their process; where it defines one of `names`, the program's counts.
    """

    program: str
    tests: str
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Result:
    """verdict: "passed", "wrong" (a test failed), "error" (the program or a test raised or died) or "timeout".

    detail: why. output: the first 2000 bytes printed. layers: what confined the program.
    """

    verdict: str
    detail: str
    output: str
    seconds: float
    layers: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


_works: list[str] = []  # the layer that "auto" found, so that the ones before it are not tried for every program


def run(job: Job, limits: Limits | None = None) -> Result:
    """Run one program. Raises SandboxError if it cannot be confined as `limits.isolation` asks; never for anything that the program does."""
    limits = limits or Limits()
    if sys.platform != "linux":
        raise SandboxError(f"sampled code can only be confined on Linux, and this is {sys.platform}")
    auto, refused = limits.isolation == "auto", []
    for layer in _works or ISOLATED if auto else (limits.isolation,):
        start = time.monotonic()
        found = _run(job, replace(limits, isolation=layer))
        if found["verdict"] != "refused":
            if auto:
                _works[:] = [layer]
            return Result(
                found["verdict"],
                found["detail"],
                found.get("output", ""),
                time.monotonic() - start,
                tuple(found["layers"]),
            )
        refused.append(f"{layer}: {found['detail']}")
    raise SandboxError(
        f"this machine cannot confine sampled code with isolation={limits.isolation!r} ({'; '.join(refused)}). Allow unprivileged user "
        "namespaces, or a kernel with Landlock and seccomp; on a machine that is thrown away afterwards, isolation='none'"
    )


def _run(job: Job, limits: Limits) -> dict:
    """What the warden and the judge say of a program."""
    payload = b"".join(map(_frame, (job.program, {"names": list(job.names), "setup": job.setup, "tests": job.tests})))
    scratch = tempfile.mkdtemp(prefix="t2-sandbox-")
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(WARDEN), json.dumps(vars(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env={},
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(payload, limits.wall_seconds + 10)
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)  # the judge and the answer die with the warden
            process.communicate()
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            said, complaint = b"", b""
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = _message(said)
    if found is None and complaint:
        raise SandboxError(f"the sandbox itself failed: {complaint.decode(errors='replace').strip().splitlines()[-1]}")
    return found or {"verdict": "timeout", "detail": "out of CPU time or memory while the tests ran", "layers": []}


def run_many(
    jobs: Sequence[Job],
    limits: Limits | None = None,
    workers: int | None = None,
    done: Callable[[int], object] | None = None,
):
    """The result of each job, in order; `workers` at a time, by default one for each core. `done` is called with 1 after each."""
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        results = []
        for result in pool.map(lambda job: run(job, limits), jobs):
            results.append(result)
            if done:
                done(1)
    return results


def report(limits: Limits | None = None) -> dict:
    """Which protections hold on this machine, each found out by a program that tries: {"isolation": layers, "network": True, ...}.

    True means that the attempt failed. Raises SandboxError.
    """
    from . import probes

    limits = replace(limits or Limits(), cpu_seconds=1, wall_seconds=30.0)
    return probes.report(limits)


def _frame(value: object) -> bytes:
    data = json.dumps(value).encode()
    return len(data).to_bytes(4, "big") + data


def _message(data: bytes) -> dict | None:
    size = int.from_bytes(data[:4], "big")
    return json.loads(data[4 : 4 + size]) if 0 < size <= len(data) - 4 else None
