"""The process between this library and a sampled answer, run by path as `python -I -S warden.py SETTINGS`. Standard library only.

    caller ── warden ── judge ── player        the pipe to the caller ends at the judge; the player has two pipes to the judge and nothing else
              waits     tests    the answer

The judge reads the answer, forks the player, and only then reads the tests: they were never in the player's memory, arguments or files.
"""

import contextlib
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation
import judge
import player
import wire

del sys.path[0]


def main(settings: dict) -> None:
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
    why, bounded = "", "namespaces" in layers  # there the scratch directory is a file system of its own, with a size
    while not (done := os.waitpid(child, os.WNOHANG)[0]) and not why:
        left = deadline - time.monotonic()
        if left <= 0:
            why = f"more than {settings['wall_seconds']} s"
        elif not bounded and used(".") > settings["scratch_bytes"]:
            why = f"wrote more than {settings['scratch_bytes']} bytes"
        else:
            signal.sigtimedwait({signal.SIGCHLD}, left if bounded else min(left, 0.05))
    if not done:
        os.kill(
            child, signal.SIGKILL
        )  # with the first process of a process namespace, the kernel kills all others in it
        os.waitpid(child, 0)
    if "namespaces" not in layers:
        kill_all()
    if not done:
        say({"verdict": "timeout", "detail": why, "layers": layers})


def probe() -> None:
    """Whether both filters can be had, tried in a child. Raises OSError."""
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


def run(settings: dict, layers: list[str]) -> None:
    """The judge: the first process of its namespace, whose end is the end of all others in it."""
    isolation.die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    scratch = os.getcwd()
    if "namespaces" in layers:
        try:
            isolation.new_root(scratch, settings["scratch_bytes"])
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
            become_player(settings, layers, scratch, requests, replies, output)
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
    confined = wire.receive(told)  # what holds the player, said by it before it runs a line of the answer
    if "refused" in confined:
        say({"verdict": "refused", "detail": confined["refused"], "layers": []})
        return
    layers = [*layers, *confined["layers"]]
    found = judge.judge(tests, judge.Line(ask, told))
    if found["verdict"] == "error":
        time.sleep(0.005)  # a process that just closed its pipe is not yet dead
        found["detail"] = ": ".join(filter(None, (judge.how_it_ended(child), found["detail"])))
    with contextlib.suppress(OSError):
        found["output"] = os.pread(output, 2000, 0).decode(errors="replace")
    say({**found, "layers": layers})


def become_player(settings: dict, layers: list[str], scratch: str, requests: int, replies: int, output: int) -> None:
    """Give up everything that the answer does not need, and say so to the judge. Raises OSError."""
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    low, high = sorted((requests, replies))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 65536)
    if not layers:
        isolation.become_nobody(scratch)
        isolation.hide_memory()  # a change of user undoes it
    isolation.die_with_parent()
    isolation.limit(settings["cpu_seconds"], settings["memory_bytes"], settings["file_bytes"])
    isolation.drop_privileges()
    if "filters" in layers:
        isolation.lock_files(scratch)
    held = ["seccomp"]
    try:
        isolation.filter_calls()
    except OSError:
        if layers:  # without it a program may start others, and nothing bounds how many where this is root
            raise
        held = []
    wire.send(replies, {"layers": held})


def used(folder: str) -> int:
    """Bytes on disk of the files in a folder and below it."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(at, name)).st_blocks * 512
    return total


def kill_all() -> None:
    """Every process below this one, in whatever session: as they lose their parents they become this one's children."""
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
                            os.killpg(
                                group, signal.SIGKILL
                            )  # all of it at once: processes that multiply are faster than this loop
                        os.kill(int(name), signal.SIGKILL)
        time.sleep(0.002)


def say(message: dict) -> None:
    """The verdict, to the caller."""
    wire.send(1, message)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
