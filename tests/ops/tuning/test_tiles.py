"""The tiles: what the rules give for real shapes, what fits, and the tables made offline. No GPU and no Triton."""

import pytest
import torch

from t2kernels.ops.tuning.predict import KEEP, candidates
from t2kernels.ops.tuning.tables import read_table, table_path, write_table
from t2kernels.ops.tuning.tiles import KERNELS, Tiles, shared_bytes, tiles

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
ARCHS = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
SHAPES = [(256, 4096), (768, 4096), (4096, 4096), (6144, 256), (28672, 4224), (256, 28672), (1, 1), (33, 7)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(BF16, BF16), (BF16, INT8), (BF16, FP16), (FP16, INT8), (FP32, FP32), (FP32, INT8)]
)
def test_tiles_fit_and_cover(arch, x_dtype, w_dtype):
    for T in (1, 2, 16, 17, 64, 200, 5000):
        for rows, K in SHAPES:
            for kernel in KERNELS:
                t = tiles(kernel, T, rows, K, x_dtype, w_dtype, arch)
                assert all(n > 0 and n & (n - 1) == 0 for n in (t.BR, t.BT, t.BK, t.split, t.warps))
                if kernel in ("scale_rows", "backward"):
                    continue
                factors = 2 if kernel == "swiglu" else 1
                assert t.stages * factors * t.BK * (t.BR * w_dtype.itemsize + t.BT * x_dtype.itemsize) <= shared_bytes(
                    arch
                )
                assert t.BT >= min(T, 32 if x_dtype == FP32 else 128)
                assert factors * t.BR * t.BT / (32 * t.warps) <= 64
                assert t.split == 1 or (kernel == "shrink" and t.split * T * rows * 4 <= 65536)


@pytest.mark.parametrize(
    "kernel, T, rows, K, w_dtype, arch, want",
    [
        ("shrink", 1, 768, 4096, BF16, (9, 0), dict(BR=16, split=2)),  # q, k, v with 256 components each: 96 blocks
        ("shrink", 1, 256, 14336, BF16, (9, 0), dict(BR=16, split=8)),
        ("shrink", 64, 256, 14336, BF16, (9, 0), dict(split=1)),  # the parts would be more bytes than the factor
        ("shrink", 8, 4224, 4096, BF16, (9, 0), dict(BR=32, split=1)),  # 132 blocks
        ("expand", 8, 28672, 4096, BF16, (9, 0), dict(BR=64)),
        ("expand", 128, 28672, 4096, BF16, (9, 0), dict(BR=128, BT=128, warps=8)),
        ("expand", 128, 28672, 4096, INT8, (9, 0), dict(BR=32, BT=128)),  # mma.sync, for the width of the loads
        ("expand", 128, 28672, 4096, INT8, (10, 0), dict(BR=128, BT=128)),
    ],
)
def test_the_rules(kernel, T, rows, K, w_dtype, arch, want):
    got = tiles(kernel, T, rows, K, BF16, w_dtype, arch)
    assert {k: getattr(got, k) for k in want} == want


def test_an_expand_of_parts_takes_short_steps():
    whole, parts = (tiles("expand", 8, 4096, 256, BF16, BF16, (9, 0), parts=n) for n in (1, 4))
    assert (whole.BK, parts.BK, parts.stages) == (128, 64, 2)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="gemm"):
        tiles("gemm", 1, 1, 1, BF16, BF16, (9, 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("T", [1, 32, 128])
def test_candidates_are_few_and_fit(kernel, T):
    for w_dtype in (BF16, INT8):
        for rows, K in SHAPES:
            found = candidates(kernel, T, rows, K, BF16, w_dtype, (9, 0))
            assert found[0] == tiles(kernel, T, rows, K, BF16, w_dtype, (9, 0))
            assert len(set(found)) == len(found) <= KEEP
            if (rows, K) == (4096, 4096):
                assert len(found) >= 8


def test_a_table_is_found_by_device_and_triton_and_read_at_the_nearest_T(tmp_path):
    a, b = Tiles(64, 16, 128, 1, 4, 3), Tiles(128, 64, 64, 1, 8, 3)
    best = {("expand", 4, 4096, 256, BF16, BF16): a, ("expand", 64, 4096, 256, BF16, BF16): b}
    path = write_table("NVIDIA H200", "3.6.0", best, tmp_path, commit="abc1234")
    assert path == table_path("NVIDIA H200", "3.6.1", tmp_path)
    table = read_table("NVIDIA H200", "3.6.0", tmp_path)
    assert (table["device"], table["commit"]) == ("NVIDIA H200", "abc1234")
    for T, want in ((1, a), (15, a), (17, b), (200, b)):
        assert tiles("expand", T, 4096, 256, BF16, BF16, (9, 0), table=table) == want
    rule = tiles("expand", 4, 4096, 512, BF16, BF16, (9, 0))
    assert tiles("expand", 4, 4096, 512, BF16, BF16, (9, 0), table=table) == rule
    assert tiles("expand", 4, 4096, 256, BF16, INT8, (9, 0), table=table) == tiles(
        "expand", 4, 4096, 256, BF16, INT8, (9, 0)
    )
    assert read_table("NVIDIA H200", "3.7.0", tmp_path) is None
    assert read_table("NVIDIA H100", "3.6.0", tmp_path) is None
