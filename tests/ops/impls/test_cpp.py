"""impl="cpp" against the reference in fp64, for every instruction set that this CPU has."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2
from t2kernels.ops import ImplUnavailableError, dispatch, plan, svf_linear, svf_linear_group, svf_linear_ref
from t2kernels.ops.device import Device
from t2kernels.ops.impls import cpp_kernels, extension, torch_kernels
from t2kernels.ops.op import call
from tests.helpers.families import build

CPU = torch.device("cpu")
E = 5


def can(isa: str) -> bool:
    try:
        return bool(extension.load().cpu_isa(isa))
    except (ImportError, ValueError):
        return False


MISSING = cpp_kernels.CPP.unsupported_device(CPU)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ISAS = [isa for isa in cpp_kernels.ISAS if can(isa)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 70)
# N, columns and M of each member: nothing that a vector, a block of rows or a cache line divides, one larger than a
# block each way, and powers of 2
SHAPES = (
    (33, (7,), (50,)),
    (64, (16, 8, 3), (24, 25, 1)),
    (301, (60, 5), (131, 49)),
    (16, (32,), (16,)),
    (1, (1,), (1,)),
)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(cpp_kernels, "isa", lambda: request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(lead, N, Cs, Ms, x_dtype=torch.float32, w_dtype=torch.float32, ids_shape=None, ids_dtype=torch.int32):
    """x, V, Us, scale, expert_ids, bases, biases."""

    def factor(*size):
        t = torch.randn(size)
        return (
            torch.randint(-127, 128, size, dtype=torch.int8)
            if w_dtype == torch.int8
            else (t / size[1] ** 0.5).to(w_dtype)
        )

    ids = torch.randint(0, E, lead if ids_shape is None else ids_shape, dtype=ids_dtype)
    scale = torch.randn(E, sum(Cs)) * (1e-4 if w_dtype == torch.int8 else 1)
    bases, biases = [torch.randn(*lead, M).to(x_dtype) for M in Ms], [torch.randn(M).to(x_dtype) for M in Ms]
    x = torch.randn(*lead, N).to(x_dtype)
    return x, factor(sum(Cs), N).t(), [factor(M, C) for M, C in zip(Ms, Cs, strict=True)], scale, ids, bases, biases


def truth(x, V, Us, scale, ids, bases, biases):
    found, start = [], 0
    for U, base, bias in zip(Us, bases, biases, strict=True):
        c = slice(start, start + U.shape[1])
        added = (None if t is None else t.double() for t in (base, bias))
        found.append(svf_linear_ref(x.double(), V[:, c].double(), U.double(), scale[:, c].double(), ids, *added))
        start = c.stop
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", [*FLOATS, torch.int8], ids=str)
def test_every_format_and_size_against_fp64(isa, x_dtype, w_dtype, shape, poison):
    """The error is at most 1.1 times that of torch plus a quarter of a unit in the last place, the rounding of y.

    This holds over all tokens and members, since a few numbers are luck; no single case may exceed three times that.
    """
    ratios = []
    for T, extra in zip(TOKENS, itertools.cycle((0, 1, 2, 3)), strict=False):
        x, V, Us, scale, ids, bases, biases = problem((T,), *shape, x_dtype, w_dtype)
        bases, biases = (t if extra & bit else [None] * len(Us) for t, bit in ((bases, 1), (biases, 2)))
        arguments = x, V, Us, scale, ids, bases, biases
        eager = torch_kernels.forward(*arguments)
        got, want = cpp_kernels.forward(*arguments), torch.cat(truth(*arguments), 1)
        assert {y.dtype for y in got} == {x_dtype}
        off, allowed = ((torch.cat(ys, 1).double() - want).norm().item() for ys in (got, eager))
        ratios.append(off / (1.1 * allowed + torch.finfo(x_dtype).eps / 4 * want.norm().item()))
    assert max(ratios) <= 3
    assert sum(r * r for r in ratios) / len(ratios) <= 1


@pytest.mark.parametrize(
    "lead, ids_shape",
    [((3, 4), ()), ((3, 4), (3,)), ((3, 4), (3, 4)), ((), ()), ((5,), ()), ((2, 0), (2,)), ((0,), (0,))],
)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_shapes_of_x_and_ids(lead, ids_shape, ids_dtype):
    arguments = problem(lead, 33, (7, 4), (5, 6), ids_shape=ids_shape, ids_dtype=ids_dtype)
    x, V, Us, scale, ids, bases, biases = arguments
    got = svf_linear_group(x, V, Us, scale, ids, bases, biases, impl="cpp")
    for y, want in zip(got, truth(*arguments), strict=True):
        assert y.shape == want.shape
        torch.testing.assert_close(y, want.float())


def test_no_columns_leave_base_and_bias():
    x, V, U, scale, ids, (base,), (bias,) = problem((4,), 8, (0,), (5,))
    assert torch.equal(svf_linear(x, V, U[0], scale, ids, base, bias, impl="cpp"), base + bias)


def test_rounding_is_to_nearest_even_in_every_number_of_a_format(isa):
    """y = 1 * u for every u: of fp32 numbers around each boundary of the narrow format, and of every fp16 number."""
    one, ids = torch.ones(1, 1), torch.zeros((), dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        exact = exact[exact.isfinite()].sort().values
        numbers = torch.cat(
            [
                exact,
                (exact[1:] + exact[:-1]) / 2,
                torch.randn(10000),
                torch.randn(10000) * 1e-6,
                torch.tensor([1e6, -1e38]),
            ]
        )
        numbers = torch.cat(
            [
                numbers,
                torch.nextafter(numbers, torch.tensor(torch.inf)),
                torch.nextafter(numbers, torch.tensor(-torch.inf)),
            ]
        )
        got = cpp_kernels.forward(one.to(dtype), one, [numbers[:, None]], one, ids, [None], [None])[0][0]
        want = numbers.to(dtype)
        assert torch.equal(got, want), numbers[got != want][:5]
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[~halves.isnan()]
    got = cpp_kernels.forward(one, one.half(), [halves[:, None]], one, ids, [None], [None])[0][0]
    assert torch.equal(got, halves.float())


def test_nan_and_inf_arrive_and_a_zero_row_leaves_the_bits_of_base(isa):
    x, V, Us, scale, ids, bases, _ = problem((4,), 33, (7,), (50,))
    bases[0][0, :3] = torch.tensor([-0.0, torch.inf, 1e-45])
    got = cpp_kernels.forward(x, V, Us, scale * 0, ids, bases, [None])[0]
    assert torch.equal(got.view(torch.int32), bases[0].view(torch.int32))
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    y = cpp_kernels.forward(x, V, Us, scale, ids, bases, [None])[0]
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("N", [1, 2, 31, 32, 33, 63, 65, 300])
def test_bf16_rows_of_any_length_are_read_to_their_end_and_give_the_same_bits_in_any_batch(isa, N):
    C, M, T = 5, 7, 19
    around = [
        torch.full((rows, width + 40), torch.nan, dtype=torch.bfloat16) for rows, width in ((T, N), (C, N), (M, C))
    ]
    x, Vt, U = (t[:, :-40].copy_(torch.randn(t.shape[0], t.shape[1] - 40)) for t in around)
    scale, ids = torch.randn(E, C), torch.randint(0, E, (T,))
    y = torch.full((T, M), torch.nan, dtype=torch.bfloat16).copy_(torch.randn(T, M))
    want = svf_linear_ref(*(t.double() for t in (x, Vt.t(), U, scale)), ids, y.double())
    whole = cpp_kernels.forward(x, Vt.t(), [U], scale, ids, [y], [None])[0]
    size = want.abs().max().item()
    torch.testing.assert_close(whole.double(), want, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5 * size)
    for t in range(T):
        alone = cpp_kernels.forward(x[t : t + 1], Vt.t(), [U], scale, ids[t : t + 1], [y[t : t + 1]], [None])[0]
        assert torch.equal(alone[0], whole[t])


def test_what_lies_around_the_factors_and_in_the_scratch_is_not_used(isa):
    N, C, M = 33, 21, 50
    arguments = list(problem((5,), N, (C,), (M,)))
    want = cpp_kernels.forward(*arguments)[0]
    cpp_kernels.forward(
        *problem((64,), 301, (300,), (4,))[:3], torch.full((E, 300), torch.nan), *problem((64,), 1, (1,), (4,))[4:]
    )
    around = lambda t: torch.full([n + 2 * 40 for n in t.shape], torch.nan)[40:-40, 40:-40].copy_(t)  # noqa: E731
    x, V, Us, scale, ids, bases, biases = arguments
    moved = around(x), around(V.t()).t(), [around(Us[0])], around(scale), ids, [around(bases[0])], biases
    assert torch.equal(cpp_kernels.forward(*moved)[0], want)
    every_other = torch.full((5, 2 * M), torch.nan)[:, ::2].copy_(bases[0])
    assert torch.equal(cpp_kernels.forward(x.t().contiguous().t(), *moved[1:5], [every_other], biases)[0], want)
    assert torch.equal(cpp_kernels.forward(x, V, Us, scale.t().contiguous().t(), ids, bases, biases)[0], want)
    wide = ids.repeat_interleave(2)[::2]
    assert torch.equal(cpp_kernels.forward(x, V, Us, scale, wide, bases, biases)[0], want)


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.int8], ids=str)
def test_bits_depend_on_neither_threads_nor_company(isa, w_dtype, threads):
    x, V, Us, scale, ids, bases, biases = problem(
        (90,), 501, (260, 77), (515, 230), w_dtype=w_dtype
    )  # enough work for several
    threads(1)
    want = cpp_kernels.forward(x, V, Us, scale, ids, bases, biases)
    for count in (2, 3, 7):
        threads(count)
        for _ in range(5):
            again = cpp_kernels.forward(x, V, Us, scale, ids, bases, biases)
            assert all(map(torch.equal, again, want))
        g = cpp_kernels.shrink(x, V, scale, ids)
        halves = [
            cpp_kernels.expand(part, [U], [base], [bias], x.dtype, (90,))[0]
            for part, U, base, bias in zip(g.split([260, 77], 1), Us, bases, biases, strict=True)
        ]
        assert all(map(torch.equal, halves, want))
    for t in range(0, 90, 5):
        alone = cpp_kernels.forward(x[t], V, Us, scale, ids[t], [b[t] for b in bases], biases)
        assert all(torch.equal(a, w[t]) for a, w in zip(alone, want, strict=True))
    second = cpp_kernels.forward(x, V[:, 260:], Us[1:], scale[:, 260:], ids, bases[1:], biases[1:])
    assert torch.equal(second[0], want[1])


def test_calls_from_several_threads_do_not_meet():
    cases = [problem((T,), 301, (60,), (131,)) for T in (1, 3, 8, 40)]
    wants, wrong = [cpp_kernels.forward(*c)[0] for c in cases], []

    def work(case, want):
        for _ in range(50):
            if not torch.equal(cpp_kernels.forward(*case)[0], want):
                wrong.append(case)

    running = [threading.Thread(target=work, args=pair) for pair in zip(cases, wants, strict=True)]
    for t in running:
        t.start()
    for t in running:
        t.join()
    assert not wrong


def test_a_forked_child_works_on():
    code = """
import os, torch
from t2kernels.ops.impls import cpp_kernels
torch.set_num_threads(2)
x, V, U, s = torch.randn(2, 2048), torch.randn(2048, 2048).t(), torch.randn(2048, 2048), torch.ones(1, 2048)
run = lambda: cpp_kernels.forward(x, V, [U], s, torch.zeros(2, dtype=torch.int32), [None], [None])[0]
want = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), want) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(run(), want))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split() == ["0", "True"]


def test_its_threads_are_those_of_torch():
    code = """
import os, torch
from t2kernels.ops.impls import cpp_kernels
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x, V, U, s = torch.randn(2, 2048), torch.randn(2048, 2048).t(), torch.randn(2048, 2048), torch.ones(1, 2048)
found = [count()]
cpp_kernels.forward(x, V, [U], s, torch.zeros(2, dtype=torch.int32), [None], [None])
found.append(count())
torch.randn(4000000).sin().sum(), V @ U
found.append(count())
print(found[1] - found[0], found[2] - found[1])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split() == ["2", "0"]


def test_importing_the_extension_takes_nothing():
    code = """
import os, sys
import t2kernels._C
maps = open("/proc/self/maps").read()
found = [name for name in ("libcuda", "libcudart", "libtorch", "libc10", "gomp", "nvidia") if name in maps]
print(found, len(os.listdir("/proc/self/task")), "torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["[]", "1", "False"]


# --- which calls go there ----------------------------------------------------------------------------------


@pytest.mark.skipif(ISAS == ["portable"], reason="auto leaves it to torch without AVX2")
def test_auto_takes_it_for_few_tokens_and_never_for_gradients(monkeypatch):
    ran = []
    monkeypatch.setattr(cpp_kernels, "forward", lambda *a, run=cpp_kernels.forward: ran.append(a) or run(*a))
    x, V, (U,), scale, ids, (base,), _ = problem((4,), 33, (7,), (50,))
    assert (plan(x, V, [U], ids).impl, plan(x, V, [U], ids).path) == ("cpp", "stream")
    svf_linear(x, V, U, scale, ids, base)
    assert len(ran) == 1
    wanted = [t.clone().requires_grad_() for t in (x, scale, base)]
    svf_linear(wanted[0], V, U, wanted[1], ids, wanted[2]).sum().backward()
    assert len(ran) == 1
    assert all(t.grad.isfinite().all() for t in wanted)
    assert plan(x, V, [U], ids, grad=True).impl == "torch"
    y = svf_linear(
        x, V, U, scale, ids, base.requires_grad_()
    )  # base alone: nothing of the op is needed for its gradient
    y.sum().backward()
    assert torch.equal(base.grad, torch.ones_like(base))
    many = problem((2000,), 33, (7,), (50,))
    assert plan(*many[:3], many[4]).impl == "torch"


def test_by_name_means_that_or_a_reason(monkeypatch):
    x, V, (U,), scale, ids, (base,), _ = problem((4,), 33, (7,), (50,))
    wrong = (
        ((x.clone().requires_grad_(), V, U, scale), "no backward"),
        ((x, V, U, scale.clone().requires_grad_()), "no backward"),
        ((x, V.contiguous(), U, scale), "wanted the transpose of a Vᵀ"),
        ((x, V, U.t().contiguous().t(), scale), r"U\[0\] has strides"),
        ((x.double(), V.double(), U.double(), scale), "float64 is for checks"),
        ((x, V.double(), U.double(), scale), "V's dtype is torch.float64"),
    )
    for arguments, said in wrong:
        with pytest.raises(ImplUnavailableError, match=said):
            svf_linear(*arguments, ids, impl="cpp")
        assert (
            plan(
                arguments[0],
                *arguments[1:2],
                [arguments[2]],
                ids,
                grad=arguments[0].requires_grad or arguments[3].requires_grad,
            ).impl
            == "torch"
        )
    with pytest.raises(ImplUnavailableError, match="9 members"):
        svf_linear_group(x, torch.cat([V] * 9, 1).t().contiguous().t(), [U] * 9, scale.repeat(1, 9), ids, impl="cpp")
    with pytest.raises(ImplUnavailableError, match="no backward"):
        torch.ops.t2kernels.svf_linear_saving(x, V, [U], scale, ids, [], [], "cpp")
    with pytest.raises(ImplUnavailableError, match="wanted the transpose of a Vᵀ"):
        torch.ops.t2kernels.svf_linear(x, V.contiguous(), U, scale, ids, impl="cpp")
    with torch.no_grad():
        svf_linear(x.clone().requires_grad_(), V, U, scale, ids, impl="cpp")
    for bad in (-1, E):
        with pytest.raises(IndexError, match=f"holds {bad}; scale has rows 0 to {E - 1}"):
            cpp_kernels.forward(x, V, [U], scale, torch.tensor([0, 0, 0, bad]), [base], [None])


def test_without_the_extension_auto_is_torch_and_the_name_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "t2kernels._C", None)
    extension.load.cache_clear()
    dispatch.probe.cache_clear()
    try:
        x, V, (U,), scale, ids, _, _ = problem((4,), 33, (7,), (50,))
        assert plan(x, V, [U], ids).impl == "torch"
        assert "no cpp: t2kernels._C is not built" in plan(x, V, [U], ids).why_impl
        with pytest.raises(ImplUnavailableError, match=r"install t2kernels again where there is a C\+\+ compiler"):
            svf_linear(x, V, U, scale, ids, impl="cpp")
    finally:
        monkeypatch.undo()
        extension.load.cache_clear()
        dispatch.probe.cache_clear()
    assert cpp_kernels.CPP.unsupported_device(CPU) is None


def test_the_instruction_set_can_be_named(monkeypatch):
    for name in ISAS:
        monkeypatch.setenv("T2KERNELS_CPU_ISA", name)
        cpp_kernels.isa.cache_clear()
        assert cpp_kernels.isa() == name
    monkeypatch.setenv("T2KERNELS_CPU_ISA", "mmx")
    cpp_kernels.isa.cache_clear()
    with pytest.raises(ValueError, match="mmx"):
        cpp_kernels.isa()
    monkeypatch.delenv("T2KERNELS_CPU_ISA")
    cpp_kernels.isa.cache_clear()
    assert cpp_kernels.isa() == ISAS[-1]


def test_compiles_in_one_graph():
    x, V, (U,), scale, ids, (base,), (bias,) = problem((4,), 33, (7,), (50,))
    f = torch.compile(lambda *a: svf_linear(*a, impl="cpp") * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(
            f(x, V, U, scale, ids, base, bias), svf_linear(x, V, U, scale, ids, base, bias, impl="cpp") * 2
        )


def test_whoever_looks_at_the_op_sees_it():
    """Without gradients the dispatcher is left out, but not under a mode, a tracer, a transform or a profiler."""
    x, V, (U,), scale, ids, _, _ = problem((4,), 33, (7,), (50,))
    op = torch.ops.t2kernels.svf_linear.default
    f = lambda x: call(x, V, U, scale, ids)  # noqa: E731

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list = []
    with torch.no_grad():
        want = f(x)
        with Watch():
            assert torch.equal(f(x), want)
        assert op in seen
        assert op in {n.target for n in make_fx(f)(x).graph.nodes}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            f(x)
        assert any(e.key == "t2kernels::svf_linear" for e in profile.key_averages())
        assert "t2kernels::svf_linear" in str(torch.jit.trace(f, x).graph)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert f(mode.from_tensor(x)).shape == want.shape


@pytest.mark.parametrize("form", ["delta", "factored"])
@pytest.mark.parametrize("factors", ["fp32", "int8"])
def test_a_patched_model_decodes_as_with_torch(form, factors, monkeypatch):
    model = build("llama")
    bank = t2.patch_model(model, form=form, factors=factors)
    for name in ("a", "b"):
        bank.add(name, bank.expert({n: torch.rand(k) + 0.5 for n, k in bank.matrices.items()}))
    ids, counted = torch.randint(0, model.config.vocab_size, (3, 2)), []
    for name in ("forward", "shrink", "expand", "prepare"):
        monkeypatch.setattr(cpp_kernels, name, lambda *a, f=getattr(cpp_kernels, name): counted.append(1) or f(*a))
    run = lambda: model(ids, experts=["a", None, "b"]).logits  # noqa: E731
    with torch.no_grad():
        got = run()
        assert bool(counted) == (ISAS != ["portable"])
        torch.testing.assert_close(got, model(ids, experts=["a", None, "b"]).logits, atol=0, rtol=0)
        counted.clear()
        without = Device(missing=(("cpp", "not wanted"),), unchecked=(("triton", "no"), ("cuda", "no")))
        monkeypatch.setattr(dispatch, "device_of", lambda device: without)
        want = run()
    assert not counted
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_environment_report_names_it():
    from t2kernels.cli.verbs.env import report

    assert report()["svf_linear"]["cpp"].startswith(
        "runs on" if not torch.cuda.is_available() else "impl='cpp' cannot run"
    )


def test_an_extension_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "t2kernels._C", ModuleType("t2kernels._C"))
    extension.load.cache_clear()
    dispatch.probe.cache_clear()
    try:
        x, V, (U,), _, ids, _, _ = problem((4,), 33, (7,), (50,))
        assert "t2kernels._C was built from other sources" in plan(x, V, [U], ids).why_impl
        assert plan(x, V, [U], ids).impl == "torch"
    finally:
        monkeypatch.undo()
        extension.load.cache_clear()
        dispatch.probe.cache_clear()


def test_the_interface_has_one_number():
    source = (Path(__file__).parents[3] / "csrc" / "bindings.cpp").read_text()
    assert f'm.attr("interface") = {extension.INTERFACE};' in source
