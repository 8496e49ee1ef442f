"""The content of a wheel and an sdist, with and without a compiler.

The tests build in a copy of the sources, so that the installed package stays as it is.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

from t2kernels.ops.impls import cpp_kernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or not (ROOT / "csrc").is_dir(), reason="not a checkout"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what setuptools looks at, with a space in its path."""
    copy = tmp_path_factory.mktemp("a copy")
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "Makefile",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "docs"):
        shutil.copytree(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    shutil.copytree(ROOT / "t2kernels", copy / "t2kernels", ignore=ignored)
    return copy


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("T2KERNELS")} | {"T2KERNELS_BUILD_CUDA": "0"} | more


def wheel(sources, out, **env: str) -> tuple[Path, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        "--verbose",
    ]
    run = subprocess.run(command, cwd=sources, env=environment(**env), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = Path(out).glob("*.whl")
    return found, run.stdout + run.stderr


def settings(**env: str) -> dict:
    """What setup.py defines, without building anything."""
    before, patch = dict(os.environ), pytest.MonkeyPatch()
    try:
        for name in [n for n in before if n.startswith("T2KERNELS")]:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(setuptools, "setup", lambda **k: None)
        patch.chdir(ROOT)
        return runpy.run_path("setup.py")
    finally:
        patch.undo()


@pytest.mark.slow
@pytest.mark.skipif(bool(settings()["unsupported"]()), reason="no compiler here")
def test_a_wheel_has_the_extension_and_it_runs_from_there(sources, tmp_path):
    found, said = wheel(sources, tmp_path)
    assert "no CUDA kernels in t2kernels._C: T2KERNELS_BUILD_CUDA=0" in said
    assert "none-any" not in found.name
    with zipfile.ZipFile(found) as z:
        names = z.namelist()
        z.extractall(tmp_path / "in")
    assert [n for n in names if n.startswith("t2kernels/_C.")]
    assert "t2kernels/py.typed" in names
    assert not [n for n in names if n.startswith(("csrc", "tests", "docs"))]
    code = "import t2kernels._C as c; from t2kernels.ops.impls import cpp_kernels; "
    code += "print(c.__file__, c.has_cuda, cpp_kernels.isa())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "in", capture_output=True, text=True, check=True
    ).stdout
    assert ran.startswith(str(tmp_path / "in"))
    assert "False" in ran


def test_without_a_compiler_the_wheel_is_pure_python_and_one_line_says_why(sources, tmp_path):
    found, said = wheel(sources, tmp_path, PATH=str(tmp_path), CXX="")
    assert "no compiled extension: there is no C++ compiler" in said
    assert found.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(found) as z:
        assert not [n for n in z.namelist() if ".so" in n or n.startswith("csrc")]
    with pytest.raises(AssertionError, match="was asked for, but there is no C"):
        wheel(sources, tmp_path / "again", PATH=str(tmp_path), CXX="", T2KERNELS_BUILD="1")


def test_an_sdist_has_the_sources(sources, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=sources, env=environment(T2KERNELS_BUILD="0"), capture_output=True, check=True
    )
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert wanted <= names
    assert {"setup.py", "pyproject.toml", "docs/howto/build.md", "t2kernels/ops/op.py"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


@pytest.mark.skipif(bool(settings()["unsupported"]()), reason="no compiler here")
def test_what_can_be_built_was_built():
    """Without the extension its tests are left out, so that nothing else would say that its build broke."""
    assert cpp_kernels.CPP.unsupported_device(torch.device("cpu")) is None


def test_why_there_is_no_extension(monkeypatch):
    found = settings()
    monkeypatch.setenv("T2KERNELS_BUILD", "0")
    assert found["unsupported"]() == "T2KERNELS_BUILD=0"
    monkeypatch.setenv("T2KERNELS_BUILD", "yes")
    with pytest.raises(SystemExit, match="expected one of auto, 0, 1"):
        found["unsupported"]()
    monkeypatch.delenv("T2KERNELS_BUILD")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    if sys.platform.startswith("linux") and found["compiler"]():
        assert found["unsupported"]() == "pybind11 is not installed"


def test_architectures():
    gencode = settings()["gencode"]
    assert gencode("90a") == "-gencode arch=compute_90a,code=sm_90a"
    assert gencode("8.0+PTX 9.0a") == gencode("80+PTX;90a")
    assert gencode("80+PTX").split() == [
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-gencode",
        "arch=compute_80,code=compute_80",
    ]
    for bad in ("hopper", "90+SASS", "+PTX"):
        with pytest.raises(SystemExit, match="is not an architecture"):
            gencode(bad)


def toolkit(path: Path) -> Path:
    """Files where a CUDA toolkit has them."""
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


def test_when_the_cuda_part_is_built(tmp_path, monkeypatch):
    home = toolkit(tmp_path / "cuda")
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    found = settings()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("T2KERNELS_BUILD_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    ask = lambda wheel: found["Cuda"]().unsupported(wheel)  # noqa: E731
    globals_of_setup = found["Cuda"].unsupported.__globals__
    for gpu, wheel_, why in ((False, True, None), (True, False, None), (False, False, "no NVIDIA GPU")):
        monkeypatch.setitem(globals_of_setup, "_has_gpu", lambda gpu=gpu: gpu)
        assert ask(wheel_) == why or why in ask(wheel_)
    monkeypatch.setenv("T2KERNELS_BUILD_CUDA", "1")
    assert ask(False) is None
    text = globals_of_setup["rules"](tmp_path / "_C.so", tmp_path, found["Cuda"]())
    assert f"{home}/bin/nvcc" in text
    assert "-gencode arch=compute_90a,code=sm_90a" in text
    assert "T2KERNELS_WITH_CUDA" in text
    assert "-lcudart_static" in text
    monkeypatch.setenv("T2KERNELS_BUILD_CUDA", "0")
    assert ask(True) == "T2KERNELS_BUILD_CUDA=0"
    (home / "lib64/libcudart_static.a").unlink()
    monkeypatch.setenv("T2KERNELS_BUILD_CUDA", "auto")
    assert "libcudart_static.a" in ask(True)
    monkeypatch.setenv("T2KERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"T2KERNELS_BUILD_CUDA=1, but the toolkit"):
        ask(True)


@pytest.mark.skipif(bool(settings()["unsupported"]()), reason="no compiler here")
def test_an_editable_install_goes_on_where_the_compiler_fails_and_a_wheel_does_not(sources, tmp_path):
    def build(hook: str, **env: str):
        code = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=sources,
            env=environment(CXX="false", **env),
            capture_output=True,
            text=True,
        )
        return run.returncode, run.stdout + run.stderr

    code, said = build("build_editable")
    assert code == 0, said
    assert "t2kernels._C could not be compiled" in said
    assert build("build_editable", T2KERNELS_BUILD="1")[0] != 0
    assert build("build_wheel")[0] != 0
    assert not list((sources / "t2kernels").glob("_C*"))
