"""Build the compiled extension `t2kernels._C`. Everything else is in pyproject.toml; docs/howto/build.md has the
options.

csrc/bindings.cpp and csrc/cpu/ need a C++ compiler, pybind11 and ninja; csrc/cuda/ also needs nvcc. If something is
missing, one line says so: the package is complete without the extension, on torch and Triton. No torch header is
included, so one build serves every version of torch.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
# sm_90a has Hopper's own instructions. compute_80 as PTX is for later GPUs: their driver compiles it at the first load.
CUDA_ARCHS = "80+PTX;90a;100"
# Compiler flags by the end of a file's name: instruction sets that only code behind a run-time check may use.
SIMD = {
    "_avx2": "-mavx2 -mfma -mf16c",
    # gcc 12 warns about deliberately undefined registers in its own headers (gcc bug 105593).
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512 "
    "-Wno-uninitialized -Wno-maybe-uninitialized",
    "_avx512bf16": "-mavx512f -mavx512bf16 -mavx512bw -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
SIMD["_avx512_bf16"] = f"{SIMD['_avx512']} -mavx512bf16"
SWITCH = ("auto", "0", "1")


def switch(name: str) -> str:
    """The value of an environment variable that is "auto", "0" or "1"."""
    value = os.environ.get(name, "auto")
    if value not in SWITCH:
        raise SystemExit(f"{name} is {value!r}, expected one of {', '.join(SWITCH)}")
    return value


def compiler() -> str | None:
    """The path of a C++ compiler, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def ninja() -> list[str] | None:
    """The command of ninja, or None."""
    try:
        import ninja  # the package, of a build in isolation

        return [os.path.join(ninja.BIN_DIR, "ninja")]
    except (ImportError, AttributeError):
        found = shutil.which("ninja")
        return [found] if found else None


def unsupported() -> str | None:
    """Why the C++ part cannot be built here, or None."""
    if switch("T2KERNELS_BUILD") == "0":
        return "T2KERNELS_BUILD=0"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if compiler() is None:
        return "there is no C++ compiler (on Debian and Ubuntu: apt-get install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is missing (on Debian and Ubuntu: apt-get install python3-dev)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None if ninja() else "ninja is not installed"


class Cuda:
    """A CUDA toolkit: nvcc, its include directory and the directory of its static runtime."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc")
        self.nvcc = Path(nvcc)
        home = Path(home) if home else self._home()
        self.include = home / "include"
        places = [home / "lib64", home / f"targets/{os.uname().machine}-linux/lib", home / "lib"]
        self.lib = next((p for p in places if (p / "libcudart_static.a").is_file()), None)

    def _home(self) -> Path:
        for nvcc in (self.nvcc, self.nvcc.resolve(), Path("/usr/local/cuda/bin/nvcc")):
            if (nvcc.parent.parent / "include" / "cuda_runtime.h").is_file():
                return nvcc.parent.parent
        return self.nvcc.resolve().parent.parent

    def unsupported(self, wheel: bool) -> str | None:
        """Why the CUDA part is left out, or None. wheel: whether the build makes a wheel."""
        asked = switch("T2KERNELS_BUILD_CUDA")
        if asked == "0":
            return "T2KERNELS_BUILD_CUDA=0"
        if not list(CSRC.glob("cuda/*.cu")):
            reason = "csrc/cuda/ holds no kernel"
        elif not self.nvcc.is_file():
            reason = "nvcc was not found (PATH, CUDA_HOME)"
        elif self.lib is None or not (self.include / "cuda_runtime.h").is_file():
            reason = f"the toolkit of {self.nvcc} has no cuda_runtime.h or no libcudart_static.a"
        else:
            reason = None
        if asked == "1":
            if reason:
                raise SystemExit(f"T2KERNELS_BUILD_CUDA=1, but {reason}")
            return None
        if reason is None and not wheel and not _has_gpu():
            return "this machine has no NVIDIA GPU, and it takes most of a minute (T2KERNELS_BUILD_CUDA=1 builds it)"
        return reason


def _has_gpu() -> bool:
    try:
        return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def gencode(archs: str) -> str:
    """The flags of nvcc for a list such as "80+PTX;90a" or "8.0+PTX 9.0a". +PTX: also as PTX."""
    flags = []
    for arch in archs.replace(";", " ").replace(",", " ").split():
        number, plus, what = arch.replace(".", "").partition("+")
        if not number[:-1].isdigit() or (plus and what != "PTX"):
            raise SystemExit(
                f"T2KERNELS_CUDA_ARCHS: {arch!r} is not an architecture; expected for example {CUDA_ARCHS!r}"
            )
        flags += [
            f"-gencode arch=compute_{number},code={kind}_{number}" for kind in (("sm", "compute") if plus else ("sm",))
        ]
    return " ".join(flags)


class Build(build_ext):
    """Writes build.ninja into the build folder and runs it."""

    def build_extension(self, ext: Extension) -> None:
        out, temp = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir(parents=True, exist_ok=True)
        in_place = self.inplace or self.editable_mode
        cuda = Cuda()
        if reason := cuda.unsupported(wheel=not in_place):
            say(f"no CUDA kernels in t2kernels._C: {reason}")
            cuda = None
        (temp / "build.ninja").write_text(rules(out, temp, cuda))
        try:
            subprocess.run([*ninja(), "-f", str(temp / "build.ninja")], check=True)
        except subprocess.CalledProcessError:
            if not in_place or switch("T2KERNELS_BUILD") == "1" or switch("T2KERNELS_BUILD_CUDA") == "1":
                raise
            ext.optional = True  # an editable install must not fail because of a compiler
            say("t2kernels._C could not be compiled, see above; the package works without it")
            raise CompileError("t2kernels._C") from None


def rules(out: Path, temp: Path, cuda: Cuda | None) -> str:
    """The text of build.ninja: one object a source, one library."""
    import pybind11

    places = [sysconfig.get_path("include"), pybind11.get_include(), str(CSRC.resolve())]
    includes = " ".join(f"-I{shell(p)}" for p in places)
    x86 = os.uname().machine in ("x86_64", "AMD64")
    lines = [
        f"builddir = {path(temp)}",
        f"cxx = {shell(compiler())}",
        "flags = -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -pthread",
        "rule cxx",
        f"  command = $cxx $flags {includes} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -pthread -Wl,--exclude-libs,ALL -Wl,--gc-sections -Wl,-s $in $libs -o $out",
    ]
    sources = {CSRC / "bindings.cpp": "", **dict.fromkeys(sorted(CSRC.glob("cpu/*.cpp")), "")}
    for source in sources:
        sources[source] = next((more for end, more in SIMD.items() if x86 and source.stem.endswith(end)), "")
    libs = ""
    if cuda:
        sources[CSRC / "bindings.cpp"] = "-DT2KERNELS_WITH_CUDA"
        sources |= {p: f"-I{shell(str(cuda.include))}" for p in sorted(CSRC.glob("cuda/*.cpp"))}
        libs = f"-L{shell(str(cuda.lib))} -lcudart_static -lrt -ldl"
        archs = gencode(os.environ.get("T2KERNELS_CUDA_ARCHS", CUDA_ARCHS))
        host = "-Xcompiler -fPIC,-fvisibility=hidden,-pthread"
        lines += [
            "rule nvcc",
            f"  command = {shell(str(cuda.nvcc))} -ccbin $cxx -std=c++17 -O3 --threads 0 {archs} {host} "
            f"-I{shell(places[-1])} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []
    for source, more in sources.items():
        objects.append(temp / f"{source.parent.name}_{source.stem}.o")
        lines += [f"build {path(objects[-1])}: cxx {path(source.resolve())}", f"  more = {more}"]
    for source in sorted(CSRC.glob("cuda/*.cu")) if cuda else ():
        objects.append(temp / f"{source.stem}.cu.o")
        lines.append(f"build {path(objects[-1])}: nvcc {path(source.resolve())}")
    lines += [f"build {path(out)}: link {' '.join(map(path, objects))}", f"  libs = {libs}", f"default {path(out)}"]
    return "\n".join(lines) + "\n"


def path(p: Path) -> str:
    """A path in a build line of ninja."""
    return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(text: str) -> str:
    """A word in a command of ninja."""
    return shlex.quote(text).replace("$", "$$")


def say(what: str) -> None:
    """Print a line of the build."""
    print(f"t2kernels: {what}", file=sys.stderr)


reason = unsupported()
if reason:
    if switch("T2KERNELS_BUILD") == "1" or switch("T2KERNELS_BUILD_CUDA") == "1":
        raise SystemExit(f"t2kernels._C was asked for, but {reason}")
    say(f"no compiled extension: {reason}; the package is complete without it")
setup(
    ext_modules=[] if reason else [Extension("t2kernels._C", [str(CSRC / "bindings.cpp")])],
    cmdclass={"build_ext": Build},
)
