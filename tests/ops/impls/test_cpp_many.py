"""Many tokens in bf16 by impl="cpp": g is rounded to bf16 where the CPU multiplies bf16."""

import pytest
import torch

from t2kernels.ops.impls import cpp_kernels, torch_kernels
from tests.ops.impls.test_cpp import MISSING, SHAPES, E, isa, problem, threads, truth  # noqa: F401

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("T", [33, 65, 100, 520])
@pytest.mark.parametrize("shape", [*SHAPES, (1601, (300, 33, 255), (97, 144, 17)), (577, (256, 1), (48, 16))], ids=str)
def test_as_exact_as_torch(isa, shape, T, poison):  # noqa: F811
    for extra in range(4):
        x, V, Us, scale, ids, bases, biases = problem((T,), *shape, BF16, BF16)
        bases, biases = (t if extra & bit else [None] * len(Us) for t, bit in ((bases, 1), (biases, 2)))
        arguments = x, V, Us, scale, ids, bases, biases
        got, eager, want = cpp_kernels.forward(*arguments), torch_kernels.forward(*arguments), truth(*arguments)
        want = torch.cat(want, 1)
        off, allowed = ((torch.cat(ys, 1).double() - want).norm().item() for ys in (got, eager))
        assert off <= 1.1 * allowed + torch.finfo(BF16).eps / 4 * want.norm().item()


def test_it_writes_its_own_rows_only_and_leaves_the_bits_of_base(isa):  # noqa: F811
    """In place, at columns of a wider tensor that is NaN elsewhere, as memory around V and U is."""
    N, Cs, Ms, T = 65, (21, 10), (50, 113), 530
    wide = lambda rows, columns: torch.full((rows, columns + 40), torch.nan, dtype=BF16)  # noqa: E731
    Vt = wide(sum(Cs), N)[:, :N].copy_(torch.randn(sum(Cs), N))
    Us = [wide(M, C)[:, :C].copy_(torch.randn(M, C)) for M, C in zip(Ms, Cs, strict=True)]
    x, scale, ids = torch.randn(T, N).bfloat16(), torch.randn(E, sum(Cs)), torch.randint(0, E, (T,))
    scale[0], ids[::7] = 0, 0
    room, starts = torch.full((T, 300), torch.nan, dtype=BF16), (5, 5 + Ms[0])
    columns = [slice(s, s + M) for s, M in zip(starts, Ms, strict=True)]
    for c in columns:
        room[:, c] = torch.randn(T, c.stop - c.start)
        room[:, c][:, ::3], room[:, c][:, 1::3] = -0.0, 1e-40
    before = room.clone()
    with torch.no_grad():
        assert cpp_kernels.prepare(Vt.t(), Us, scale)(x, ids, [room], starts)
    bases = [before[:, c] for c in columns]
    want = torch.cat(truth(x, Vt.t(), Us, scale, ids, bases, [None] * 2), 1)
    eager = torch.cat(torch_kernels.forward(x, Vt.t(), Us, scale, ids, bases, [None] * 2), 1)
    off, allowed = ((y.double() - want).norm() for y in (torch.cat([room[:, c] for c in columns], 1), eager))
    assert off <= 1.1 * allowed + torch.finfo(BF16).eps / 4 * want.norm()
    bits, were = room.view(torch.int16), before.view(torch.int16)
    assert torch.equal(bits[ids == 0], were[ids == 0])
    around = torch.ones(room.shape[1], dtype=torch.bool)
    around[starts[0] : starts[1] + Ms[1]] = False
    assert torch.equal(bits[:, around], were[:, around])


def test_the_bits_are_the_same_in_any_company(isa, threads):  # noqa: F811
    x, V, Us, scale, ids, bases, biases = problem((600,), 501, (60, 277), (115, 230), BF16, BF16)
    threads(1)
    want = cpp_kernels.forward(x, V, Us, scale, ids, bases, biases)
    for count in (2, 7):
        threads(count)
        assert all(map(torch.equal, cpp_kernels.forward(x, V, Us, scale, ids, bases, biases), want))
    g = cpp_kernels.shrink(x, V, scale, ids)
    halves = [
        cpp_kernels.expand(part, [U], [base], [bias], x.dtype, (600,))[0]
        for part, U, base, bias in zip(g.split([60, 277], 1), Us, bases, biases, strict=True)
    ]
    assert all(map(torch.equal, halves, want))
    for some in (slice(40, 80), slice(500, 600), slice(0, 513)):
        part = cpp_kernels.forward(x[some], V, Us, scale, ids[some], [b[some] for b in bases], biases)
        assert all(torch.equal(p, w[some]) for p, w in zip(part, want, strict=True))
    first = cpp_kernels.forward(x, V[:, :60], Us[:1], scale[:, :60], ids, bases[:1], biases[:1])
    assert torch.equal(first[0], want[0])


def test_nan_and_inf_arrive(isa):  # noqa: F811
    x, V, Us, scale, ids, bases, _ = problem((40,), 33, (7,), (50,), BF16, BF16)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    y = cpp_kernels.forward(x, V, Us, scale, ids, bases, [None])[0]
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[3:].isfinite().all()
