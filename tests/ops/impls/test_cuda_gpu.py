"""The CUDA decode kernel on a GPU, at the sizes of Llama-3-8B: against fp64, in CUDA graphs, a thousand times over, and
beside other kernels."""

import itertools
import subprocess
import sys

import pytest
import torch

from t2kernels.ops import svf_linear_group
from t2kernels.ops.impls import cuda_kernels
from t2kernels.ops.impls.cuda_kernels import CUDA, DTYPES, Variant
from t2kernels.ops.tuning.selfcheck import selfcheck
from tests.helpers.gpu_cases import BF16, GROUPS, INT8, captured, exact, problem
from tests.helpers.triton_cases import MIXES, E, check, draw_ids, eager

pytestmark = [pytest.mark.gpu]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="no CUDA GPU"))
elif why := CUDA.unsupported_device(torch.device("cuda")):
    pytestmark.append(pytest.mark.skip(reason=why))

TOKENS = (1, 2, 5, 8, 9, 13, 16, 17, 32)
ALONE = Variant(dependent=False)
FITTING = [name for name in GROUPS if name != "odd"]


def arguments(T, name, x_dtype=BF16, w_dtype=BF16, mix="uniform", base=True):
    p = problem(T, GROUPS[name], x_dtype, w_dtype, base)
    return *p[:4], draw_ids(mix, T), *p[4:]


def same(a, b):
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_dtype, w_dtype", DTYPES)
@pytest.mark.parametrize("name", FITTING)
def test_forward(name, x_dtype, w_dtype, monkeypatch):
    for T, mix in zip(TOKENS, itertools.cycle(MIXES)):
        args = arguments(T, name, x_dtype, w_dtype, mix)
        got = cuda_kernels.forward(*args)
        check(got, eager(*args), exact(*args), x_dtype)
        assert same(got, cuda_kernels.forward(*args, ALONE))
        alone = cuda_kernels.forward(*args, Variant(cluster=1))
        check(alone, eager(*args), exact(*args), x_dtype)
        with monkeypatch.context() as few:  # few thread blocks, and few clusters of them
            few.setattr(cuda_kernels, "multiprocessors", lambda device: 8)
            assert same(alone, cuda_kernels.forward(*args, Variant(cluster=1)))
            check(cuda_kernels.forward(*args), eager(*args), exact(*args), x_dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_dtype, w_dtype", DTYPES)
def test_swiglu(x_dtype, w_dtype):
    for T in TOKENS:
        p = problem(T, (2048, [256, 2048], [5632, 5632]), x_dtype, w_dtype)
        args = *p[:4], draw_ids("uniform", T), *p[4:]
        (gate, up), (plain_gate, plain_up) = exact(*args), eager(*args)
        want, plain = gate / (1 + (-gate).exp()) * up, torch.nn.functional.silu(plain_gate) * plain_up
        check([cuda_kernels.forward_swiglu(*args)], [plain], [want], x_dtype)


def test_its_own_check_passes():
    wrong = [c for c in selfcheck("cuda", "cuda") if not c.right]
    assert not wrong


def test_a_row_that_is_not_there_gives_nan():
    args = arguments(4, "qkv delta")
    for bad in (E, -1, 2**40):
        ids = torch.tensor([0, bad, 1, 2], device="cuda")
        for y in svf_linear_group(*args[:4], ids, args[5], impl="cuda"):
            assert y[1].isnan().all()
            assert y[[0, 2, 3]].isfinite().all()


def test_a_graph_follows_experts_that_are_swapped_between_replays():
    x, V, Us, scale, ids, bases, biases = args = arguments(8, "qkv delta")

    def steps():
        gated = cuda_kernels.forward_swiglu(x, V[:, 256:], Us[1:], scale[:, 256:], ids, bases[1:], biases[1:])
        return [*cuda_kernels.forward(*args), gated]

    graph, captured_ys = captured(steps)
    for row in range(4):
        ids.copy_(torch.randint(0, E, (8,)))  # other experts, and another one in a row of the table
        scale[row] = torch.randn_like(scale[row])
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert same(captured_ys, steps())
        check(captured_ys[:3], eager(*args), exact(*args), BF16)


@pytest.mark.parametrize("T, variant", [(8, Variant()), (32, Variant()), (16, Variant(cluster=1))])
def test_a_thousand_runs_give_the_same_bits(T, variant):
    """A race in shared memory, in the dependent launch or in a cluster would show as a bit that moves."""
    for name, w_dtype in (("qkv delta", BF16), ("down", INT8)):
        args = arguments(T, name, BF16, w_dtype)
        first, moved = cuda_kernels.forward(*args, variant), torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            for a, b in zip(cuda_kernels.forward(*args, variant), first, strict=True):
                moved += (a.view(torch.int16) != b.view(torch.int16)).any()
        assert moved.item() == 0


@pytest.mark.parametrize("T", [4, 12])
def test_a_chain_of_dependent_launches_is_what_waiting_gives(T):
    """x of each call is y of the one before, and memory is reused at once: nothing may start too early."""
    p = problem(T, (2048, [256], [2048]), BF16, BF16, base=False)
    x, V, Us, scale = p[:4]
    scale, ids = scale / 50, draw_ids("distinct", T)  # 200 calls do not overflow

    def chain(wait, torch_between):
        y = x
        for _ in range(200):
            (y,) = cuda_kernels.forward(y, V, Us, scale, ids, [y], [None])
            y = y * 0.5 if torch_between else y
            if wait:
                torch.cuda.synchronize()
        return y

    for torch_between in (True, False):
        assert same([chain(True, torch_between)], [chain(False, torch_between)])


def test_streams_do_not_disturb_each_other():
    args = [arguments(4, "qkv delta") for _ in range(2)]
    want = [cuda_kernels.forward(*a) for a in args]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in args], [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(cuda_kernels.forward(*args[i]))
    torch.cuda.synchronize()
    assert all(same(y, w) for ys, w in zip(found, want, strict=True) for y in ys)


def test_loading_the_extension_makes_no_context():
    asks = (
        "import ctypes; from t2kernels import _C; import t2kernels.ops.impls.cuda_kernels; c = ctypes.c_void_p();"
        "r = ctypes.CDLL('libcuda.so.1').cuCtxGetCurrent(ctypes.byref(c)); assert r == 3 or not c.value, (r, c)"
    )
    subprocess.run([sys.executable, "-c", asks], check=True)
