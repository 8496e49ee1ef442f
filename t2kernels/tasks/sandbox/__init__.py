"""Run sampled programs against tests, so that a program can do no harm and cannot forge a pass.

    passed = sandbox.run(Job(program="def inc(x): return x + 1", tests="assert inc(1) == 2", names=("inc",))).passed

Each program has its own process: no network, no environment, no file of its caller, no way to start another process,
and limits on CPU time, memory, files and output. When its time is up, all of it is killed.

The tests run in a second process. It sends arguments to the program, gets plain values back and compares them itself.
The program never sees the tests. What it prints, patches or raises decides nothing, nor does its exit code.

`warden.py` shows the processes and `isolation.py` the requests to the kernel. The documentation of tasks lists what is
not protected.

Linux only. Programs have the standard library, no installed packages.
"""

from .probes import report
from .runner import Job, Limits, Result, SandboxError, run, run_many

__all__ = ["Job", "Limits", "Result", "SandboxError", "report", "run", "run_many"]
