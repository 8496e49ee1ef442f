"""The op prepared for one group: in place and as exact as the op, in every form in which its tensors may come."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t2kernels.ops import dispatch, svf_linear_group, svf_linear_ref
from t2kernels.ops.device import Device
from t2kernels.ops.impls import cpp_kernels
from t2kernels.ops.prepared import Prepared

E, N, Cs, Ms = 4, 75, (20, 7, 133), (96, 50, 31)
WITHOUT_CPP = Device(missing=(("cpp", "not wanted"),), unchecked=(("triton", "no"), ("cuda", "no")))
NO_CPP = pytest.mark.skipif(cpp_kernels.CPP.unsupported_device(torch.device("cpu")) is not None, reason="not built")


MACHINES = pytest.mark.parametrize("machine", [pytest.param("this", marks=NO_CPP), "without C++"])


def on(machine, monkeypatch):
    if machine != "this":
        monkeypatch.setattr(dispatch, "device_of", lambda device: WITHOUT_CPP)


def problem(lead, dtype, factors=None):
    factors = factors or dtype
    V = (torch.randn(sum(Cs), N) / N**0.5).to(factors).t()
    Us = [(torch.randn(M, C) / C**0.5).to(factors) for M, C in zip(Ms, Cs, strict=True)]
    x, bases = torch.randn(*lead, N).to(dtype), [torch.randn(*lead, M).to(dtype) for M in Ms]
    return V, Us, torch.randn(E, sum(Cs)), x, bases


def exact(V, Us, scale, x, ids, bases):
    columns = torch.tensor([0, *Cs]).cumsum(0).tolist()
    return [
        svf_linear_ref(x.double(), V[:, a:b].double(), U.double(), scale[:, a:b].double(), ids, base.double())
        for a, b, U, base in zip(columns, columns[1:], Us, bases, strict=False)
    ]


@MACHINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead, ids", [((1, 1), ()), ((8, 1), (8,)), ((3, 4), (3,)), ((2, 9), (2, 9)), ((70,), ())])
def test_as_exact_as_the_op(lead, ids, dtype, machine, monkeypatch):
    on(machine, monkeypatch)
    V, Us, scale, x, bases = problem(lead, dtype)
    expert_ids = torch.randint(0, E, ids, dtype=torch.int32)
    want = exact(V, Us, scale, x, expert_ids, bases)
    op = Prepared(V, Us, scale)
    with torch.no_grad():
        eager = svf_linear_group(x, V, Us, scale, expert_ids, bases, impl="torch")
        for _ in range(2):  # the second call finds what the first looked up
            got = op.add(x, expert_ids, [b.clone() for b in bases])
            for y, w, e in zip(got, want, eager, strict=True):
                unit = torch.finfo(dtype).eps * w.norm()
                assert (y.double() - w).norm() <= 1.1 * (e.double() - w).norm() + unit / 4


@NO_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_among_others_and_a_zero_row_those_of_base(dtype):
    V, Us, scale, x, bases = problem((9, 1), dtype)
    scale[0] = 0
    bases[0][:, :, ::3] = -0.0
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    with torch.no_grad():
        got = Prepared(V, Us, scale).add(x, ids, [b.clone() for b in bases])
        for t in range(9):
            own = [b[t : t + 1].clone() for b in bases]
            alone = Prepared(V, Us, scale).add(x[t : t + 1], ids[t : t + 1], own)
            assert all(torch.equal(a, y[t : t + 1]) for a, y in zip(alone, got, strict=True))
    for y, base in zip(got, bases, strict=True):
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert torch.equal(y[ids == 0].view(bits), base[ids == 0].view(bits))
        assert not torch.equal(y, base)


@MACHINES
def test_the_memory_of_the_bases_is_used_and_nothing_around_it(machine, monkeypatch):
    on(machine, monkeypatch)
    V, Us, scale, x, bases = problem((2, 1), torch.float32)
    rooms = [torch.full((b.numel() + 64,), torch.nan) for b in bases]
    given = [room[32:-32].view(b.shape).copy_(b) for room, b in zip(rooms, bases, strict=True)]
    with torch.no_grad():
        got = Prepared(V, Us, scale).add(x, torch.tensor([1, 2]), given)
    assert all(y is b for y, b in zip(got, given, strict=True))
    for room, y in zip(rooms, got, strict=True):
        assert y.isfinite().all()
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()


@pytest.mark.parametrize("factors", [None, torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_have_the_bits_of_the_op(dtype, factors, monkeypatch):
    """In fp16 products of bf16 are made with fp16 factors, and y in fp32: its memory is no base's."""
    monkeypatch.setattr(dispatch, "device_of", lambda device: WITHOUT_CPP)
    V, Us, scale, x, bases = problem((5, 40), dtype, factors)
    scale[0], ids = 0, torch.tensor([0, 1, 2, 0, 3])
    bases[0][..., ::3] = -0.0
    with torch.no_grad():
        want = svf_linear_group(x, V, Us, scale, ids, bases, impl="torch")
        given = [b.clone() for b in bases]
        got = Prepared(V, Us, scale).add(x, ids, given)
        assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))
        assert [y is b for y, b in zip(got, given, strict=True)] == [
            (dtype, factors) != (torch.bfloat16, torch.float16)
        ] * 3
        wide = torch.cat(bases, -1).split(Ms, -1)  # rows that are not contiguous
        assert all(torch.equal(y, w) for y, w in zip(Prepared(V, Us, scale).add(x, ids, list(wide)), want, strict=True))


@MACHINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 5, 9, 70])
def test_outputs_that_lie_in_the_rows_of_one_tensor(T, dtype, machine, monkeypatch):
    on(machine, monkeypatch)
    V, Us, scale, x, bases = problem((T,), dtype)
    ids, gap = torch.randint(0, E, (T,), dtype=torch.int32), 3
    with torch.inference_mode():
        want = Prepared(V, Us, scale).add(x, ids, [b.clone() for b in bases])
        nans = torch.full((T, gap), torch.nan, dtype=dtype)
        y = torch.cat([bases[0], nans, bases[1], bases[2], nans], -1)
        starts = [0, Ms[0] + gap, Ms[0] + gap + Ms[1]]
        assert Prepared(V, Us, scale).add_within(x, ids, y, starts)
        for start, M, w in zip(starts, Ms, want, strict=True):
            assert torch.equal(y[:, start : start + M], w)
            y[:, start : start + M] = 0
        assert int(y.isnan().sum()) == 2 * T * gap
        assert int((y == 0).sum()) == T * sum(Ms)
    given = torch.cat(bases, -1).requires_grad_()
    assert not Prepared(V, Us, scale).add_within(x, ids, given, [0, Ms[0], Ms[0] + Ms[1]])


def test_tensors_that_lie_otherwise_and_ids_that_are_no_rows():
    V, Us, scale, x, bases = problem((4, 1), torch.float32)
    ids, op = torch.tensor([1, 2, 3, 0]), Prepared(V, Us, scale)
    want = exact(V, Us, scale, x, ids, bases)
    wide = torch.cat(bases, -1).split(Ms, -1)
    with torch.no_grad():
        op.add(x, ids, [b.clone() for b in bases])
        for y, w in zip(op.add(x, ids, list(wide)), want, strict=True):
            torch.testing.assert_close(y, w.float())
        spread = torch.empty(4, 1, 2 * N)[..., ::2].copy_(x)
        for y, w in zip(op.add(spread, ids, [b.clone() for b in bases]), want, strict=True):
            torch.testing.assert_close(y, w.float())
        with pytest.raises(IndexError):
            op.add(x, torch.tensor([0, 1, E, 2]), [b.clone() for b in bases])


def test_the_table_may_change_and_whoever_looks_sees_the_op():
    V, Us, scale, x, bases = problem((1, 1), torch.float32)
    ids, op, seen = torch.tensor(2), Prepared(V, Us, scale), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.inference_mode():
        before = [y.clone() for y in op.add(x, ids, [b.clone() for b in bases])]
        scale[2] *= 2
        after = op.add(x, ids, [b.clone() for b in bases])
        for y, w in zip(after, exact(V, Us, scale, x, ids, bases), strict=True):
            torch.testing.assert_close(y, w.float())
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        with Watch():
            op.add(x, ids, [b.clone() for b in bases])
    assert torch.ops.t2kernels.svf_linear_group.default in seen
