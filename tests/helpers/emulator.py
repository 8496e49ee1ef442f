"""The decode kernel on the CPU: csrc/emulator, compiled once, replaces the launch."""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from t2kernels.ops import dispatch
from t2kernels.ops.impls import cuda_kernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
WHY_NOT = None if COMPILER else "the emulator wants a C++ compiler (c++, g++ or CXX), and there is none"


class EmulatorError(RuntimeError):
    """The emulator refused something. The message says what."""


def build(changes: tuple[tuple[str, str], ...] = (), one_kernel: bool = False) -> Path:
    """The emulator as a shared library.

    changes: (old, new) text of the kernel, to put a fault in; one_kernel: only the instances for bf16 that
        `T2_ONE_KERNEL` names
    """
    sources = {p.relative_to(CSRC): p.read_text() for p in sorted([*CSRC.glob("cuda/*.*h"), *CSRC.glob("emulator/*")])}
    for old, new in changes:
        assert any(old in text for text in sources.values()), f"csrc no longer holds {old!r}"
        sources = {name: text.replace(old, new) for name, text in sources.items()}
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-fvisibility=hidden",
        "-shared",
    ]
    command += ["-DT2_ONE_KERNEL"] if one_kernel else ["-Werror"]
    digest = hashlib.sha256(repr((command, sorted(sources.items()))).encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"t2kernels-emulator-{os.getuid()}-{digest}.so"
    if not made.is_file():
        with tempfile.TemporaryDirectory() as folder:
            for name, text in sources.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
            done = subprocess.run(
                [*command, "emulator/emulate.cpp", "-o", "out.so"], cwd=folder, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-4000:]
            shutil.copy(Path(folder, "out.so"), partial := made.with_suffix(f".{os.getpid()}"))
            partial.rename(made)  # several test processes may get here at once
    return made


class Emulator:
    """The emulator, loaded. order: in which order threads run: 0 forwards, 1 backwards, others a shuffle each."""

    def __init__(self, changes: tuple[tuple[str, str], ...] = (), one_kernel: bool = False):
        self.library = ctypes.CDLL(str(build(changes, one_kernel)))
        self.library.t2_emulate.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]
        self.order, self.launches = 0, []

    def send(self, packed: bytes) -> None:
        """Run a launch. Raises EmulatorError."""
        self.launches.append(packed)
        error = ctypes.create_string_buffer(400)
        if self.library.t2_emulate(packed, len(packed) // 8, self.order, error, len(error)):
            raise EmulatorError(error.value.decode())


@contextlib.contextmanager
def in_place_of_a_gpu():
    """impl="cuda" on the CPU: launches go to the emulator, which it yields, and `auto` trusts the kernel."""
    emulated = Emulator()
    dispatch.probe.cache_clear()
    with (
        mock.patch.object(cuda_kernels, "send", emulated.send),
        mock.patch.object(cuda_kernels.CUDA, "unsupported_device", return_value=None),
    ):
        yield emulated
    dispatch.probe.cache_clear()
