"""The decode kernel's own source on the CPU, in the emulator, against fp64: every dtype, number of tokens, form and
ragged size.

The whole way from tensors to the launch is the one that a GPU takes; only the launch itself is replaced. Memory that is
not written holds NaN, addresses outside of a tensor are refused to the byte, and so is what a GPU would let pass:
csrc/emulator/emulator.h.
"""

import itertools

import pytest
import torch

from t2kernels.ops import ImplUnavailableError, plan, svf_linear, svf_linear_group
from t2kernels.ops.dispatch import expand, fuses_swiglu, may_fuse_swiglu, shrink, swiglu
from t2kernels.ops.impls import cuda_kernels
from t2kernels.ops.impls.cuda_kernels import DTYPES, Variant
from t2kernels.ops.tuning.selfcheck import selfcheck
from tests.helpers import emulator
from tests.helpers.triton_cases import MIXES, check, draw_ids, eager, exact, problem

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(emulator.WHY_NOT is not None, reason=str(emulator.WHY_NOT)),
]
BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8
# N, columns and rows of each member: one tile and a bit; rows of W that end within a chunk; more chunks than warps;
# three members
SHAPES = [
    (96, [48], [80]),
    (208, [32, 16], [83, 33]),
    (1040, [160], [72]),
    (80, [1040], [25]),
    (64, [16, 16, 16], [40, 8, 24]),
]


@pytest.fixture
def cuda():
    with emulator.in_place_of_a_gpu() as emulated:
        yield emulated


def case(T, N, Rs, Ms, x_dtype, w_dtype, base=True, bias=True, mix="uniform"):
    """x, V, Us, scale, ids, bases, biases on the CPU, which is where the emulator is."""
    x, V, Us, scale, bases, biases = problem(T, N, Rs, Ms, x_dtype, w_dtype, base, bias)
    found = x, V, Us, scale, draw_ids(mix, T), bases, biases
    return tuple([t if t is None else t.cpu() for t in f] if isinstance(f, list) else f.cpu() for f in found)


def same(a, b):
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("x_dtype, w_dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 5, 8, 9, 16, 17, 32])
def test_forward_is_as_exact_as_eager(cuda, x_dtype, w_dtype, T):
    for (N, Rs, Ms), mix in zip(SHAPES, MIXES, strict=True):
        args = case(T, N, Rs, Ms, x_dtype, w_dtype, mix=mix)
        got, plain, want = cuda_kernels.forward(*args), eager(*args), exact(*args)
        check(got, plain, want, x_dtype)


def test_int8_widens_exactly(cuda):
    for product, dtype in ((0, BF16), (1, FP16)):
        out = torch.empty(256, dtype=torch.int16)
        cuda.library.t2_widen_all(product, ctypes_pointer(out))
        assert torch.equal(out.view(dtype).float(), torch.arange(256).to(torch.uint8).view(INT8).float())


def ctypes_pointer(t):
    import ctypes

    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_experts_and_every_way_to_add(cuda, mix):
    for base, bias in itertools.product((True, False), repeat=2):
        args = case(7, 64, [16, 32], [24, 40], BF16, BF16, base, bias, mix)
        check(cuda_kernels.forward(*args), eager(*args), exact(*args), BF16)
    bases, biases = [None, torch.randn(7, 40).to(BF16)], [torch.randn(24).to(BF16), None]
    args = *args[:5], bases, biases
    check(cuda_kernels.forward(*args), eager(*args), exact(*args), BF16)


@pytest.mark.parametrize("x_dtype, w_dtype", DTYPES)
def test_swiglu(cuda, x_dtype, w_dtype):
    # Not too few numbers: the roundings of y, which eager has too, are most of the error here, and vary.
    for T, N, Rs, M in (
        (1, 96, [48, 48], 840),
        (5, 64, [32, 16], 233),
        (8, 144, [16, 1040], 120),
        (13, 64, [16, 16], 90),
        (32, 64, [16, 16], 100),
    ):
        args = case(T, N, Rs, [M, M], x_dtype, w_dtype)
        (gate, up), (plain_gate, plain_up) = exact(*args), eager(*args)
        got = cuda_kernels.forward_swiglu(*args)
        check([got], [torch.nn.functional.silu(plain_gate) * plain_up], [gate / (1 + (-gate).exp()) * up], x_dtype)
        y_gate, y_up = cuda_kernels.forward(
            *args
        )  # fusing changes no bit but those in which two exponential functions differ
        assert (got != torch.nn.functional.silu(y_gate) * y_up).double().mean() < 0.01


@pytest.mark.parametrize("x_dtype, w_dtype", [(BF16, BF16), (BF16, FP16), (FP16, INT8)])
def test_a_row_of_zeros_returns_base_bit_for_bit(cuda, x_dtype, w_dtype):
    x, V, Us, scale, _, bases, _ = case(6, 128, [32], [40], x_dtype, w_dtype)
    scale[0] = 0
    bases[0][:, ::3] = -0.0
    ids = torch.tensor([0, 1, 0, 2, 0, 0])
    (y,) = cuda_kernels.forward(x, V, Us, scale, ids, bases, [None])
    assert same([y[ids == 0]], [bases[0][ids == 0]])
    assert (y[1] != bases[0][1]).any()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_lies_outside_fp16_does_not_overflow(cuda, dtype):
    x, V, Us, scale, ids, _, _ = case(4, 128, [32], [40], BF16, FP16)
    x *= 1e5
    args = x, V, Us, scale, ids, [None], [None]
    if dtype == BF16:
        check(cuda_kernels.forward(*args), eager(*args), exact(*args), BF16)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(3),
        torch.tensor([1, 4]),
        torch.tensor([[0, 1, 2], [3, 4, 0]]),
        torch.tensor([0, 9, 1, 9, 2, 9])[::2][:2],
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_every_shape(cuda, ids, dtype):
    _, V, Us, scale, _, _, _ = case(6, 64, [16], [24], BF16, BF16)
    x = torch.randn(2, 3, 64).to(BF16)
    y = svf_linear(x, V, Us[0], scale, ids.to(dtype), impl="cuda")
    token_ids = ids.reshape(ids.shape + (1,) * (2 - ids.dim())).expand(2, 3).reshape(6)
    args = x.view(6, 64), V, Us, scale, token_ids, [None], [None]
    check([y.view(6, 24)], eager(*args), exact(*args), BF16)


def test_a_row_that_is_not_there_gives_nan_and_reads_nothing(cuda):
    args = case(4, 64, [16], [24], BF16, BF16)
    for bad in (5, -1, 2**40):
        ids = torch.tensor([0, bad, 1, 2])
        (y,) = cuda_kernels.forward(*args[:4], ids, *args[5:])
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("T", [5, 13])
@pytest.mark.parametrize("w_dtype", [BF16, INT8])
def test_the_bits_do_not_depend_on_the_order_of_threads_or_the_number_of_blocks(cuda, T, w_dtype, monkeypatch):
    args = case(T, 208, [336, 16], [83, 33], BF16, w_dtype)
    first = cuda_kernels.forward(*args)
    for order, count in itertools.product((0, 1, 2, 3), (1, 2, 3, 5)):
        cuda.order = order
        monkeypatch.setattr(cuda_kernels, "multiprocessors", lambda device, count=count: count)
        assert same(first, cuda_kernels.forward(*args))


@pytest.mark.parametrize("x_dtype, w_dtype", DTYPES)
@pytest.mark.parametrize("T", [9, 16, 17, 32])
def test_clusters_share_their_sums(cuda, x_dtype, w_dtype, T, monkeypatch):
    for (N, Rs, Ms), mix in zip([*SHAPES[:3], (80, [2080], [70])], MIXES, strict=False):
        args = case(T, N, Rs, Ms, x_dtype, w_dtype, mix=mix)
        got = cuda_kernels.forward(*args, Variant(cluster=4))
        check(got, eager(*args), exact(*args), x_dtype)
        for cuda.order in (1, 2):
            assert same(got, cuda_kernels.forward(*args, Variant(cluster=4)))
        cuda.order = 0
        with monkeypatch.context() as more:
            more.setattr(cuda_kernels, "multiprocessors", lambda device: 9)  # two clusters at one time
            check(cuda_kernels.forward(*args, Variant(cluster=4)), eager(*args), exact(*args), x_dtype)
        check(cuda_kernels.forward(*args, Variant(cluster=1)), eager(*args), exact(*args), x_dtype)


@pytest.mark.parametrize("x_dtype, w_dtype", [(BF16, BF16), (FP16, INT8)])
def test_swiglu_in_clusters(cuda, x_dtype, w_dtype):
    args = case(13, 96, [1056, 48], [90, 90], x_dtype, w_dtype)
    (gate, up), (plain_gate, plain_up) = exact(*args), eager(*args)
    got = cuda_kernels.forward_swiglu(*args, Variant(cluster=4))
    check([got], [torch.nn.functional.silu(plain_gate) * plain_up], [gate / (1 + (-gate).exp()) * up], x_dtype)


def test_long_rows_and_many_tokens_get_clusters(cuda, monkeypatch):
    def clusters(T, N, w_dtype=BF16, variant=Variant()):
        before = len(cuda.launches)
        cuda_kernels.forward(*case(T, N, [16], [24], BF16, w_dtype), variant)
        return [torch.frombuffer(bytearray(words), dtype=torch.int64)[8].item() for words in cuda.launches[before:]]

    assert clusters(9, 1024) == [4, 1]
    assert (
        clusters(8, 1024)
        == clusters(9, 1016)
        == clusters(9, 1024, INT8)
        == clusters(9, 1024, variant=Variant(cluster=1))
        == [1, 1]
    )
    assert clusters(9, 2048, INT8) == [4, 1]
    with pytest.raises(emulator.EmulatorError, match="no such kernel"):
        clusters(8, 1024, variant=Variant(cluster=4))
    monkeypatch.setattr(cuda_kernels, "architecture", lambda device: 80)
    assert clusters(9, 1024) == [1, 1]


# --- through the op ------------------------------------------------------------


def test_the_op_runs_it_and_auto_picks_it(cuda):
    x, V, Us, scale, ids, bases, biases = args = case(5, 96, [48, 16], [80, 24], BF16, BF16)
    assert plan(x, V, Us, ids, True).path == "decode"
    for impl in ("cuda", "auto"):
        before = len(cuda.launches)
        got = svf_linear_group(*args[:5], bases, biases, impl=impl)
        assert len(cuda.launches) == before + 2  # a shrink and an expand for both members
        check(got, eager(*args), exact(*args), BF16)
    one = x.view(1, 5, 96), V[:, :48], Us[0], scale[:, :48], ids.view(1, 5), bases[0].view(1, 5, 80), biases[0]
    assert torch.equal(svf_linear(*one, impl="cuda").view(5, 80), got[0])


def test_the_halves_and_the_activation_go_through_it(cuda):
    x, V, Us, scale, ids, bases, biases = args = case(5, 96, [48, 16], [80, 80], BF16, FP16)
    assert may_fuse_swiglu(x.device)
    assert fuses_swiglu(x, V, Us, ids, base=True)
    g = shrink(x.view(1, 5, 96), V, scale, ids.view(1, 5))
    ys = [
        expand(g[:, c], [U], [b], [a], BF16, (1, 5))[0].view(5, 80)
        for c, U, b, a in zip((slice(48), slice(48, 64)), Us, bases, biases, strict=True)
    ]
    assert same(ys, cuda_kernels.forward(*args))
    assert torch.equal(swiglu(x, V, Us, scale, ids, bases, biases), cuda_kernels.forward_swiglu(*args))
    assert len(cuda.launches) == 3 + 2 + 2 + 2


@pytest.mark.parametrize(
    "why, spoil",
    [
        ("33 tokens", lambda x, V, U: (x.new_zeros(33, 96), V, U)),
        ("x in float32", lambda x, V, U: (x.float(), V.float(), U.float())),
        ("x is not contiguous", lambda x, V, U: (torch.stack([x, x], 2)[:, :, 0], V, U)),
        ("x does not begin on 16", lambda x, V, U: (torch.zeros(5 * 96 + 1).to(x)[1:].view(5, 96), V, U)),
        ("x does not begin on 16", lambda x, V, U: (torch.zeros(5, 97).to(x)[:, :96], V, U)),
        ("Vᵀ is not contiguous", lambda x, V, U: (x, V.contiguous(), U)),
        ("U[0] is not contiguous", lambda x, V, U: (x, V, U.t().contiguous().t())),
        ("U[0] does not begin on 16", lambda x, V, U: (x, V, torch.zeros(80 * 48 + 1).to(U)[1:].view(80, 48))),
        ("columns is 42", lambda x, V, U: (x, V[:, :42], U[:, :42].contiguous())),
        ("N is 92", lambda x, V, U: (x[:, :92].contiguous(), V[:92].t().contiguous().t(), U)),
    ],
)
def test_what_it_cannot_take_is_refused_before_the_launch(cuda, why, spoil):
    x, V, Us, scale, _, _, _ = case(5, 96, [48], [80], BF16, BF16)
    x, V, U = spoil(x, V, Us[0])
    ids, scale = torch.zeros(x.shape[0], dtype=torch.int32), scale[:, : V.shape[1]]
    with pytest.raises(ImplUnavailableError) as found:
        svf_linear(x, V, U, scale, ids, impl="cuda")
    assert why in str(found.value)
    assert plan(x, V, [U], ids).impl != "cuda"
    assert not cuda.launches


def test_gradients_are_refused_by_name_and_go_elsewhere_by_choice(cuda):
    x, V, Us, scale, ids, _, _ = case(3, 64, [16], [24], BF16, BF16)
    x.requires_grad_()
    with pytest.raises(ImplUnavailableError, match="no backward"):
        svf_linear(x, V, Us[0], scale, ids, impl="cuda")
    svf_linear(x, V, Us[0], scale, ids).sum().backward()
    assert x.grad is not None
    assert not cuda.launches
    with pytest.raises(IndexError, match="expert_ids holds 7"):
        svf_linear(x.detach(), V, Us[0], scale, ids + 7, impl="cuda")


def test_words_that_memory_safety_forbids_do_not_reach_the_kernel(cuda):
    args = case(4, 64, [16], [24], BF16, BF16)
    g = cuda_kernels.shrink(*args[:2], *args[3:5])
    words = torch.frombuffer(bytearray(cuda.launches[0]), dtype=torch.int64)
    problem = words.numel() - 16  # where the one problem begins
    for at, value, why in (
        (0, 2, "products"),
        (1, 33, "T is not in 1..32"),
        (1, 0, "T is not in 1..32"),
        (2, words[2] + 2, "ids are not"),
        (4, 0, "repeat"),
        (5, 0, "no row of scale"),
        (6, 0, "gate and up"),
        (8, 3, "a cluster is"),
        (9, 0, "multiprocessors"),
        (problem, 0, "null"),
        (problem, words[problem] + 2, "not on 16 bytes"),
        (problem + 1, words[problem + 1] + 8, "not on 16 bytes"),
        (problem + 5, words[problem + 5] + 1, "not on a whole number"),
        (problem + 6, 0, "R or K"),
        (problem + 6, -1, "negative"),
        (problem + 7, 60, "no multiple of 16 bytes"),
        (problem + 8, 66, "not on 16 bytes"),
        (problem + 12, 80, "power of two"),
        (problem + 14, 1, "fp16 factors"),
    ):
        spoiled = words.clone()
        spoiled[at] = value
        with pytest.raises(emulator.EmulatorError, match=why):
            cuda.send(spoiled.numpy().tobytes())
    with pytest.raises(emulator.EmulatorError, match="header"):
        cuda.send(words[:-1].numpy().tobytes())
    g.fill_(torch.nan)
    cuda.send(words.numpy().tobytes())
    assert g.isfinite().all()


def test_its_own_check_passes_and_finds_a_wrong_kernel(cuda, monkeypatch):
    small = ((64, (16, 32), (40, 24)), (48, (16,), (56,)), (33, (16,), (8,)))  # the last is nothing that it takes
    cases = selfcheck("cpu", "cuda", (1, 9), small)
    assert len(cases) == 5 * 2 * 2 * 2
    assert all(c.right for c in cases), [c for c in cases if not c.right]
    real = cuda_kernels.forward
    monkeypatch.setattr(cuda_kernels, "forward", lambda *a: [y * 1.02 for y in real(*a)])
    assert not all(c.right for c in selfcheck("cpu", "cuda", (5,), small[:1]))


# --- the emulator itself ------------------------------------------------------------

FAULTS = {
    "shared memory": ("    block_barrier();  // one a tile", "    // one a tile"),
    "ids is used before the wait": (
        "  wait_for_kernel_before();  // only",
        "  if (threadIdx.x > 999) wait_for_kernel_before();  // only",
    ),
    "deadlock": ("    block_barrier();  // one a tile", "    if (warp != 3) block_barrier();  // one a tile"),
    "W: an address outside": ("min(u.at.row + (lane >> 2) + 8, p.R - 1)", "u.at.row + (lane >> 2) + 8"),
    "x: an address outside": ("n * 8 < tokens", "n * 8 < tokens + 8"),
    "W: an address is not aligned": ("load_weights(u.row + i0)", "load_weights(u.row + i0 + 2)"),
    "y: an address outside": ("if (!outputs.exists(a, p, here.row, i)) continue;", ""),
    "another block wrote since": ("    cluster_barrier();\n#pragma", "    if (block) cluster_barrier();\n#pragma"),
    "nobody wrote": ("    cluster_barrier();\n#pragma", "    block_barrier();\n#pragma"),
    "another block has read since": ("block_sums + side * CLUSTER * SUMS", "block_sums + 0 * side"),
    "that has ended": ("  cluster_barrier();  // nobody ends", "  // nobody ends"),
    "scale: an address outside": ("const bool there = expert[i] >= 0 && expert[i] < a.E", "const bool there = true"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_emulator_finds(monkeypatch, what):
    spoiled = emulator.Emulator((FAULTS[what],), one_kernel=True)
    monkeypatch.setattr(cuda_kernels, "send", spoiled.send)

    def run():
        for spoiled.order, (T, cluster) in itertools.product((0, 1), ((5, 1), (10, 4))):
            args = case(T, 208, [48], [84], BF16, BF16)
            ids = torch.arange(T) * 3  # some are not there
            cuda_kernels.forward(*args[:4], ids, *args[5:], Variant(cluster=cluster))

    with pytest.raises(emulator.EmulatorError, match=what):
        run()
