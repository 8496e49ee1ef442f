"""FSDP2's `fully_shard` on a patched model, two processes: parameters are sharded, and z trains as in one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import sharded_training
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        sharded_training.__file__, str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)]


@pytest.mark.parametrize(("form", "rank"), [("delta", 8), ("factored", None)])
def test_a_sharded_model_trains_z_as_a_whole_one(two, form, rank):
    alone = sharded_training.train(form, rank)
    first, second = (process[form] for process in two)
    want = torch.cat(list(alone["z"].values())) - 1
    assert want.norm() > 0.1
    for process in (first, second):
        got = torch.cat([process["z"][name] for name in alone["z"]]) - 1
        assert (got - want).norm() < 1e-4 * want.norm()
    for got, want in zip((*first["answers"], *second["answers"]), alone["answers"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_each_process_holds_half_of_every_parameter(two, form):
    first, second = (process[form] for process in two)
    assert first["here"] + second["here"] == first["whole"]
    assert abs(first["here"] - second["here"]) < 0.01 * first["whole"]


def test_an_expert_that_comes_after_the_sharding_is_refused(two):
    """FSDP would know nothing of its parameters: each process would train another expert."""
    for process in two:
        assert "call start_training first, then shard the model" in process["delta"]["refused"]
