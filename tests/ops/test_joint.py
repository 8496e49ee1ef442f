"""`ops.joint` against the reference in fp64: forward, gradients, mixes of experts, what is kept and what is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from t2kernels.ops import svf_linear_group, svf_linear_ref
from t2kernels.ops.joint import can_join, join, through

E = 5
SHAPES = [
    ((1,), 7, (3,), (5,)),
    ((4, 6), 16, (4, 3), (24, 8)),
    ((2, 300), 40, (9, 5, 5), (24, 12, 12)),
    ((3, 0), 8, (4,), (6,)),
]
IDS = {
    "one for all": lambda lead: torch.tensor(2),
    "one a sequence": lambda lead: torch.randint(E, lead[:1], dtype=torch.int32),
    "one a token": lambda lead: torch.randint(E, lead),
}


def problem(lead, N, Cs, Ms, dtype, bias=True):
    x = torch.randn(*lead, N)
    V = (torch.randn(sum(Cs), N) / N**0.5).t()
    Us = [torch.randn(M, C) / M**0.5 for M, C in zip(Ms, Cs, strict=True)]
    Ws = [torch.randn(M, N) / N**0.5 for M in Ms]
    bs = [torch.randn(M) if bias and i != 1 else None for i, M in enumerate(Ms)]
    dys = [torch.randn(*lead, M) for M in Ms]
    scale = torch.randn(E, sum(Cs), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    Us, Ws, dys = ([t.to(dtype) for t in ts] for ts in (Us, Ws, dys))
    return x.to(dtype), V.to(dtype), Us, scale, Ws, [b if b is None else b.to(dtype) for b in bs], dys


def exact(x, V, Us, scale, ids, Ws, bs, dys):
    """Outputs, dx and dscale in fp64, each member by the reference."""
    x, scale = x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    ys, start = [], 0
    for U, W, b in zip(Us, Ws, bs, strict=True):
        c = slice(start, start + U.shape[1])
        base = torch.nn.functional.linear(x, W.double(), None if b is None else b.double())
        ys.append(svf_linear_ref(x, V[:, c].double(), U.double(), scale[:, c], ids, base))
        start = c.stop
    loss = sum((y * dy.double()).sum() for y, dy in zip(ys, dys, strict=True))
    return [y.detach() for y in ys], torch.autograd.grad(loss, (x, scale))


def apart(x, V, Us, scale, ids, Ws, bs):
    """The same as ops of their own: what the long way computes."""
    bases = [torch.nn.functional.linear(x, W, b) for W, b in zip(Ws, bs, strict=True)]
    return svf_linear_group(x, V, Us, scale, ids, bases, impl="torch")


class Shapes(TorchDispatchMode):
    """The shapes of what every op returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.update(tuple(t.shape) for t in (out if isinstance(out, (list, tuple)) else [out]))
        return out


def error(got, want):
    return (got.double() - want).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mix", IDS)
@pytest.mark.parametrize("lead, N, Cs, Ms", SHAPES)
def test_as_exact_as_separate_ops(lead, N, Cs, Ms, mix, dtype):
    x, V, Us, scale, Ws, bs, dys = problem(lead, N, Cs, Ms, dtype)
    ids = IDS[mix](lead)
    want, wanted = exact(x, V, Us, scale, ids, Ws, bs, dys)
    x.requires_grad_()
    scale.requires_grad_()
    assert can_join(x, V, Ws, bs)
    found = []
    for f in (join, apart):
        ys = f(x, V, Us, scale, ids, Ws, bs)
        assert [y.shape for y in ys] == [y.shape for y in want]
        found.append((ys, torch.autograd.grad(ys, (x, scale), dys)))
    (ys, grads), (plain_ys, plain) = found
    assert [g.dtype for g in grads] == [x.dtype, scale.dtype]
    for mine, theirs, true in zip((*ys, *grads), (*plain_ys, *plain), (*want, *wanted), strict=True):
        room = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 2**-9
        assert error(mine, true) <= 1.5 * error(theirs, true) + room * true.norm()


def test_gradcheck():
    x, V, Us, scale, Ws, bs, _ = problem((2, 3), 7, (3, 2), (5, 4), torch.float64)
    x.requires_grad_()
    scale.requires_grad_()
    for ids in (torch.tensor(1), torch.tensor([4, 0]), torch.tensor([[0, 1, 1], [4, 2, 0]])):
        assert torch.autograd.gradcheck(lambda x, s, ids=ids: tuple(join(x, V, Us, s, ids, Ws, bs)), (x, scale))


@pytest.mark.parametrize("want_x, want_scale", [(True, False), (False, True)])
def test_only_what_is_wanted(want_x, want_scale):
    x, V, Us, scale, Ws, bs, dys = problem((3, 50), 16, (4, 3), (24, 8), torch.float32)
    ids = torch.tensor([1, 0, 1])
    _, (dx, dscale) = exact(x, V, Us, scale, ids, Ws, bs, [dys[0], torch.zeros_like(dys[1])])
    x.requires_grad_(want_x)
    scale.requires_grad_(want_scale)
    ys = join(x, V, Us, scale, ids, Ws, bs)
    with Shapes() as seen:
        (ys[0] * dys[0]).sum().backward()  # the second output is used by nobody
    assert ((150, 16) in seen.shapes) == want_x  # dx is made where it is wanted
    if want_x:
        torch.testing.assert_close(x.grad.double(), dx, rtol=1e-4, atol=1e-5)
        assert scale.grad is None
    else:
        torch.testing.assert_close(scale.grad.double(), dscale, rtol=1e-4, atol=1e-4)
        assert x.grad is None


def test_a_zero_row_is_the_dense_layer_bit_for_bit():
    x, V, Us, scale, Ws, bs, _ = problem((2, 80), 16, (4, 3), (24, 8), torch.float32)
    scale[0] = 0
    x.requires_grad_()
    for y, W, b in zip(join(x, V, Us, scale, torch.tensor(0), Ws, bs), Ws, bs, strict=True):
        assert torch.equal(y, torch.nn.functional.linear(x, W, b))


def test_x_is_not_kept():
    x, V, Us, scale, Ws, bs, _ = problem((4, 64), 32, (4, 3), (24, 8), torch.float32)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    given = (V, *Us, *Ws)
    x = x.requires_grad_() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        join(x, V, Us, scale.requires_grad_(), torch.tensor([0, 1, 2, 3]), Ws, bs)
    assert x.untyped_storage().data_ptr() not in kept
    for t in given:
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < 256 * 8 * 4 + 1000  # h [256, 7] in fp32, four rows and ids


def test_a_table_written_after_the_forward_does_not_change_the_gradient():
    x, V, Us, scale, Ws, bs, dys = problem((2, 5), 16, (4, 3), (24, 8), torch.float64)
    ids = torch.tensor([1, 3])
    _, (dx, _) = exact(x, V, Us, scale, ids, Ws, bs, dys)
    x.requires_grad_()
    ys = join(x, V, Us, scale, ids, Ws, bs)
    scale.zero_()
    torch.testing.assert_close(torch.autograd.grad(ys, x, dys)[0], dx)


def test_what_is_refused():
    x, V, _, _, Ws, bs, _ = problem((2, 5), 16, (4, 3), (24, 8), torch.float32)
    assert can_join(x, V, Ws, bs)
    assert not can_join(x, V.bfloat16(), Ws, bs)
    assert not can_join(x.bfloat16(), V, Ws, bs)
    assert not can_join(x, V, [Ws[0], Ws[1].clone().requires_grad_()], bs)
    assert not can_join(x, V, Ws, [bs[0].clone().requires_grad_(), None])
    assert not can_join(x, V, [Ws[0].to("meta"), Ws[1]], bs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_join(x, V, Ws, bs)
    with FlopCounterMode(display=False):
        assert not can_join(x, V, Ws, bs)
    seen = []
    torch.func.vmap(lambda row: seen.append(can_join(row, V, Ws, bs)) or row)(x)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("T", [1, 127, 128, 511, 512, 700])
def test_the_thin_product(T, dtype):
    a, B = torch.randn(T, 45).to(dtype), torch.randn(45, 11).to(dtype)
    for b in (B, B.t().contiguous().t()):
        got, want = through(a, b), a.double() @ b.double()
        assert got.dtype == dtype
        assert error(got, want) <= 2 * error(a @ b, want) + 1e-12 * want.norm()
