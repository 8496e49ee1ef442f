"""svf_linear against the reference in fp64: forward, every gradient, odd sizes, empty batches, all expert mixes."""

import pytest
import torch
import torch._dynamo.testing

from t2kernels.ops import ImplUnavailableError, choose_impl, svf_linear, svf_linear_group, svf_linear_ref

E = 5
SHAPES = [((1,), 7, 3, 5), ((17,), 33, 20, 9), ((4, 6), 16, 16, 24), ((2, 3, 5, 4), 12, 7, 10), ((0,), 8, 4, 6), ((3, 0), 8, 4, 6)]
MIXES = ["one", "distinct", "uniform", "zipf", "skewed"]


def problem(lead, N, R, M, dtype=torch.float32):
    # Factors have orthonormal columns in use, so entries of size 1/sqrt(n): the errors below are those of a real layer.
    x, base = torch.randn(*lead, N, dtype=dtype), torch.randn(*lead, M, dtype=dtype)
    V, U = (torch.randn(N, R) / N**0.5).to(dtype), (torch.randn(M, R) / M**0.5).to(dtype)
    scale = torch.randn(E, R, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, V, U, scale, base, torch.randn(M, dtype=dtype)


def draw_ids(mix, shape, dtype=torch.int32):
    n = max(1, torch.Size(shape).numel())
    weights = {"one": [0, 0, 1, 0, 0], "uniform": [1] * 5, "zipf": [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], "skewed": [96, 1, 1, 1, 1]}
    ids = (
        torch.arange(n) % E if mix == "distinct" else torch.multinomial(torch.tensor(weights[mix], dtype=torch.float), n, replacement=True)
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
    """What plain torch in this dtype does to the same numbers, and the rounding of the result itself: the yardstick of every tolerance."""
    lead = x.shape[:-1]
    rows = scale[ids.long()].reshape(*ids.shape, *(1,) * (len(lead) - ids.dim()), scale.shape[1]).to(x.dtype)
    y = ((x @ V) * rows) @ U.t()
    y = y + base if base is not None else y
    y = y + bias if bias is not None else y
    return (y.double() - truth).norm() + torch.finfo(x.dtype).eps / 4 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead, N, R, M", SHAPES)
def test_forward_is_as_exact_as_eager(dtype, lead, N, R, M):
    x, V, U, scale, base, bias = problem(lead, N, R, M, dtype)
    for mix in MIXES:
        for prefix in {(), lead[:1], lead}:
            ids = draw_ids(mix, prefix)
            for b, c in ((None, None), (base, None), (None, bias), (base, bias)):
                truth = exact(x, V, U, scale, ids, b, c)
                allowed = 2 * eager_error(x, V, U, scale, ids, b, c, truth)
                for got in (svf_linear(x, V, U, scale, ids, b, c), svf_linear_ref(x, V, U, scale, ids, b, c)):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_low_precision_are_as_exact_as_eager(dtype):
    x, V, U, scale, base, _ = problem((64,), 48, 40, 56, dtype)
    ids, dy = draw_ids("uniform", (64,)), torch.randn(64, 56).to(dtype)

    def grads(f, wide):
        leaves = [t.to(torch.float64 if wide else t.dtype).clone().requires_grad_() for t in (x, scale)]
        factors = [t.to(torch.float64 if wide else t.dtype) for t in (V, U)]
        f(leaves[0], *factors, leaves[1], ids, base.to(leaves[0].dtype)).backward(dy.to(leaves[0].dtype))
        return [t.grad.double() for t in leaves]

    def eager(x, V, U, scale, ids, base):
        return base + ((x @ V) * scale.to(x.dtype)[ids.long()]) @ U.t()

    for got, plain, want in zip(grads(svf_linear, False), grads(eager, False), grads(svf_linear_ref, True), strict=True):
        assert (got - want).norm() <= 2 * (plain - want).norm()


def test_frozen_factors_get_no_gradient():
    x, V, U, scale, _, _ = problem((6,), 8, 4, 6)
    V.requires_grad_(), U.requires_grad_(), x.requires_grad_()
    svf_linear(x, V, U, scale, draw_ids("uniform", (6,))).sum().backward()
    assert V.grad is None
    assert U.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_is_its_members(dtype):
    Ms, Rs, N = (9, 5, 12), (4, 3, 7), 10
    x = torch.randn(3, 6, N, dtype=dtype)
    Vs, Us = [torch.randn(N, r, dtype=dtype) for r in Rs], [torch.randn(m, r, dtype=dtype) for m, r in zip(Ms, Rs, strict=True)]
    scales = [torch.randn(E, r, dtype=dtype) for r in Rs]
    bases, biases = [torch.randn(3, 6, m, dtype=dtype) for m in Ms], [torch.randn(m, dtype=dtype) for m in Ms]
    ids = draw_ids("uniform", (3,), torch.int64)
    dys = [torch.randn(3, 6, m, dtype=dtype) for m in Ms]
    a = [t.clone().requires_grad_() for t in (x, torch.cat(scales, 1), *bases, *biases)]
    together = svf_linear_group(a[0], torch.cat(Vs, 1), Us, a[1], ids, a[2:5], a[5:8])
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
    torch.library.opcheck(op.svf_linear_backward.default, ([base], x.detach(), V, [U], scale.detach(), ids, True, True, "torch"))


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
        ((x, V, U[:, :2], scale, ids), "the rank of U"),
        ((x, V, U, scale[:, :2], ids), "scale's shape"),
        ((x, V, U, scale.half(), ids), "scale.dtype"),
        ((x, V, U, scale, ids.float()), "expert_ids.dtype"),
        ((x, V, U, scale, ids[:3]), "expert_ids' shape"),
        ((x, V, U, scale, ids[:, None]), "expert_ids' shape"),
        ((x, V.half(), U, scale, ids), "V's dtype"),
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
    name, why = choose_impl(x)
    assert name == "torch"
    assert "cpu" in why
    assert torch.equal(svf_linear(x, V, U, scale, ids, impl="torch"), svf_linear(x, V, U, scale, ids, impl="auto"))
    for missing in ("triton", "cuda"):
        with pytest.raises(ImplUnavailableError, match=missing):
            svf_linear(x, V, U, scale, ids, impl=missing)
    with pytest.raises(ValueError, match="unknown"):
        svf_linear(x, V, U, scale, ids, impl="magic")
