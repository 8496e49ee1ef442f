"""The Triton kernels on a GPU, at the sizes of Llama-3-8B: against fp64, in CUDA graphs, and a thousand times over.

What the small tests of test_triton_forward.py and test_triton_backward.py ask of the interpreter they ask natively too,
where there is a GPU.
"""

import pytest
import torch

from tests.helpers.gpu_cases import GROUPS, PAIRS, TOKENS, captured, exact, problem
from tests.helpers.triton_cases import MIXES, E, check, draw_ids, eager, gradients

pytest.importorskip("triton")

from t2kernels.ops.impls import torch_kernels
from t2kernels.ops.impls.triton import TRITON, matmul
from t2kernels.ops.impls.triton import launch_pair as launch

pytestmark = [pytest.mark.gpu]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="no CUDA GPU"))

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def eager_gradients(dys, x, V, Us, scale, ids):
    """As plain torch does it in x's dtype; int8 factors over 128, with the table to match, since fp16 would
    overflow."""
    if V.dtype != INT8:
        return gradients(dys, x, V, Us, scale, ids, x.dtype)
    dx, dscale = gradients(
        dys, x, V.to(x.dtype) / 128, [U.to(x.dtype) / 128 for U in Us], scale * 2.0**14, ids, x.dtype
    )
    return dx, dscale * 2.0**14


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
@pytest.mark.parametrize("name", GROUPS)
def test_forward(name, x_dtype, w_dtype):
    for T, mix in zip(TOKENS, MIXES + MIXES, strict=False):
        args = problem(T, GROUPS[name], x_dtype, w_dtype)
        args = *args[:4], draw_ids(mix, T), *args[4:]
        want, plain = exact(*args), eager(*args)
        check(launch.forward_pair(*args), plain, want, x_dtype)
        check(torch_kernels.forward(*args, matmul.row_scaling), plain, want, x_dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
@pytest.mark.parametrize("R", [256, 2048])
def test_swiglu(x_dtype, w_dtype, R):
    for T in TOKENS:
        args = problem(T, (2048, [R, R], [5632, 5632]), x_dtype, w_dtype)
        args = *args[:4], draw_ids("uniform", T), *args[4:]
        gate, up = exact(*args)
        plain_gate, plain_up = eager(*args)
        want, plain = gate / (1 + (-gate).exp()) * up, torch.nn.functional.silu(plain_gate) * plain_up
        check([launch.forward_swiglu(*args)], [plain], [want], x_dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_dtype, w_dtype", PAIRS)
def test_backward(x_dtype, w_dtype):
    for T, mix in ((1, "one"), (300, "zipf"), (2000, "distinct"), (4096, "skewed")):
        x, V, Us, scale, _, _ = problem(T, (1024, [512, 256], [768, 1024]), x_dtype, w_dtype)
        dys = [torch.randn(T, U.shape[0], device="cuda").to(x_dtype) for U in Us]
        args = dys, x, V, Us, scale, draw_ids(mix, T)
        got = matmul.backward(*args, True, True)
        want, plain, room = gradients(*args, torch.float64), eager_gradients(*args), 2 if x_dtype == FP32 else 1.1
        for a, b, c in zip(got, plain, want, strict=True):
            assert (a.double() - c).norm() <= max(room * (b.double() - c).norm(), 1e-12 * c.norm())
        assert (got[1][[e for e in range(E) if e not in args[5].tolist()]] == 0).all()


def test_a_graph_follows_experts_that_are_swapped_between_replays():
    args = x, V, Us, scale, _, bases, biases = (
        *(p := problem(8, GROUPS["qkv delta"], BF16, BF16))[:4],
        draw_ids("uniform", 8),
        *p[4:],
    )
    ids = args[4]
    dys = [torch.randn_like(b) for b in bases]

    def step():
        return (
            launch.forward_pair(*args),
            matmul.backward(dys, x, V, Us, scale, ids, True, True),
            launch.forward_swiglu(x, V[:, 256:], Us[1:], scale[:, 256:], ids, bases[1:], biases[1:]),
        )

    graph, found = captured(step)
    for round_ in range(4):
        ids.copy_(torch.randint(0, E, (8,)))  # other experts, and another one in a row of the table
        scale[round_] = torch.randn_like(scale[round_])
        x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(flat(found), flat(step()), strict=True):
            assert torch.equal(a, b)
        check(found[0], eager(*args), exact(*args), BF16)


def flat(found):
    return [t for f in found for t in ([f] if isinstance(f, torch.Tensor) else f)]


def test_a_thousand_runs_give_the_same_bits():
    """A race in the split sums, in the dependent launch or in the slots would show as a bit that moves."""
    for name in ("qkv delta", "down"):
        p = problem(8, GROUPS[name], BF16, BF16)
        args = *p[:4], draw_ids("distinct", 8), *p[4:]
        dys, ids = [torch.randn(512, M, device="cuda").to(BF16) for M in GROUPS[name][2]], draw_ids("zipf", 512)
        many = torch.randn(512, GROUPS[name][0], device="cuda").to(BF16)
        first, moved = None, torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(1000):
            found = [
                *launch.forward_pair(*args),
                *(matmul.backward(dys, many, *p[1:4], ids, False, True) if i % 10 == 0 else ()),
            ]
            first = first or found
            for a, b in zip(found, first, strict=False):
                moved += (a.view(torch.uint8) != b.view(torch.uint8)).any()
        assert moved.item() == 0


def test_a_chain_of_dependent_launches_is_what_waiting_gives():
    """x of each call is y of the one before, and memory is reused at once: nothing may start too early."""
    x, V, Us, scale, _, _ = problem(4, (2048, [256], [2048]), BF16, BF16, base=False)
    ids = draw_ids("distinct", 4)

    def chain(wait):
        y = x
        for _ in range(200):
            (y,) = launch.forward_pair(y, V, Us, scale, ids, [y], [None])
            y = y * 0.5
            if wait:
                torch.cuda.synchronize()
        return y

    assert torch.equal(chain(True), chain(False))


def test_the_device_of_the_tensors_is_used():
    assert TRITON.unsupported_device(torch.device("cuda")) is None
    args = problem(2, GROUPS["odd"], FP32, FP32)
    with torch.cuda.stream(torch.cuda.Stream()):
        args = *args[:4], draw_ids("uniform", 2), *args[4:]
        got = launch.forward_pair(*args)
        torch.cuda.current_stream().synchronize()
    check(got, eager(*args), exact(*args), FP32)
