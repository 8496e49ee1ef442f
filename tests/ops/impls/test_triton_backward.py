"""The Triton backward, the row scaling and the matmul path against fp64: dscale by expert, dx, every dtype, every mix
and order of experts."""

import pytest
import torch

from tests.helpers.triton_cases import (
    DEVICE,
    FLOATS,
    MIXES,
    PAIRS,
    E,
    check,
    draw_ids,
    eager,
    exact,
    gradients,
    problem,
)

pytest.importorskip("triton")

from t2kernels.ops.impls import torch_kernels
from t2kernels.ops.impls.triton import matmul
from t2kernels.ops.impls.triton.backward import scale_rows

pytestmark = pytest.mark.usefixtures("poison")


def case(T, N, Rs, Ms, x_dtype, w_dtype, mix):
    x, V, Us, scale, _, _ = problem(T, N, Rs, Ms, x_dtype, w_dtype)
    small = (
        2.0**-8 if w_dtype == torch.int8 else 1.0
    )  # eager's fp16 would overflow in what int8 factors give before scale
    dys = [(torch.randn(T, M) * small).to(x_dtype).to(DEVICE) for M in Ms]
    return dys, x, V, Us, scale, draw_ids(mix, T)


def check_gradients(got, plain, want, x_dtype):
    for name, a, b, c in zip(("dx", "dscale"), got, plain, want, strict=True):
        assert a.shape == c.shape, name
        room = 2 if x_dtype == torch.float32 else 1.1
        error, allowed = (a.double() - c).norm(), room * (b.double() - c).norm()
        assert error <= allowed + 1e-12 * c.norm(), f"{name}: error {error:.3e}, eager's {allowed / room:.3e}"
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
def test_gradients_are_as_exact_as_eager(x_dtype, w_dtype):
    for T, N, Rs, Ms, mix in ((70, 48, [40], [56], "uniform"), (33, 32, [16, 24], [32, 40], "zipf")):
        args = case(T, N, Rs, Ms, x_dtype, w_dtype, mix)
        got = matmul.backward(*args, True, True)
        check_gradients(got, gradients(*args, x_dtype), gradients(*args, torch.float64), x_dtype)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("T, N, Rs, Ms", [(1, 5, [3], [7]), (97, 9, [33], [5]), (64, 16, [130], [8])])
def test_every_mix_and_odd_sizes(T, N, Rs, Ms, mix):
    args = case(T, N, Rs, Ms, torch.float32, torch.float32, mix)
    got = matmul.backward(*args, True, True)
    check_gradients(got, gradients(*args, torch.float32), gradients(*args, torch.float64), torch.float32)
    for e in set(range(E)) - set(args[-1].tolist()):
        assert (got[1][e] == 0).all()


def test_only_what_is_needed():
    args = case(40, 16, [24], [8], torch.float32, torch.float32, "uniform")
    dx, dscale = matmul.backward(*args, True, True)
    for need_dx, need_dscale in ((True, False), (False, True), (False, False)):
        a, b = matmul.backward(*args, need_dx, need_dscale)
        assert torch.equal(a, dx) if need_dx else a.numel() == 0
        assert torch.equal(b, dscale) if need_dscale else b.numel() == 0


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.int8)]
)
def test_a_saved_h_is_as_good_as_a_new_one(x_dtype, w_dtype):
    args = case(20, 32, [24, 8], [16, 24], x_dtype, w_dtype, "uniform")
    _, x, V, Us, scale, ids = args
    _, h = torch_kernels.forward_saving(x, V, Us, scale, ids, [None] * 2, [None] * 2, matmul.row_scaling)
    for a, b in zip(matmul.backward(*args, True, True, h=h), matmul.backward(*args, True, True), strict=True):
        assert torch.equal(a, b)


def test_dscale_has_the_same_bits_in_every_run_and_the_same_value_in_every_order():
    dys, x, V, Us, scale, ids = args = case(150, 16, [40], [24], torch.bfloat16, torch.bfloat16, "zipf")
    dscale = matmul.backward(*args, False, True)[1]
    assert torch.equal(dscale, matmul.backward(*args, False, True)[1])
    p = torch.randperm(150, device=DEVICE)
    shuffled = matmul.backward([dys[0][p]], x[p], V, Us, scale, ids[p], False, True)[1]
    assert not torch.equal(dscale, shuffled)  # another order of summing
    torch.testing.assert_close(dscale, shuffled, rtol=1e-5, atol=1e-5 * float(dscale.abs().max()))


def test_ids_that_cover_sequences():
    dys, x, V, Us, scale, _ = case(96, 16, [24], [8], torch.float32, torch.float32, "one")
    for lead, ids in (
        ((4, 24), torch.tensor([3, 0, 3, 1])),
        ((2, 3, 16), torch.tensor([[1, 4, 0], [4, 4, 2]])),
        ((96,), torch.tensor(2)),
    ):
        each = ids.to(DEVICE).reshape(-1).repeat_interleave(96 // ids.numel())
        want = gradients(dys, x, V, Us, scale, each, torch.float64)
        plain = gradients(dys, x, V, Us, scale, each, torch.float32)
        shaped = [dys[0].reshape(*lead, 8)], x.reshape(*lead, 16)
        dx, dscale = matmul.backward(*shaped, V, Us, scale, ids.to(DEVICE), True, True)
        assert dx.shape == (*lead, 16)
        check_gradients((dx.reshape(96, 16), dscale), plain, want, torch.float32)


def test_no_tokens():
    args = case(0, 16, [24], [8], torch.float32, torch.float32, "uniform")
    dx, dscale = matmul.backward(*args, True, True)
    assert dx.shape == (0, 16)
    assert torch.equal(dscale, torch.zeros(E, 24, device=DEVICE))


def test_more_experts_than_a_tile_has_tokens():
    T, many = 80, 200
    dys, x, V, Us, _, _ = case(T, 8, [12], [8], torch.float32, torch.float32, "one")
    scale, ids = torch.randn(many, 12, device=DEVICE), torch.randperm(many)[:T].to(DEVICE)
    ids[7], ids[60] = ids[50], ids[50]
    got = matmul.backward(dys, x, V, Us, scale, ids, True, True)
    args = dys, x, V, Us, scale, ids
    check_gradients(got, gradients(*args, torch.float32), gradients(*args, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mix", MIXES)
def test_scale_rows_rounds_once(dtype, mix):
    for T, C, repeat in ((37, 300, 1), (40, 17, 8), (5, 3, 5)):
        h, scale = torch.randn(T, C).to(dtype).to(DEVICE), torch.randn(E, 2 * C, device=DEVICE)[:, :C]
        ids = draw_ids(mix, T // repeat)
        want = (h.double() * scale.double()[ids.long().repeat_interleave(repeat)]).to(dtype)
        got = scale_rows(h, scale, ids, repeat)
        # A double rounding (fp64 to fp32 to dtype) may fall on the other side of a tie.
        assert torch.equal(got, (h.float() * scale[ids.long().repeat_interleave(repeat)]).to(dtype))
        torch.testing.assert_close(got, want)
        wide = torch.zeros(T, C + 5, dtype=dtype, device=DEVICE)
        wide[:, :C] = h
        assert torch.equal(scale_rows(wide[:, :C], scale, ids, repeat, out=wide[:, :C]), got)
        assert (wide[:, C:] == 0).all()


@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
@pytest.mark.parametrize("base, bias", [(True, False), (False, True), (False, False), (True, True)])
def test_the_matmul_path_is_as_exact_as_eager(x_dtype, w_dtype, base, bias):
    x, V, Us, scale, bases, biases = problem(40, 48, [16, 24], [32, 24], x_dtype, w_dtype, base, bias)
    args = x, V, Us, scale, draw_ids("uniform", 40), bases, biases
    ys = torch_kernels.forward(*args, matmul.row_scaling)
    check(ys, eager(*args), exact(*args), x_dtype)


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.int8)]
)
def test_the_matmul_path_leaves_base_alone_where_scale_is_zero(x_dtype, w_dtype):
    x, V, Us, scale, bases, _ = problem(6, 32, [16], [24], x_dtype, w_dtype)
    scale[0] = 0
    ids = torch.tensor([0, 1, 0, 2, 0, 0], device=DEVICE)
    (y,) = torch_kernels.forward(x, V, Us, scale, ids, bases, [None], matmul.row_scaling)
    assert torch.equal(y[ids == 0], bases[0][ids == 0])
    assert not (y == bases[0])[ids != 0].all(1).any()
