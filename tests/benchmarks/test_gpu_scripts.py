"""What runs first on a GPU, without one: scripts/gpu-*, the cache of compiled kernels; and all of it without optional
packages."""

import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT

OPTIONAL = (
    "peft datasets matplotlib torchao bitsandbytes fastapi uvicorn starlette openai lm_eval prometheus_client "
    "math_verify llguidance pytest_benchmark tensorboardX gguf trl vllm"
).split()
BLOCKED = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {OPTIONAL!r}:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def python(code, *arguments, **more):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for NVIDIA GPUs on Linux")
def test_compiled_kernels_are_found_again(tmp_path):
    """A key that is not that of the launch, or that is another in another process, would compile again."""
    command = [sys.executable, "benchmarks/gpu_cache.py", "--sets", "decode", "--limit", "3", "--jobs", "1"]
    env = environment(TRITON_CACHE_DIR=str(tmp_path), TRITON_STORE_BINARY_ONLY="1", TRITON_INTERPRET="1")
    said = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "3 kernels for sm_90 (decode): 3 compiled, 0 were there" in said[0]
    assert "0 compiled, 3 were there" in said[1]
    assert len(list(tmp_path.rglob("*.cubin"))) == 3


@needs_triton
def test_the_cache_is_that_of_the_launches_of_a_gpu(tmp_path):
    """Every kernel that a decode launches is among those compiled: the tiles of the rule, with and without a base."""
    code = """
import gpu_cache as g
from t2kernels.ops.impls.triton import common
seen = []
common.Launch.run = lambda launch: seen.append(g.key_of(launch))
for call in g.decode():
    call()
print(len(seen), len(set(seen)), len({k.split(",")[0] for k in seen}))
"""
    done = python(code, TRITON_INTERPRET="0")
    launches, kernels, names = map(int, done.stdout.split())
    assert launches > 200
    assert 50 < kernels < launches / 2
    assert names == 8  # shrink, expand, swiglu, scale_rows, backward, sum_slots, token_scores and its backward


def test_gpu_tests_are_collected_without_optional_packages():
    """Where they are missing, files that need them are skipped with a reason, and none is an error."""
    arguments = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    code = f"{BLOCKED}\nimport pytest\nsys.exit(pytest.main({arguments}))"
    done = python(code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_cuda_gpu.py" in done.stdout
    assert "could not import 'peft'" in done.stdout


def test_the_suite_runs_without_peft(tmp_path):
    code = f"""{BLOCKED}
import suite, ops, training, generation, experts, torch
device, said = torch.device("cpu"), []
a = ops.arguments("--models nano --groups o --tokens 3 --each 0 --ranks 8 --forms delta --backward 8".split())
rows = [*ops.run(device, a, said.append), *training.run(device, True, ["nano"], said.append)]
arms = {{r["arm"] for r in rows}}
assert {{"t2 auto", "SVF, R/16"}} <= arms, arms
assert not [arm for arm in arms if arm.startswith("PEFT")]
assert sum("peft is not installed" in s for s in said) == 2, said
print(suite.machine(("torch", "no-such-package"))["versions"])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'no-such-package': None" in done.stdout


SCRIPT = """NAME=try
. {steps}
step good 20 sh -c 'i=0; while [ $i -lt 4000 ]; do echo "line $i of a long log"; i=$((i + 1)); done'
show good
show good 'line 39'
step bad 20 sh -c 'echo the reason; exit 3'
step slow 1 sleep 30
skip other "it is not here"
LIMIT=0
step late 10 true
finish
"""


def test_verdicts_come_last_and_everything_in_one_file(tmp_path):
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "try"
    script.write_text(SCRIPT.format(steps=ROOT / "scripts" / "gpu-steps.sh"))
    folder = tmp_path / "out"
    done = subprocess.run(
        ["sh", script, "--dry-run", folder], env=environment(PYTHON=sys.executable), capture_output=True
    )
    assert done.returncode == 1
    text = done.stdout.decode()
    last = text[-12_000:]
    assert "=== good, the end" in last
    assert "line 3999" in last
    verdicts = last[last.index("=== verdicts of try") :].splitlines()[1:]
    assert [v.partition(" (")[0] for v in verdicts] == [
        "good: passed",
        "bad: FAILED: exit status 3",
        "slow: FAILED: not done after 1 s",
        "other: NOT RUN, it is not here",
        "late: NOT RUN, no time is left of 0 s",
    ]
    with tarfile.open(folder / "all.tgz") as archive:
        assert {"./good.log", "./bad.log", "./slow.log", "./verdicts.txt"} <= set(archive.getnames())


@needs_triton
def test_a_dry_run_of_the_profile(tmp_path):
    script = ROOT / "scripts" / "gpu-profile"
    env = environment(PYTHON=sys.executable)
    done = subprocess.run([script, "--dry-run", tmp_path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "triton swiglu, gate+up, T=32" in done.stdout
    assert "kernels: passed" in done.stdout


@needs_triton
def test_small_sizes_are_right_and_a_wrong_kernel_is_found():
    code = "import gpu_small; sys_exit = gpu_small.main(); print('exit', sys_exit)"
    done = python(code, TRITON_INTERPRET="1")
    assert "exit 0" in done.stdout, done.stderr
    spoilt = "from t2kernels.ops.impls.triton import launch_pair as l; f = l.forward_pair;"
    spoilt += "l.forward_pair = lambda *a: [y * 1.1 for y in f(*a)];"
    done = python(spoilt + code, TRITON_INTERPRET="1")
    assert "WRONG" in done.stdout
    assert "exit 1" in done.stdout


def test_what_ncu_prints_becomes_rows(benchmarks):
    pytest.importorskip("triton")
    import kernel_profile

    text = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","nsecond","Mbyte","register/thread"
"0","shrink_kernel(float *)","2,496","2.5","90"
"1","expand_kernel","3,000","0.5","100"
"""
    assert kernel_profile.parsed(text) == [
        {"kernel": "shrink_kernel", "us": 2.496, "MB read": 2.5, "registers": 90},
        {"kernel": "expand_kernel", "us": 3.0, "MB read": 0.5, "registers": 100},
    ]
    assert kernel_profile.parsed("==ERROR== ERR_NVGPUCTRPERM") == []


def test_decoding_end_to_end(benchmarks, capsys):
    import end_to_end

    rows = list(end_to_end.run(torch.device("cpu"), "nano", torch.float32, 8, [1, 2], 6, 0.0))
    found = {(r["what"], r["batch"], r["arm"]) for r in rows}
    assert ("decode", 2, "delta, an expert a sequence") in found
    assert ("prefill", 1, "dense, no expert") in found
    assert all(r["seconds"] > 0 and not r["graph"] for r in rows)
    assert all(r["bytes_predict"] > 1 and r["error"] < 1e-3 for r in rows if r["arm"].startswith("delta"))
    assert end_to_end.table(rows).row_count == len(rows)


def test_a_step_is_decoded_behind_the_prompt_again_and_again(benchmarks):
    import end_to_end
    import subjects

    model = subjects.load("nano", 1, 4).model
    with torch.no_grad():
        step = end_to_end.Step(model, 2, 5, 16)
        want = model(torch.cat([step.prompt, step.token], 1)).logits[:, -1]
        for _ in range(2):
            step.rewind()
            torch.testing.assert_close(step.run(), want)
            step.run()


def test_the_lowest_versions_are_those_of_the_project():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "lowest"], capture_output=True, text=True, check=True)
    project = Path(ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers", "triton"):
        (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"{name}==")]
        assert f'"{name}>={line.removeprefix(f"{name}==").removesuffix(".*")}' in project
    assert "numpy>=1.26,<2.4" in done.stdout
