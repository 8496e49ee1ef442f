"""`tune_cpu` with times that are given: what it writes, and that `auto` reads it."""

import json

import pytest
import torch

from t2kernels.ops import dispatch
from t2kernels.ops.device import Device
from t2kernels.ops.dispatch import ImplUnavailableError
from t2kernels.ops.impls import cpp_kernels
from t2kernels.ops.planner import Call
from t2kernels.ops.tuning import tables
from t2kernels.ops.tuning.cpu import in_turn, tune_cpu
from t2kernels.ops.tuning.selfcheck import Case
from t2kernels.ops.tuning.tuner import Shape, WrongResultError, operands

CPU = torch.device("cpu")
F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
SHAPES = [Shape(32, (24, 8), (6, 3), True, x, w) for x, w in ((F32, F32), (BF16, BF16), (F32, INT8))]
pytestmark = pytest.mark.skipif(cpp_kernels.CPP.unsupported_device(CPU) is not None, reason="not built")


def right(error=0.5):
    return [Case("float32", "float32", 1, 8, (8,), (8,), error, "y")]


def test_the_cutover_of_each_format_is_written_and_read(tmp_path, monkeypatch):
    wins = {F32: 8, BF16: 2}

    def timer(problems):
        x = problems[0].x
        return (1.0, 2.0) if x.shape[0] <= wins[x.dtype] else (2.0, 1.0)

    told = []
    path = tune_cpu(SHAPES, (1, 2, 4, 8, 16), tmp_path, timer, lambda *a: told.append(a[1:]), right)
    found = json.loads(path.read_text())
    assert found["stream_tokens"] == {"float32 float32": 8, "bfloat16 bfloat16": 2, "float32 int8": 8}
    assert found["cpp_and_torch_us"]["bfloat16 bfloat16"]["4"] == [2e6, 1e6]
    assert told[-1] == (15, 15)

    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    device = cpp_kernels.CPP.probe(CPU, Device())
    assert dict(device.stream_tokens) == found["stream_tokens"]
    if cpp_kernels.isa() == "portable":
        return
    for T, x, impl in ((8, F32, "cpp"), (16, F32, "torch"), (2, BF16, "cpp"), (4, BF16, "torch")):
        call = Call(T, 32, (24, 8), (6, 3), x, x, base=True)
        machine = device.without("triton", "no").without("cuda", "no")
        assert dispatch.choose(call, machine).impl == impl, (T, x)


def test_wrong_kernels_are_not_timed(tmp_path):
    with pytest.raises(WrongResultError):
        tune_cpu(SHAPES, (1,), tmp_path, lambda problems: pytest.fail("timed"), check=lambda: right(3.0))
    assert not list(tmp_path.iterdir())


def test_where_nothing_is_built_there_is_nothing_to_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_kernels.Cpp, "unsupported_device", lambda self, device: "not built")
    with pytest.raises(ImplUnavailableError, match="not built"):
        tune_cpu(SHAPES, (1,), tmp_path, check=right)


def test_both_arms_are_run():
    assert all(seconds > 0 for seconds in in_turn([operands(s, 2, CPU) for s in SHAPES], 1))
