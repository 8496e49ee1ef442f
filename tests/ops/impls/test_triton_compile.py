"""The kernels compiled for three generations of GPUs, without one: no spills, tensor cores, wide loads, the factor
loaded before the wait."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compile_for(arch, tmp_path, *options):
    """In a process of its own, where Triton compiles: in this one it may interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(arch), *options],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_machine_code_is_what_the_tiles_promise(arch, tmp_path):
    rows = compile_for(arch, tmp_path)
    kernels = Counter(row["kernel"] for row in rows)
    assert set(kernels) == {
        "shrink_kernel",
        "expand_kernel",
        "swiglu_kernel",
        "scale_rows_kernel",
        "backward_kernel",
        "sum_slots_kernel",
        "token_scores_kernel",
        "token_scores_backward_kernel",
    }
    assert min(kernels["shrink_kernel"], kernels["expand_kernel"]) >= 4
    bad = [
        {k: v for k, v in row.items() if not k.isupper() or k in ("BR", "BT", "BK", "SPLIT", "MEMBERS")}
        for row in rows
        if row["faults"]
    ]
    assert not bad, "\n".join(map(str, bad))


def test_the_checks_can_fail(tmp_path):
    spills, narrow = compile_for(90, tmp_path, "--bad")
    assert any("spills" in fault for fault in spills["faults"])
    assert any("narrow loads" in fault for fault in narrow["faults"])
