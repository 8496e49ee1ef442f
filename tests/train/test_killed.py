"""`t2 train --checkpoints` that was killed goes on to the bits of a run that was not."""

import json
import os
import subprocess
import sys

import pytest

import t2kernels as t2
from tests.helpers.paths import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_training_that_is_killed_while_it_writes_resumes_to_the_same_bits(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    script = ROOT / "tests" / "helpers" / "killed_training.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(seed)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    log = (tmp_path / "log").read_text()
    assert found["states"] == ["finished", "killed", "killed", "killed", "finished"], (seed, found, log)
    whole, resumed = t2.Expert.load(tmp_path / "whole"), t2.Expert.load(tmp_path / "resumed")
    assert resumed == whole, (seed, found)
    assert any((z != 1).any() for z in whole.z.values())
    kept = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert kept == ["checkpoint-25", "checkpoint-28"], (seed, found)
