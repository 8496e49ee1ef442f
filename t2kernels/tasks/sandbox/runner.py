"""Start a warden for each program, wait for its verdict, and remove the program's files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from t2kernels import InputError, StateError

from . import scratch_folder, wire

WARDEN: Path = Path(__file__).with_name("warden.py")
ISOLATED = ("namespaces", "filters")
ISOLATION: tuple[str, ...] = ("auto", *ISOLATED, "none")


class SandboxError(StateError):
    """The program was not run: this machine cannot confine it as requested."""


@dataclass(frozen=True)
class Limits:
    """Limits for one program.

    cpu_seconds: for the program; the tests have one second more.
    wall_seconds: for everything, including the start of two processes.
    memory_bytes: address space of each process.
    file_bytes: size of each file, and of all printed output.
    scratch_bytes, scratch_files: total size and number of the files and folders that the program makes.
    isolation: "namespaces"; "filters" (Landlock and seccomp); "auto", the first of these that the kernel allows; or
        "none": only limits and a separate process, for machines that are thrown away. A layer that cannot be had is an
        error, never replaced by another one.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    scratch_files: int = 4096
    isolation: str = "auto"

    def __post_init__(self) -> None:
        if self.isolation not in ISOLATION:
            raise InputError(f"isolation={self.isolation!r}; it must be one of {', '.join(ISOLATION)}")


@dataclass(frozen=True)
class Job:
    """A program and its tests.

    program: untrusted source.
    tests: source that raises if the program is wrong.
    names: the names of the program that the tests use.
    setup: source that runs before the tests, in their process. If it defines one of `names`, the program's one counts.
    """

    program: str
    tests: str
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Result:
    """The outcome of a program.

    verdict: "passed", "wrong" (a test failed), "error" (the program or a test raised or died) or "timeout".
    detail: the reason. output: the first 2000 bytes printed. layers: the names of the layers that confined the program.
    """

    verdict: str
    detail: str
    output: str
    seconds: float
    layers: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the program passed all tests."""
        return self.verdict == "passed"


_works: list[str] = []  # the layer that "auto" found, so that earlier ones are not tried for every program


def run(job: Job, limits: Limits | None = None) -> Result:
    """Run one program. Nothing that the program does raises an error here.

    Raises SandboxError if the program cannot be confined as `limits.isolation` asks.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise SandboxError(f"sampled code can only be confined on Linux, and this is {sys.platform}")
    auto, refused = limits.isolation == "auto", []
    for layer in _works or ISOLATED if auto else (limits.isolation,):
        start = time.monotonic()
        said = _run(job, replace(limits, isolation=layer))
        if said["verdict"] != "refused":
            if auto:
                _works[:] = [layer]
            seconds = time.monotonic() - start
            return Result(said["verdict"], said["detail"], said.get("output", ""), seconds, tuple(said["layers"]))
        refused.append(f"{layer}: {said['detail']}")
    raise SandboxError(
        f"this machine cannot confine sampled code with isolation={limits.isolation!r} ({'; '.join(refused)}). Allow "
        "unprivileged user namespaces, or a kernel with Landlock and seccomp; on a machine that is thrown away "
        "afterwards, isolation='none'"
    )


def run_many(
    jobs: Sequence[Job],
    limits: Limits | None = None,
    workers: int | None = None,
    done: Callable[[int], object] | None = None,
) -> list[Result]:
    """Run several programs at a time: the result of each job, in order.

    workers: how many at a time, by default one per core. done: called with 1 after each job.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        results = []
        for result in pool.map(lambda job: run(job, limits), jobs):
            results.append(result)
            if done:
                done(1)
    return results


def _run(job: Job, limits: Limits) -> dict[str, Any]:
    """The verdict of the warden or the judge, as they send it."""
    try:
        payload = wire.frame(job.program)
    except ValueError as error:  # no completion is that long, but a repetitive one may be
        return {"verdict": "error", "detail": f"the program is {error}", "layers": []}
    payload += wire.frame({"names": list(job.names), "setup": job.setup, "tests": job.tests})
    try:
        folder = tempfile.mkdtemp(prefix="t2-sandbox-")
    except OSError as error:
        raise SandboxError(f"no scratch folder for a program could be made: {error}") from error
    try:
        said, complaint = _ask_warden(payload, folder, limits)
    finally:
        with contextlib.suppress(OSError):
            scratch_folder.remove(folder)
    found = _first_message(said)
    if found is None and complaint:
        raise SandboxError(f"the sandbox itself failed: {complaint.decode(errors='replace').strip().splitlines()[-1]}")
    return found or {"verdict": "timeout", "detail": "out of CPU time or memory while the tests ran", "layers": []}


def _ask_warden(payload: bytes, folder: str, limits: Limits) -> tuple[bytes, bytes]:
    """Run a warden in the folder: the bytes that it and the judge wrote to stdout and to stderr; nothing if it hung."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", str(WARDEN), json.dumps(asdict(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    try:
        return process.communicate(payload, limits.wall_seconds + 10)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the judge and the program die with the warden
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return b"", b""


def _first_message(data: bytes) -> dict[str, Any] | None:
    size = int.from_bytes(data[:4], "big")
    if not 0 < size <= len(data) - 4:
        return None
    try:
        return json.loads(data[4 : 4 + size])
    except ValueError:  # the judge was killed in the middle of its verdict
        return None
