"""The Triton forward against fp64, every dtype of x and of the factors: in the interpreter on a machine without a GPU,
natively with one."""
# ruff: noqa: E402 (nothing here can be imported without Triton)

import pytest
import torch

from tests.helpers.triton_cases import DEVICE, MIXES, PAIRS, E, check, draw_ids, eager, exact, problem

triton = pytest.importorskip("triton")
import triton.language as tl

from t2kernels.ops.impls.triton import backward
from t2kernels.ops.impls.triton import common as triton_common
from t2kernels.ops.impls.triton import launch_pair as launch
from t2kernels.ops.impls.triton.common import cast, int8_as_bf16
from t2kernels.ops.tuning.tiles import Tiles, tiles

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
def test_forward_is_as_exact_as_eager(x_dtype, w_dtype):
    for T, N, Rs, Ms, mix in (
        (5, 96, [48], [80], "uniform"),
        (33, 64, [32, 16, 32], [64, 32, 48], "distinct"),
        (3, 256, [24], [40], "zipf"),
    ):
        x, V, Us, scale, bases, biases = problem(T, N, Rs, Ms, x_dtype, w_dtype)
        ids = draw_ids(mix, T)
        args = x, V, Us, scale, ids, bases, biases
        check(launch.forward_pair(*args), eager(*args), exact(*args), x_dtype)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_experts_and_every_way_to_add(mix):
    for base, bias in ((True, False), (False, True), (False, False)):
        x, V, Us, scale, bases, biases = problem(21, 48, [16, 32], [24, 40], torch.bfloat16, torch.bfloat16, base, bias)
        args = x, V, Us, scale, draw_ids(mix, 21), bases, biases
        check(launch.forward_pair(*args), eager(*args), exact(*args), torch.bfloat16)
    bases, biases = [bases[0], torch.randn(21, 40).to(x)], [torch.randn(24).to(x), None]
    args = *args[:5], bases, biases
    check(launch.forward_pair(*args), eager(*args), exact(*args), torch.bfloat16)


@pytest.mark.parametrize(
    "T, N, Rs, Ms", [(1, 7, [3], [5]), (17, 33, [9], [21]), (2, 50, [7, 1, 5, 3], [9, 20, 1, 33]), (16, 1, [1], [1])]
)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_odd_sizes(T, N, Rs, Ms, split):
    args = problem(T, N, Rs, Ms, torch.float32, torch.float32)
    args = *args[:4], draw_ids("uniform", T), *args[4:]
    pair = Tiles(16, 16, 16, split, 4, 2), Tiles(16, 16, 16, 1, 4, 2)
    check(launch.forward_pair(*args, pair), eager(*args), exact(*args), torch.float32)


@pytest.mark.parametrize(
    "T, N, Rs, Ms", [(0, 16, [8], [12]), (4, 16, [0], [12]), (4, 0, [8], [12]), (4, 16, [8, 0], [0, 12])]
)
def test_empty_sizes(T, N, Rs, Ms):
    args = problem(T, N, Rs, Ms, torch.float32, torch.float32)
    args = *args[:4], draw_ids("uniform", T), *args[4:]
    check(launch.forward_pair(*args), eager(*args), exact(*args), torch.float32)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("bad", [E, -1, 2**40])
def test_a_row_that_is_not_there_gives_nan_and_reads_nothing(split, bad):
    x, V, Us, scale, bases, _ = problem(4, 128, [32, 32], [40, 40], torch.bfloat16, torch.bfloat16)
    ids = torch.tensor([0, bad, 1, 2], device=DEVICE)
    pair = Tiles(16, 16, 32, split, 4, 2), Tiles(32, 16, 32, 1, 4, 2)
    ys = launch.forward_pair(x, V, Us, scale, ids, bases, [None] * 2, tile_pair=pair)
    for y in (*ys, launch.forward_swiglu(x, V, Us, scale, ids, bases, [None] * 2, tile_pair=pair)):
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()
    g = backward.scale_rows(torch.randn(4, 64, device=DEVICE), scale, ids, 1)
    assert g[1].isnan().all()
    assert g[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.int8, torch.float16])
@pytest.mark.parametrize("split", [2, 8])
def test_split_sums_are_added_in_order(w_dtype, split):
    args = problem(12, 256, [32, 16], [48, 32], torch.bfloat16, w_dtype)
    args = *args[:4], draw_ids("distinct", 12), *args[4:]
    pair = Tiles(32, 16, 32, split, 4, 2), Tiles(32, 16, 16, 1, 4, 2)
    got = launch.forward_pair(*args, pair)
    check(got, eager(*args), exact(*args), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got, launch.forward_pair(*args, pair), strict=True))


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.int8)]
)
@pytest.mark.parametrize("split", [1, 2])
def test_a_row_of_zeros_returns_base_bit_for_bit(x_dtype, w_dtype, split):
    x, V, Us, scale, bases, _ = problem(6, 128, [32], [40], x_dtype, w_dtype)
    scale[0] = 0
    bases[0][:, ::3] = -0.0
    ids = torch.tensor([0, 1, 0, 2, 0, 0], device=DEVICE)
    pair = Tiles(16, 16, 32, split, 4, 2), Tiles(32, 16, 32, 1, 4, 2)
    (y,) = launch.forward_pair(x, V, Us, scale, ids, bases, [None], tile_pair=pair)
    same = y.view(torch.int16) == bases[0].view(torch.int16)
    assert same[ids == 0].all()
    assert not same[ids != 0].all(1).any()


def test_ids_cover_sequences_and_scale_may_be_a_view():
    x, V, Us, scale, _, _ = problem(24, 64, [32], [48], torch.float32, torch.float32)
    wide = torch.randn(E, 100, device=DEVICE)
    wide[:, 7:39] = scale
    for lead, ids in (
        ((4, 6), draw_ids("distinct", 4)),
        ((2, 3, 4), draw_ids("uniform", 6).reshape(2, 3)),
        ((24,), torch.tensor(3, device=DEVICE)),
    ):
        each = ids.reshape(-1).repeat_interleave(24 // ids.numel())
        (got,) = launch.forward_pair(x.reshape(*lead, 64), V, Us, wide[:, 7:39], ids, [None], [None])
        args = x, V, Us, scale, each, [None], [None]
        assert got.shape == (*lead, 48)
        check([got.reshape(24, 48)], eager(*args), exact(*args), torch.float32)


def test_inputs_in_any_memory_order():
    x, V, Us, scale, bases, biases = problem(9, 40, [24], [32], torch.float32, torch.float32)
    ids = draw_ids("uniform", 9)
    args = x, V, Us, scale, ids, bases, biases
    turned = [t.t().contiguous().t() for t in (x, V, Us[0], scale, bases[0])]
    assert not any(t.is_contiguous() for t in (turned[0], *turned[2:]))
    got = launch.forward_pair(turned[0], turned[1], [turned[2]], turned[3], ids, [turned[4]], biases)
    check(got, eager(*args), exact(*args), torch.float32)


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.int8)]
)
def test_shrink_then_expand_is_the_pair(x_dtype, w_dtype):
    x, V, Us, scale, bases, biases = problem(7, 64, [32, 32], [48, 32], x_dtype, w_dtype)
    ids = draw_ids("distinct", 7)
    g = launch.shrink(x, V, scale, ids)
    want = launch.forward_pair(
        x, V, Us, scale, ids, bases, biases, tile_pair=(tiles("shrink", 300, 64, 64, x_dtype, w_dtype, (9, 0)), None)
    )
    for got, y in zip(launch.expand(g, Us, bases, biases), want, strict=True):
        assert torch.equal(got, y)
    args = x, V, Us, scale, ids, [None] * 2, [None] * 2
    check(launch.expand(g, Us, [None] * 2, [None] * 2, dtype=x_dtype), eager(*args), exact(*args), x_dtype)


def test_fp16_factors_have_headroom_for_bf16_data():
    """x V passes fp16's 65504 by far; with 2^-5 it fits up to 2e6."""
    x, V, Us, scale, _, _ = problem(4, 64, [32], [48], torch.bfloat16, torch.float16)
    x, scale = x * 2.0**18, scale * 2.0**-2
    ids = draw_ids("uniform", 4)
    args = x, V, Us, scale, ids, [None], [None]
    assert exact(*args)[0].abs().max() > 65504
    check(launch.forward_pair(*args), eager(*args), exact(*args), torch.bfloat16)


@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
@pytest.mark.parametrize("split", [1, 2])
def test_swiglu_in_the_epilogue(x_dtype, w_dtype, split):
    for T, N, Rs, M in ((6, 128, [32, 32], 48), (17, 70, [10, 23], 33)):
        x, V, Us, scale, bases, biases = problem(T, N, Rs, [M, M], x_dtype, w_dtype)
        args = x, V, Us, scale, draw_ids("uniform", T), bases, biases
        gate, up = exact(*args)
        want = gate / (1 + (-gate).exp()) * up
        plain = eager(*args)
        plain = torch.nn.functional.silu(plain[0]) * plain[1]
        pair = Tiles(16, 16, 32, split, 4, 2), Tiles(32, 16, 32, 1, 4, 2)
        check([launch.forward_swiglu(*args, tile_pair=pair)], [plain], [want], x_dtype)


@pytest.mark.parametrize("base, bias", [(False, False), (True, False), (False, True)])
def test_swiglu_is_what_separate_ops_give(base, bias):
    args = problem(8, 64, [32, 32], [48, 48], torch.bfloat16, torch.bfloat16, base, bias)
    args = *args[:4], draw_ids("uniform", 8), *args[4:]
    gate, up = launch.forward_pair(*args)
    assert torch.equal(launch.forward_swiglu(*args), torch.nn.functional.silu(gate) * up)


@triton.jit
def _int8_by_bits(q_ptr, fp16_ptr, low_ptr, high_ptr):
    i = tl.arange(0, 256)
    q = tl.load(q_ptr + i)
    tl.store(fp16_ptr + i, cast(q, tl.float16, False))
    low, high = int8_as_bf16(q)
    tl.store(low_ptr + i, low)
    tl.store(high_ptr + i, high)


def test_int8_converts_by_bits():
    """The conversions that GPUs use in place of a slow instruction, for every int8 there is."""
    q = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
    fp16, low, high = (torch.empty(256, dtype=d, device=DEVICE) for d in (torch.float16, torch.int16, torch.int16))
    _int8_by_bits[(1,)](q, fp16, low, high)
    assert torch.equal(fp16, q.half())
    assert torch.equal(low.view(torch.bfloat16) - high.view(torch.bfloat16), q.bfloat16())


def test_no_dependent_launch_where_a_factor_was_just_copied(monkeypatch):
    """The copy may still be under way when a block reads ahead of the wait."""
    launched = []
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    monkeypatch.setattr(triton_common.Launch, "run", lambda one: launched.append(one))
    x, V, Us, scale, bases, biases = problem(4, 64, [32, 32], [48, 48], torch.float32, torch.float32)
    ids, copied = draw_ids("one", 4), Us[0].t().contiguous().t()
    for v, us, pdl in ((V, Us, True), (V.contiguous(), Us, False), (V, [copied, Us[1]], False)):
        for forward in (launch.forward_pair, launch.forward_swiglu):
            launched.clear()
            forward(x, v, us, scale, ids, bases, biases)
            assert [(one.meta["PDL"], one.options.get("launch_pdl", False)) for one in launched] == [(pdl, pdl)] * 2


def test_what_does_not_fit_is_said():
    x, V, Us, scale, bases, biases = problem(2, 8, [4], [6], torch.float64, torch.float64)
    ids = draw_ids("one", 2)
    with pytest.raises(ValueError, match="float64"):
        launch.forward_pair(x, V, Us, scale, ids, bases, biases)
    x, V, Us, scale, bases, biases = problem(2, 8, [4] * 5, [6] * 5, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="1 to 4"):
        launch.forward_pair(x, V, Us, scale, ids, bases, biases)
    with pytest.raises(ValueError, match="one M"):
        launch.forward_swiglu(x, V[:, :8], [Us[0], Us[1][:3]], scale[:, :8], ids, bases[:2], biases[:2])
    with pytest.raises(ValueError, match="one dtype"):
        launch.forward_pair(x, V[:, :8], [Us[0], Us[1].half()], scale[:, :8], ids, bases[:2], biases[:2])
