"""The process between this library and a sampled program, run by path: `python -I -S warden.py SETTINGS`.

Standard library only.

    caller ── warden ── judge ── player        the pipe to the caller ends at the judge
              waits     tests    the program   the player has two pipes to the judge and nothing else

The judge reads the program and forks the player before it reads the tests: they are never in the player's memory,
arguments or files.
"""

import _thread
import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation
import judge
import player
import scratch_folder
import wire

del sys.path[0]


def main(settings: dict[str, Any]) -> None:
    """Start the judge, wait for its end or for a broken limit, and leave no process behind."""
    deadline = time.monotonic() + settings["wall_seconds"]
    isolation.die_with_parent()
    isolation.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    layers = {"none": []}.get(settings["isolation"], [settings["isolation"]])
    try:
        if "namespaces" in layers:
            isolation.unshare()
        if "filters" in layers:
            probe()
    except OSError as e:
        say({"verdict": "refused", "detail": e.strerror, "layers": []})
        return
    child = os.fork()
    if not child:
        run(settings, layers)
        os._exit(0)
    os.close(0)
    broken: list[str] = []
    if "namespaces" not in layers:  # there the scratch folder is a file system of its own, with limits
        _thread.start_new_thread(watch, (settings, broken))
    while not (done := os.waitpid(child, os.WNOHANG)[0]) and not broken:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        signal.sigtimedwait({signal.SIGCHLD}, left)
    if not done:
        # In a process namespace the kernel kills all other processes with the first one.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if "namespaces" not in layers:
        kill_all()
    if not done:
        why = broken[0] if broken else f"more than {settings['wall_seconds']} s"
        say({"verdict": "timeout", "detail": why, "layers": layers})


def watch(settings: dict[str, Any], broken: list[str]) -> None:
    """Watch the scratch folder, and wake `main` if a limit is broken. A thread: the clock must not wait for it."""
    why = ""
    while not why:
        time.sleep(0.05)
        try:
            why = scratch_folder.excess(".", settings["scratch_bytes"], settings["scratch_files"])
        except BaseException as e:
            why = f"the files cannot be counted: {type(e).__name__}"
    broken.append(why)
    os.kill(os.getpid(), signal.SIGCHLD)


def probe() -> None:
    """Try both filters in a child process. Raises OSError if the kernel has not both."""
    read, write = os.pipe()
    if not os.fork():
        try:
            isolation.lock_files(os.getcwd())
            isolation.filter_calls()
        except OSError as e:
            os.write(write, (e.strerror or "no").encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 500)
    os.close(read)
    os.wait()
    if said:
        raise OSError(1, said.decode())


def run(settings: dict[str, Any], layers: list[str]) -> None:
    """The judge's process, the first one of its namespace: when it ends, all others in the namespace end too."""
    isolation.die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    folder = os.getcwd()
    if "namespaces" in layers:
        try:
            isolation.new_root(folder, settings["scratch_bytes"], settings["scratch_files"])
        except OSError as e:
            say({"verdict": "refused", "detail": e.strerror, "layers": []})
            return
        isolation.drop_privileges()
    isolation.hide_memory()
    program = wire.receive(0)
    output = os.memfd_create("output")
    requests, ask = os.pipe()
    told, replies = os.pipe()
    child = os.fork()
    if not child:
        try:
            become_player(settings, layers, folder, requests, replies, output)
        except OSError as e:
            wire.send(replies, {"refused": f"{e.strerror}: {e.filename}" if e.filename else str(e.strerror)})
            os._exit(1)
        with contextlib.suppress(BaseException):
            player.play(program, requests, replies)
        os._exit(1)
    os.close(requests)
    os.close(replies)
    isolation.limit(settings["cpu_seconds"] + 1, settings["memory_bytes"], settings["file_bytes"])
    tests = wire.receive(0)
    confined = wire.receive(told)  # the player sends its layers before it runs a line of the program
    if "refused" in confined:
        say({"verdict": "refused", "detail": confined["refused"], "layers": []})
        return
    layers = [*layers, *confined["layers"]]
    try:
        found = verdict(tests, judge.Line(ask, told), child, output)
    except BaseException as e:  # of the program's doing, as a reply that fills the memory
        found = {"verdict": "error", "detail": f"the judge failed: {type(e).__name__}"}
    say({**found, "layers": layers})


def verdict(tests: dict[str, Any], line: judge.Line, player_pid: int, output: int) -> dict[str, Any]:
    """The judge's verdict, with the way in which the player ended and with what the program printed."""
    found = judge.judge(tests, line)
    if found["verdict"] == "error":
        time.sleep(0.005)  # a process that just closed its pipe is not yet dead
        found["detail"] = ": ".join(filter(None, (judge.how_it_ended(player_pid), found["detail"])))
    with contextlib.suppress(OSError):
        found["output"] = os.pread(output, 2000, 0).decode(errors="replace")
    return found


def become_player(
    settings: dict[str, Any], layers: list[str], folder: str, requests: int, replies: int, output: int
) -> None:
    """Give up everything that the program does not need, and tell the judge which layers hold. Raises OSError."""
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    low, high = sorted((requests, replies))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 65536)
    if not layers:
        isolation.become_nobody(folder)
        isolation.hide_memory()  # a change of user undoes it
    isolation.die_with_parent()
    isolation.limit(settings["cpu_seconds"], settings["memory_bytes"], settings["file_bytes"])
    isolation.drop_privileges()
    if "filters" in layers:
        isolation.lock_files(folder)
    held = ["seccomp"]
    try:
        isolation.filter_calls()
    except OSError:
        if layers:  # without the filter a program may start others, as many as it likes if this is root
            raise
        held = []
    wire.send(replies, {"layers": held})


def kill_all() -> None:
    """Kill every process below this one, in any session: orphans become children of this process."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                    parent, group = map(int, file.read().rpartition(")")[2].split()[1:3])
                    if parent == os.getpid():
                        if group != os.getpgid(0):
                            # The whole group at once: processes that multiply are faster than this loop.
                            os.killpg(group, signal.SIGKILL)
                        os.kill(int(name), signal.SIGKILL)
        time.sleep(0.002)


def say(message: dict[str, Any]) -> None:
    """Send the verdict to the caller."""
    wire.send(1, message)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
