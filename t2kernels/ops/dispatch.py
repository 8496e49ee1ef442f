"""Choose the implementation and path of a call, and run it. Only this file knows all implementations."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from t2kernels import T2Error

from .device import Device
from .impls.cpp_kernels import CPP
from .impls.cuda_kernels import CUDA
from .impls.implementation import Added, Expansion, Implementation, InPlace, Operands
from .impls.torch_kernels import TORCH, tokens_per_id
from .impls.triton import TRITON
from .planner import Call, Choice, could_be_dense

# "auto" takes the last one that supports a call, is trusted on the device, and is not slower than others there. torch
# supports every call.
IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in (TORCH, CPP, TRITON, CUDA)}


class ImplUnavailableError(T2Error, RuntimeError):
    """An implementation that was asked for by name cannot run this call here. The message says why."""


@torch.compiler.assume_constant_result  # a compiler need not trace how a device is probed
def device_of(device: torch.device) -> Device:
    """What is known of a device."""
    return probe(device)


@functools.cache  # a torch.device as the key costs 0.1 us; to ask for its type makes a new string, 0.8 us
def probe(device: torch.device) -> Device:
    """Ask every implementation about a device."""
    kind = device.type
    found = Device(kind, torch.cuda.get_device_name(device) if kind == "cuda" else kind)
    for implementation in IMPLEMENTATIONS.values():
        found = implementation.probe(device, found)
    return found


def unsupported(call: Call, device: Device, impl: str) -> str | None:
    """Why an implementation cannot run a call on a device, or None."""
    return device.unsupported(impl) or IMPLEMENTATIONS[impl].unsupported(call) or dict(call.layout).get(impl)


@functools.lru_cache(4096)
def choose(call: Call, device: Device, impl: str = "auto") -> Choice:
    """The implementation and path of a call.

    impl: "auto", or one by name. A named one that cannot run gets the path "refused", with the reason.
    """
    if impl == "auto":
        impl, why = _fastest(call, device)
    else:
        why = "asked for"
        if reason := unsupported(call, device, impl):
            return Choice(impl, why, "refused", reason)
    return Choice(impl, why, *IMPLEMENTATIONS[impl].path(call, device))


def _fastest(call: Call, device: Device) -> tuple[str, str]:
    unchecked, reasons = dict(device.unchecked), []
    for impl, implementation in reversed(IMPLEMENTATIONS.items()):
        if impl == "torch":
            break
        reason = unchecked.get(impl) or unsupported(call, device, impl) or implementation.slower(call, device)
        if reason is None:
            return impl, f"{implementation.merit} {device.name}"
        reasons.append(f"no {impl}: {reason}")
    return "torch", f"{device.name}; {'; '.join(reversed(reasons))}"


def plan(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    expert_ids: Tensor,
    base: bool = False,
    impl: str = "auto",
    grad: bool = False,
) -> Choice:
    """What a call with these tensors runs, and why.

    x, V, expert_ids: as in `svf_linear`; Us: U of each member
    base: whether a base is added; impl: "auto" or a name; grad: whether a backward will follow
    Reads the values of expert_ids on the CPU only, and only if they can matter.
    """
    lead, one = x.shape[:-1], expert_ids.numel() == 1
    M, C = (Us[0].shape[:1], Us[0].shape[1:]) if len(Us) == 1 else zip(*(U.shape for U in Us), strict=True)
    device, layout = device_of(x.device), ()
    for implementation in _strict(device, impl):
        if reason := implementation.unsupported_layout(x, V, Us):
            layout += ((implementation.name, reason),)
    sizes = lead.numel(), x.shape[-1], M, C, x.dtype, V.dtype, one, base, grad, layout
    choice, count = planned(sizes, device, impl)
    if not count or expert_ids.device.type != "cpu":
        return choice
    rows, counts = expert_ids.unique(return_counts=True)
    repeat = tokens_per_id(expert_ids, lead)
    tokens = tuple((int(r), int(c) * repeat) for r, c in zip(rows, counts, strict=True))
    return choose(_call(sizes)._replace(tokens=tokens), device, impl)


@functools.lru_cache(4096)  # decoding asks the same again for every token: 2 us instead of 8
def planned(sizes: tuple, device: Device, impl: str) -> tuple[Choice, bool]:
    """The choice by sizes alone, and whether the number of tokens of each expert matters."""
    call = _call(sizes)
    return choose(call, device, impl), not call.one and could_be_dense(call)


def _call(sizes: tuple) -> Call:
    T, N, M, C, x, factors, one, base, grad, layout = sizes
    return Call(T, N, tuple(M), tuple(C), x, factors, one, None, base, grad, layout)


@functools.cache
def _strict(device: Device, impl: str) -> tuple[Implementation, ...]:
    """The implementations that may run and must be asked how tensors lie in memory."""
    names = [name for name in IMPLEMENTATIONS if device.trusts(name)] if impl == "auto" else [impl]
    return tuple(IMPLEMENTATIONS[name] for name in names if IMPLEMENTATIONS[name].strict)


# --- run ---------------------------------------------------------------------------------------------------


def run(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Sequence[Tensor],
    biases: Sequence[Tensor],
    impl: str = "auto",
) -> list[Tensor]:
    """y of each member, without gradients. bases, biases: one a member, or []. Raises ImplUnavailableError."""
    added, bias = bases or [None] * len(Us), biases or [None] * len(Us)
    choice = plan(x, V, Us, expert_ids, added[0] is not None, impl)
    return _implementation(choice).forward(choice, Operands(x, V, Us, scale, expert_ids, added, bias))


def prepare(x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor) -> InPlace | None:
    """What adds the change of a group to bases in place, for calls of these sizes; None: `run` is all there is."""
    choice = plan(x, V, Us, expert_ids, base=True)
    return None if choice.path == "dense" else _implementation(choice).prepare(V, Us, scale)


def adds_in_place(impl: str, device: Device) -> bool:
    """True if an implementation has what `prepare` returns, which is asked for on a CPU."""
    return device.kind == "cpu" and impl in ("torch", "cpp")


def run_saving(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    bases: Sequence[Tensor],
    biases: Sequence[Tensor],
    impl: str,
) -> list[Tensor]:
    """y of each member, and behind them h = x V for `run_backward`."""
    added, bias = bases or [None] * len(Us), biases or [None] * len(Us)
    choice = plan(x, V, Us, expert_ids, added[0] is not None, impl, grad=True)
    ys, h = _implementation(choice).forward_saving(Operands(x, V, Us, scale, expert_ids, added, bias))
    return [*ys, h]


def run_backward(
    dys: list[Tensor],
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    h: Tensor | None,
    need_dx: bool,
    need_dscale: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """dx and dscale; see `Implementation.backward`."""
    choice = plan(x, V, Us, expert_ids, impl=impl, grad=True)
    return _implementation(choice).backward(dys, Operands(x, V, Us, scale, expert_ids, [], []), need_dx, need_dscale, h)


def _implementation(choice: Choice) -> Implementation:
    if choice.path == "refused":
        raise ImplUnavailableError(
            f"impl={choice.impl!r} cannot run here: {choice.why_path}; use impl='torch', or 'auto' to have one chosen"
        )
    return IMPLEMENTATIONS[choice.impl]


# --- one half of the op, and the fused activation, without gradients --------------------------------------------


def shrink(x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
    """g = (x V) * scale[expert_ids] [T, C]: the first half of the op. Its dtype and units are known to `expand` only.

    x, V, scale, expert_ids: as in `svf_linear`
    """
    choice = _plan_half(x, V.shape[1:], V.shape[1:], x.dtype, V, [])
    return IMPLEMENTATIONS[choice.impl].shrink(choice, x, V, scale, expert_ids)


def expand(
    g: Tensor, Us: list[Tensor], bases: Added, biases: Added, dtype: torch.dtype, lead: torch.Size
) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i [*lead, M_i]: the second half of the op.

    g: [T, C] from `shrink`, or columns of it
    Us: [M_i, C_i] of each member; bases, biases: [*lead, M_i] and [M_i], or None, for each member
    dtype, lead: dtype and leading sizes of the x that g was made from
    """
    M, C = zip(*(U.shape for U in Us), strict=True)
    choice = _plan_half(g, M, C, dtype, None, Us)
    return IMPLEMENTATIONS[choice.impl].expand(choice, Expansion(g, Us, bases, biases, dtype, lead))


def _plan_half(
    a: Tensor, M: tuple[int, ...], C: tuple[int, ...], dtype: torch.dtype, V: Tensor | None, Us: list[Tensor]
) -> Choice:
    # shrink and expand are planned separately. All kernels of a GPU use the same format for g. On a CPU both halves get
    # the same T and dtypes, and pick the same kernel; there the layout is not asked. base=True disables the "dense"
    # path.
    device, layout = device_of(a.device), ()
    for implementation in _strict(device, "auto"):
        if implementation.shares_g and (reason := implementation.unsupported_layout(a, V, Us)):
            layout += ((implementation.name, reason),)
    factors = (Us[0] if V is None else V).dtype
    sizes = a.shape[:-1].numel(), a.shape[-1], M, C, dtype, factors, False, True, False, layout
    return planned(sizes, device, "auto")[0]


def may_fuse_swiglu(device: torch.device) -> bool:
    """True if `auto` may pick an implementation with a fused activation on a device: asked before `fuses_swiglu`."""
    return _may_fuse(device_of(device))


@functools.cache
def _may_fuse(device: Device) -> bool:
    return any(i.fused_paths and device.trusts(i.name) for i in IMPLEMENTATIONS.values())


def fuses_swiglu(x: Tensor, V: Tensor, Us: list[Tensor], expert_ids: Tensor, base: bool) -> bool:
    """True if `swiglu` exists for a call: the path that `plan` gives it has a fused activation."""
    choice = plan(x, V, Us, expert_ids, base)
    return choice.path in IMPLEMENTATIONS[choice.impl].fused_paths


def swiglu(
    x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor, expert_ids: Tensor, bases: Added, biases: Added
) -> Tensor:
    """silu(y_0) * y_1 [..., M] of two members y_i, for calls that `fuses_swiglu`. Arguments as in `Implementation`."""
    choice = plan(x, V, Us, expert_ids, bases[0] is not None)
    return IMPLEMENTATIONS[choice.impl].swiglu(Operands(x, V, Us, scale, expert_ids, bases, biases))
