"""svf_linear against the reference in fp64: forward, every gradient, odd sizes, empty batches, all expert mixes."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing

from t2kernels.ops import ImplUnavailableError, plan, svf_linear, svf_linear_group, svf_linear_ref
from t2kernels.ops.dispatch import device_of
from t2kernels.ops.impls import torch_kernels

E = 5
# Triton's kernels run on CPU tensors in its interpreter, which conftest asks for where there is no GPU.
IMPLS = [impl for impl in ("torch", "triton") if device_of(torch.device("cpu")).unsupported(impl) is None]
SHAPES = [
    ((1,), 7, 3, 5),
    ((17,), 33, 20, 9),
    ((4, 6), 16, 16, 24),
    ((2, 3, 5, 4), 12, 7, 10),
    ((0,), 8, 4, 6),
    ((3, 0), 8, 4, 6),
]
MIXES = ["one", "distinct", "uniform", "zipf", "skewed"]


def problem(lead, N, R, M, dtype=torch.float32):
    # Factors have orthonormal columns in use, so entries of size 1/sqrt(n): the errors below are those of a real layer.
    x, base = torch.randn(*lead, N, dtype=dtype), torch.randn(*lead, M, dtype=dtype)
    V, U = (torch.randn(N, R) / N**0.5).to(dtype), (torch.randn(M, R) / M**0.5).to(dtype)
    scale = torch.randn(E, R, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, V, U, scale, base, torch.randn(M, dtype=dtype)


def draw_ids(mix, shape, dtype=torch.int32):
    n = max(1, torch.Size(shape).numel())
    weights = {
        "one": [0, 0, 1, 0, 0],
        "uniform": [1] * 5,
        "zipf": [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5],
        "skewed": [96, 1, 1, 1, 1],
    }
    ids = (
        torch.arange(n) % E
        if mix == "distinct"
        else torch.multinomial(torch.tensor(weights[mix], dtype=torch.float), n, replacement=True)
    )
    return ids[: torch.Size(shape).numel()].reshape(shape).to(dtype)


def exact(x, V, U, scale, ids, base=None, bias=None):
    """Token by token in fp64, with nothing shared with the code under test."""
    lead = x.shape[:-1]
    ids = ids.reshape(ids.shape + (1,) * (len(lead) - ids.dim())).expand(lead).reshape(-1)
    rows = []
    for t, row in enumerate(x.reshape(-1, x.shape[-1]).double()):
        y = U.double() @ torch.diag(scale[ids[t].item()].double()) @ V.double().t() @ row
        rows.append(y)
    y = torch.stack(rows) if rows else torch.zeros(0, U.shape[0], dtype=torch.float64)
    y = y.reshape(*lead, U.shape[0])
    return y + (base.double() if base is not None else 0) + (bias.double() if bias is not None else 0)


def eager_error(x, V, U, scale, ids, base, bias, truth):
    """The error of plain torch in this dtype, plus the rounding of the result itself: every tolerance comes from it."""
    lead = x.shape[:-1]
    rows = scale[ids.long()].reshape(*ids.shape, *(1,) * (len(lead) - ids.dim()), scale.shape[1]).to(x.dtype)
    y = ((x @ V) * rows) @ U.t()
    y = y + base if base is not None else y
    y = y + bias if bias is not None else y
    return (y.double() - truth).norm() + torch.finfo(x.dtype).eps / 4 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead, N, R, M", SHAPES)
def test_forward_is_as_exact_as_eager(dtype, lead, N, R, M, impl):
    x, V, U, scale, base, bias = problem(lead, N, R, M, dtype)
    for mix in MIXES:
        for prefix in {(), lead[:1], lead}:
            ids = draw_ids(mix, prefix)
            for b, c in ((None, None), (base, None), (None, bias), (base, bias)):
                truth = exact(x, V, U, scale, ids, b, c)
                allowed = 2 * eager_error(x, V, U, scale, ids, b, c, truth)
                for got in (
                    svf_linear(x, V, U, scale, ids, b, c, impl=impl),
                    svf_linear_ref(x, V, U, scale, ids, b, c),
                ):
                    assert got.dtype == dtype
                    assert got.shape == (*lead, M)
                    assert (got.double() - truth).norm() <= allowed


@pytest.mark.parametrize("lead, N, R, M", SHAPES[:4])
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_match_the_reference_in_fp64(lead, N, R, M, mix):
    x, V, U, scale, base, bias = problem(lead, N, R, M, torch.float64)
    ids, dy = draw_ids(mix, lead[:1]), torch.randn(*lead, M, dtype=torch.float64)
    grads = []
    for f in (svf_linear, svf_linear_ref):
        leaves = [t.clone().requires_grad_() for t in (x, scale, base, bias)]
        f(leaves[0], V, U, leaves[1], ids, leaves[2], leaves[3]).backward(dy)
        grads.append([t.grad for t in leaves])
    for name, got, want in zip(("x", "scale", "base", "bias"), *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_low_precision_are_as_exact_as_eager(dtype, impl):
    x, V, U, scale, base, _ = problem((64,), 48, 40, 56, dtype)
    ids, dy = draw_ids("uniform", (64,)), torch.randn(64, 56).to(dtype)

    def grads(f, wide):
        leaves = [t.to(torch.float64 if wide else t.dtype).clone().requires_grad_() for t in (x, scale)]
        factors = [t.to(torch.float64 if wide else t.dtype) for t in (V, U)]
        f(leaves[0], *factors, leaves[1], ids, base.to(leaves[0].dtype)).backward(dy.to(leaves[0].dtype))
        return [t.grad.double() for t in leaves]

    def eager(x, V, U, scale, ids, base):
        return base + ((x @ V) * scale.to(x.dtype)[ids.long()]) @ U.t()

    op = partial(svf_linear, impl=impl)
    for got, plain, want in zip(grads(op, False), grads(eager, False), grads(svf_linear_ref, True), strict=True):
        assert (got - want).norm() <= 2 * (plain - want).norm()


MIXED = [
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.int8),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def mixed_problem(x_dtype, factors, lead=(37,), N=48, C=40, M=56):
    """Factors in another format than x, and their column steps [C]; the steps of int8 factors are in scale too."""
    x, V, U, scale, base, bias = problem(lead, N, C, M, torch.float32)
    steps = torch.ones(2, C)
    if factors == torch.int8:
        steps = torch.stack([t.abs().amax(0) / 127 for t in (V, U)])
        V, U = ((t / s).round() for t, s in zip((V, U), steps, strict=True))
        scale = scale * steps[0] * steps[1]
    return x.to(x_dtype), V.to(factors), U.to(factors), scale, base.to(x_dtype), bias.to(x_dtype), steps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("x_dtype, factors", MIXED)
def test_other_formats_of_factors_are_as_exact_as_eager_in_x(x_dtype, factors, impl):
    x, V, U, scale, base, bias, (v_steps, u_steps) = mixed_problem(x_dtype, factors)
    ids = draw_ids("uniform", (37,))
    plain = x, (V * v_steps).to(x_dtype), (U * u_steps).to(x_dtype), scale / v_steps / u_steps, ids
    for b, c in ((None, None), (base, None), (base, bias)):
        truth = exact(x, V, U, scale, ids, b, c)
        allowed = 1.1 * eager_error(*plain, b, c, truth)
        got = svf_linear(x, V, U, scale, ids, b, c, impl=impl)
        assert got.dtype == x_dtype
        assert (got.double() - truth).norm() <= allowed


def test_fp16_factors_are_better_than_bf16_ones_under_a_bf16_input():
    x, V, U, scale, _, _ = problem((64,), 256, 256, 256)
    x, ids = x.bfloat16(), draw_ids("uniform", (64,))
    truth = exact(x, V, U, scale, ids)
    fp16, bf16 = (
        (svf_linear(x, V.to(d), U.to(d), scale, ids).double() - truth).norm() / truth.norm()
        for d in (torch.float16, torch.bfloat16)
    )
    assert fp16 < 0.7 * bf16  # what is left is the rounding of y to bf16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("x_dtype, factors", [(torch.bfloat16, torch.float16), (torch.float16, torch.int8)])
def test_large_activations_do_not_overflow_in_fp16(x_dtype, factors, impl):
    N, C, M = 4096, 8, 64
    V, U = torch.linalg.qr(torch.randn(N, C))[0], torch.linalg.qr(torch.randn(M, C))[0]
    x = (V.sum(1) / V.sum(1).norm() * 60000).to(x_dtype).expand(4, N)  # as long as fp16 can say, and along V
    scale, ids = torch.rand(E, C), torch.zeros(4, dtype=torch.int32)
    if factors == torch.int8:
        steps = V.abs().amax(0) / 127, U.abs().amax(0) / 127
        V, U, scale = (V / steps[0]).round(), (U / steps[1]).round(), scale * steps[0] * steps[1]
    V, U = V.to(factors), U.to(factors)
    truth, got = exact(x, V, U, scale, ids), svf_linear(x, V, U, scale, ids, impl=impl)
    assert (got.double() - truth).norm() <= 4 * torch.finfo(x_dtype).eps * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("x_dtype, factors", [(torch.float32, torch.float32), *MIXED])
def test_gradients_with_other_formats_and_with_h_saved_or_not(x_dtype, factors, impl):
    x, V, U, scale, base, _, (v_steps, u_steps) = mixed_problem(x_dtype, factors)
    ids, dy = draw_ids("uniform", (37,)), torch.randn(37, 56).to(x_dtype)
    wide = [t.double().requires_grad_() for t in (x, scale)]
    svf_linear_ref(wide[0], V.double(), U.double(), wide[1], ids).backward(dy.double())
    plain = [x.clone().requires_grad_(), (scale / v_steps / u_steps).requires_grad_()]
    rows = plain[1][ids.long()].to(x_dtype)
    (((plain[0] @ (V * v_steps).to(x_dtype)) * rows) @ (U * u_steps).to(x_dtype).t()).backward(dy)
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    svf_linear(leaves[0], V, U, leaves[1], ids, base, impl=impl).backward(dy)
    again = torch.ops.t2kernels.svf_linear_backward([dy], x, V, [U], scale, ids, None, True, True, impl)
    for got, without_h, want, eager, units in zip(leaves, again, wide, plain, (1, v_steps * u_steps), strict=True):
        truth = want.grad * units
        allowed = 1.1 * (eager.grad.double() - truth).norm() + torch.finfo(x_dtype).eps / 4 * truth.norm()
        assert (got.grad.double() * units - truth).norm() <= allowed
        torch.testing.assert_close(without_h, got.grad)


def test_a_forward_that_is_differentiated_keeps_x_V_and_one_that_is_not_keeps_nothing():
    x, V, U, scale, _, _ = problem((6,), 8, 4, 6)
    ids = draw_ids("uniform", (6,))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        svf_linear(x, V, U, scale.clone().requires_grad_(), ids)
        assert any(t.shape == (6, 4) and torch.allclose(t, x @ V) for t in seen)
        seen.clear()
        svf_linear(x, V, U, scale, ids)
        assert not seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [None, torch.int8, torch.float16])
def test_a_dense_weight_made_for_experts_of_many_tokens_gives_the_same(dtype, factors):
    x, V, U, scale, base, bias = (
        problem((200,), 20, 20, 24) if factors is None else mixed_problem(dtype, factors, (200,), 20, 20, 24)[:-1]
    )
    x, base, bias = x.to(dtype), base.to(dtype), bias.to(dtype)
    V, U = (V.to(dtype), U.to(dtype)) if factors is None else (V, U)
    for mix in MIXES:
        ids = draw_ids(mix, (200,))
        for b, c in ((None, None), (base, bias)):
            truth = exact(x, V, U, scale, ids, b, c)
            one = torch_kernels.materialised(x, V, [U], scale, ids[:1], [b], [c])[0]
            where = ids == ids[0]
            some = torch_kernels.materialised(x, V, [U], scale, ids, [b], [c], [1, 3])[0]
            allowed = 2 * torch.finfo(dtype).eps * truth.norm()
            assert (one.double() - truth)[where].norm() <= allowed
            assert (some.double() - truth).norm() <= allowed


def test_the_plan_sends_many_tokens_of_one_expert_through_a_dense_weight_and_no_others():
    N, T = 16, 200
    x, V, U, scale, _, _ = problem((T,), N, N, N)
    many = torch.zeros(T, dtype=torch.int32)
    many[::5] = 2
    assert plan(x, V, [U], torch.tensor(1)).path == "dense"
    assert plan(x, V, [U], many).experts == (0, 2)
    assert plan(x, V, [U], torch.arange(T, dtype=torch.int32) % E * 0 + torch.arange(T) // 190).experts == (0,)
    assert plan(x[:10], V, [U], torch.tensor(1)).path == "mm"
    assert plan(x, V, [U], many, base=True).path == "mm"
    assert plan(x, V, [U], many, grad=True).path == "mm"
    ids = (torch.arange(T) // 190).int()
    torch.testing.assert_close(svf_linear(x, V, U, scale, ids), svf_linear_ref(x, V, U, scale, ids))


def test_frozen_factors_get_no_gradient():
    x, V, U, scale, _, _ = problem((6,), 8, 4, 6)
    V.requires_grad_(), U.requires_grad_(), x.requires_grad_()
    svf_linear(x, V, U, scale, draw_ids("uniform", (6,))).sum().backward()
    assert V.grad is None
    assert U.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("dtype, impl", [(torch.float64, "torch"), *((torch.float32, impl) for impl in IMPLS)])
def test_a_group_is_its_members(dtype, impl):
    Ms, Rs, N = (9, 5, 12), (4, 3, 7), 10
    x = torch.randn(3, 6, N, dtype=dtype)
    Vs, Us = (
        [torch.randn(N, r, dtype=dtype) for r in Rs],
        [torch.randn(m, r, dtype=dtype) for m, r in zip(Ms, Rs, strict=True)],
    )
    scales = [torch.randn(E, r, dtype=dtype) for r in Rs]
    bases, biases = [torch.randn(3, 6, m, dtype=dtype) for m in Ms], [torch.randn(m, dtype=dtype) for m in Ms]
    ids = draw_ids("uniform", (3,), torch.int64)
    dys = [torch.randn(3, 6, m, dtype=dtype) for m in Ms]
    a = [t.clone().requires_grad_() for t in (x, torch.cat(scales, 1), *bases, *biases)]
    together = svf_linear_group(a[0], torch.cat(Vs, 1), Us, a[1], ids, a[2:5], a[5:8], impl=impl)
    with torch.no_grad():  # other kernels than where gradients are wanted
        for got, want in zip(
            svf_linear_group(a[0], torch.cat(Vs, 1), Us, a[1], ids, a[2:5], a[5:8], impl=impl), together, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.autograd.backward(together, dys)
    b = [t.clone().requires_grad_() for t in (x, torch.cat(scales, 1), *bases, *biases)]
    parts = b[1].split(Rs, 1)
    alone = [svf_linear_ref(b[0], Vs[i], Us[i], parts[i], ids, b[2 + i], b[5 + i]) for i in range(3)]
    torch.autograd.backward(alone, dys)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got.grad, want.grad, **tolerance)


def test_a_zero_row_leaves_the_bits_of_base_alone():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, V, U, scale, base, _ = problem((32,), 24, 8, 16, dtype)
        scale[0] = 0
        ids = draw_ids("uniform", (32,))
        y = svf_linear(x, V, U, scale, ids, base)
        assert torch.equal(y[ids == 0], base[ids == 0])
        assert not torch.equal(y[ids == 1], base[ids == 1])


def test_opcheck():
    x, V, U, scale, base, bias = problem((3, 4), 10, 6, 8)
    x.requires_grad_(), scale.requires_grad_()
    ids = draw_ids("uniform", (3,))
    op = torch.ops.t2kernels
    torch.library.opcheck(op.svf_linear.default, (x, V, U, scale, ids, base, bias))
    torch.library.opcheck(op.svf_linear.default, (x.bfloat16(), V.bfloat16(), U.bfloat16(), scale, ids))
    torch.library.opcheck(op.svf_linear_group.default, (x, V, [U[:, :2], U[:5, 2:]], scale, ids, [], [], "torch"))
    torch.library.opcheck(op.svf_linear_saving.default, (x, V, [U[:, :2], U[:5, 2:]], scale, ids, [], [], "torch"))
    torch.library.opcheck(
        op.svf_linear_backward.default, ([base], x.detach(), V, [U], scale.detach(), ids, None, True, True, "torch")
    )


def test_compiles_in_one_graph_and_not_again_for_other_ids():
    x, V, U, scale, base, _ = problem((8,), 10, 6, 12)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x, ids: svf_linear(x, V, U, scale, ids, base).sin(), fullgraph=True, backend=counter)
    for mix in MIXES:
        ids = draw_ids(mix, (8,))
        torch.testing.assert_close(f(x, ids), svf_linear_ref(x, V, U, scale, ids, base).sin())
    assert counter.frame_count == 1


def test_bad_arguments_are_named():
    x, V, U, scale, base, bias = problem((4,), 8, 3, 6)
    ids = draw_ids("uniform", (4,))
    wrong = [
        ((x[:, :7], V, U, scale, ids), "V's shape"),
        ((x, V, U[:, :2], scale, ids), "the columns of U"),
        ((x, V, U, scale[:, :2], ids), "scale's shape"),
        ((x, V, U, scale.half(), ids), "scale.dtype"),
        ((x, V, U, scale, ids.float()), "expert_ids.dtype"),
        ((x, V, U, scale, ids[:3]), "expert_ids' shape"),
        ((x, V, U, scale, ids[:, None]), "expert_ids' shape"),
        ((x, V.half(), U, scale, ids), "U.*'s dtype"),
        ((x, V.int(), U.int(), scale, ids), "V.dtype"),
        ((x, V, U, scale, ids, base[:3]), "base"),
        ((x, V, U, scale, ids, None, bias[:2]), "bias"),
        ((x.long(), V, U, scale, ids), "x.dtype"),
        ((x, V, U, scale.to("meta"), ids), "scale's device"),
    ]
    for arguments, said in wrong:
        with pytest.raises(ValueError, match=said):
            svf_linear(*arguments)
    for bad in (E, -1):
        with pytest.raises(IndexError, match=f"holds {bad}; scale has rows 0 to {E - 1}"):
            svf_linear(x, V, U, scale, torch.tensor([0, 0, bad, 0]))
    with pytest.raises(ValueError, match="base has 1 members, U has 2"):
        svf_linear_group(x, V, [U, U], scale, ids, [base])


def test_impl_means_that_one_or_an_error():
    x, V, U, scale, _, _ = problem((4,), 8, 3, 6)
    ids = draw_ids("uniform", (4,))
    choice = plan(x, V, [U], ids)
    assert choice.impl == "torch"
    assert "cpu" in choice.why
    assert torch.equal(svf_linear(x, V, U, scale, ids, impl="torch"), svf_linear(x, V, U, scale, ids, impl="auto"))
    with pytest.raises(ImplUnavailableError, match="for NVIDIA GPUs, not for cpu"):
        svf_linear(x, V, U, scale, ids, impl="cuda")
    with pytest.raises(ImplUnavailableError, match="float64 is for checks"):
        svf_linear(x.double(), V.double(), U.double(), scale, ids, impl="triton")
    with pytest.raises(ValueError, match="unknown"):
        svf_linear(x, V, U, scale, ids, impl="magic")


def test_triton_without_a_gpu_or_its_interpreter_is_an_error_that_says_so_and_auto_is_torch():
    code = """
import torch
from t2kernels.ops import ImplUnavailableError, plan, svf_linear
x, scale, ids = torch.eye(4), torch.ones(1, 4), torch.zeros(4, dtype=torch.int32)
assert torch.equal(svf_linear(x, x, x, scale, ids), x)
assert plan(x, x, [x], ids).impl == "torch"
try:
    svf_linear(x, x, x, scale, ids, impl="triton")
except ImplUnavailableError as e:
    print(e)
"""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout
    assert "impl='triton' cannot run here" in said
    assert "GPU" in said or "not installed" in said


def test_a_torch_without_one_of_its_private_functions_runs_through_the_dispatcher():
    code = """
import torch
del torch._C._autograd._profiler_enabled
from t2kernels.ops import svf_linear
x, ids = torch.eye(4), torch.zeros(4, dtype=torch.int32)
with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    right = torch.equal(svf_linear(x, x, x, torch.ones(1, 4), ids), x)
print(right, any(e.key == "t2kernels::svf_linear" for e in profile.key_averages()))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "True"]


def test_triton_is_in_the_interpreter_here_or_on_a_gpu():
    assert "triton" in IMPLS or torch.cuda.is_available() or sys.platform != "linux"
