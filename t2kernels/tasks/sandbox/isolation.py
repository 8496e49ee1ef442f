"""Ask the kernel to confine a process: namespaces, Landlock, seccomp, limits. Linux, by ctypes; standard library only.

There are two layers, and either of them is enough:

    namespaces   own user, process, network, mount, IPC and host-name namespaces; the root has read-only system
                 directories and a scratch tmpfs
    filters      Landlock for files, seccomp for everything else; for machines without user namespaces (most containers)

In both, the seccomp filter also applies to the program.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534

# --- system calls


def _call(number: int, *args) -> int:
    """A system call; raises OSError."""
    wide = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    found = _libc.syscall(ctypes.c_long(number), *wide)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _prctl(option: int, *args: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *padded) < 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


# name: (x86_64, aarch64); None where the architecture has no such call
CALLS: dict[str, tuple[int, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "add_key": (248, 217), "bind": (49, 200), "bpf": (321, 280),
    "capset": (126, 91), "chmod": (90, None), "chown": (92, None), "chroot": (161, 51), "clone": (56, 220),
    "clone3": (435, 435), "connect": (42, 203), "execve": (59, 221), "execveat": (322, 281), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "fchown": (93, 55), "fchownat": (260, 54), "fork": (57, None),
    "fremovexattr": (199, 16), "fsetxattr": (190, 7), "fsopen": (430, 430), "futimesat": (261, None),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30), "kcmp": (312, 272), "keyctl": (250, 219), "kill": (62, 129),
    "landlock_add_rule": (445, 445), "landlock_create_ruleset": (444, 444), "landlock_restrict_self": (446, 446),
    "lchown": (94, None), "listen": (50, 201), "lremovexattr": (198, 15), "lsetxattr": (189, 6), "mount": (165, 40),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "mq_open": (240, 180), "msgget": (68, 186),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "prlimit64": (302, 261), "process_madvise": (440, 440),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "removexattr": (197, 14),
    "request_key": (249, 218), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "semget": (64, 190), "setns": (308, 268), "setpriority": (141, 140),
    "setxattr": (188, 5), "shmget": (29, 194), "socket": (41, 198), "syslog": (103, 116), "tgkill": (234, 131),
    "tkill": (200, 130), "truncate": (76, 45), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
    "utime": (132, None), "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None),
}  # fmt: skip
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine())


def number(name: str) -> int:
    """The number of a system call here. Raises OSError on an architecture that is not in the table."""
    found = None if _COLUMN is None else CALLS[name][_COLUMN]
    if found is None:
        raise OSError(38, f"no number for the system call {name} on {platform.machine()}")
    return found


# --- limits and privileges


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Limit this process, for good. The limit on processes counts per user and does not bind root."""
    wanted = {
        resource.RLIMIT_CPU: cpu_seconds,  # soft and hard alike: the kernel kills, nothing can catch it
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 128,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 64 << 20,
    }
    for what, value in wanted.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _prctl(1, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, in any session."""
    _prctl(36, 1)


def hide_memory() -> None:
    """Close /proc/PID/mem, fd and environ of this process to other processes without privileges over it."""
    _prctl(4, 0)


def drop_privileges() -> None:
    """Give up every capability, now and for any program that is run later."""
    for capability in range(64):
        try:
            _prctl(24, capability)  # the bounding set
        except OSError:
            break  # past the last one, or not allowed to: then there is nothing to drop
    header, empty = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call(number("capset"), header, empty)
    _prctl(38, 1)  # no new privileges


def become_nobody(scratch: str) -> None:
    """If this is root, become a user who owns only the folder `scratch`.

    Raises OSError, also if that user cannot read the interpreter.
    """
    if os.getuid() == 0:
        os.chown(scratch, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.stat(os.__file__)


# --- namespaces


def unshare() -> None:
    """Enter new namespaces; the process namespace is for children. Raises OSError if the kernel refuses."""
    user, group = os.getuid(), os.getgid()
    # user, mount, host name, IPC, process, network
    if _libc.unshare(0x10000000 | 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000) < 0:
        raise OSError(ctypes.get_errno(), f"no new namespaces: {os.strerror(ctypes.get_errno())}")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
"""System directories that an interpreter needs: shared libraries, time zones."""


def readable() -> list[str]:
    """The directories that a program may read: the system's and the interpreter's, each listed once."""
    places = [*SYSTEM, os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)]
    places = [p for p in dict.fromkeys(places) if os.path.lexists(p)]
    return [p for p in places if not any(p.startswith(other + "/") for other in places)]


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    made = _libc.mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data.encode()
    )
    if made < 0:
        raise OSError(ctypes.get_errno(), f"mount on {target}: {os.strerror(ctypes.get_errno())}")


def _read_only(target: str) -> None:
    """A mount and all below it read-only, without devices and without set-user-id programs. Kernel 5.12."""
    attributes = struct.pack("=QQQQ", 0x1 | 0x2 | 0x4, 0, 0, 0)
    _call(number("mount_setattr"), -100, target.encode(), 0x8000, attributes, len(attributes))
    if not os.statvfs(target).f_flag & os.ST_RDONLY:
        raise OSError(30, f"{target} is still writable")


def new_root(at: str, scratch_bytes: int, scratch_files: int) -> None:
    """Make `at` the root directory and enter its empty /tmp.

    The root holds the `readable` directories, read-only, and /dev/null, /dev/zero and /dev/urandom. Raises OSError.
    """
    _mount("none", "/", None, 0x4000 | 0x40000)  # nothing done here is seen outside
    _mount("root", at, "tmpfs", 0x2 | 0x4, "mode=755,size=1m")
    for place in readable():
        inside = at + place
        if os.path.islink(place):
            os.symlink(os.readlink(place), inside)
            continue
        os.makedirs(inside)
        _mount(place, inside, None, 0x1000 | 0x4000)
        _read_only(inside)
    os.mkdir(at + "/dev")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.close(os.open(at + device, os.O_CREAT | os.O_WRONLY))
        _mount(device, at + device, None, 0x1000)
    os.mkdir(at + "/tmp")
    _mount("scratch", at + "/tmp", "tmpfs", 0x2 | 0x4 | 0x8, f"mode=700,size={scratch_bytes},nr_inodes={scratch_files}")
    os.chdir(at)
    _call(number("pivot_root"), b".", b".")
    if _libc.umount2(b".", 2) < 0:
        raise OSError(ctypes.get_errno(), "the old root is still there")
    # Only the root itself becomes read-only: nobody may exchange its directories, and /tmp must stay writable.
    attributes = struct.pack("=QQQQ", 0x1, 0, 0, 0)
    _call(number("mount_setattr"), -100, b"/", 0, attributes, len(attributes))
    os.chdir("/tmp")


# --- Landlock


def lock_files(scratch: str) -> None:
    """Allow reading in the `readable` directories and writing in `scratch`, and no other use of files.

    Raises OSError if the kernel has no Landlock.
    """
    version = _call(number("landlock_create_ruleset"), 0, 0, 1)
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    handled = struct.pack("=QQQ", files, 0x3, 0x3)  # files; TCP; signals and abstract sockets to others
    ruleset = _call(number("landlock_create_ruleset"), handled, 8 if version < 4 else 16 if version < 6 else 24, 0)
    rules = [(place, 0x1 | 0x4 | 0x8) for place in readable()]
    rules += [(scratch, files), ("/dev/null", files & 0xC006), ("/dev/urandom", 0x4)]
    for place, allowed in rules:
        at = os.open(place, os.O_PATH | os.O_CLOEXEC)
        _call(number("landlock_add_rule"), ruleset, 1, struct.pack("=Qi", allowed, at), 0)
        os.close(at)
    _prctl(38, 1)
    _call(number("landlock_restrict_self"), ruleset, 0)
    os.close(ruleset)


# --- seccomp

_PROCESSES = (
    "fork vfork execve execveat ptrace process_vm_readv process_vm_writev process_madvise kcmp "
    "pidfd_open pidfd_getfd pidfd_send_signal"
)
_SIGNALS = (
    "tkill rt_sigqueueinfo rt_tgsigqueueinfo setpriority "
    "sched_setaffinity sched_setattr sched_setparam sched_setscheduler ioprio_set"
)
_NETWORK = "socket connect bind listen accept accept4"
_KERNEL = (
    "mount umount2 pivot_root chroot unshare setns mount_setattr move_mount open_tree fsopen "
    "bpf perf_event_open keyctl add_key request_key "
    "io_uring_setup io_uring_enter io_uring_register userfaultfd open_by_handle_at name_to_handle_at personality syslog"
)
_LEFT_BEHIND = "shmget semget msgget mq_open"
_METADATA = (  # Landlock leaves these open, truncate up to its second version, so they are closed for files everywhere
    "truncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat "
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr "
    "utime utimes utimensat futimesat"
)
DENIED = f"{_PROCESSES} {_SIGNALS} {_NETWORK} {_KERNEL} {_LEFT_BEHIND} {_METADATA}".split()

_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_ALLOWED, _NO_SUCH_CALL = 0x00050000 | 1, 0x00050000 | 38


def filter_program(pid: int) -> bytes:
    """The seccomp filter as BPF.

    DENIED calls fail with EPERM. `clone` may only start threads. Signals and limits may only reach the process `pid`.
    """
    assert _COLUMN is not None  # `number` refuses other architectures
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, (0xC000003E, 0xC00000B7)[_COLUMN]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call's number
    ]
    if _COLUMN == 0:
        steps += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _NO_SUCH_CALL)]  # the x32 numbers of the same calls
    for name in DENIED:
        if CALLS[name][_COLUMN] is not None:
            steps += [(_EQUAL, 0, 1, number(name)), (_RETURN, 0, 0, _NOT_ALLOWED)]
    steps += [
        (_EQUAL, 0, 1, number("clone3")),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]  # its flags lie in memory; libc goes on with clone
    own, thread = (_EQUAL, pid), (_BITS, 0x10000)
    for name, (test, value) in {"clone": thread, "kill": own, "tgkill": own, "prlimit64": (_EQUAL, 0)}.items():
        steps += [
            (_EQUAL, 0, 4, number(name)),
            (_LOAD, 0, 0, 16),
        ]  # 16: the low half of the first argument, a pid or flags
        steps += [(test, 1, 0, value), (_RETURN, 0, 0, _NOT_ALLOWED), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def filter_calls() -> None:
    """Install `filter_program` for this process and its threads, for good. Raises OSError if there is no seccomp."""
    number("clone")
    program = filter_program(os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    holder = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _prctl(38, 1)
    if _libc.prctl(22, ctypes.c_ulong(2), holder, ctypes.c_ulong(0), ctypes.c_ulong(0)) < 0:
        raise OSError(ctypes.get_errno(), f"no seccomp filter: {os.strerror(ctypes.get_errno())}")
