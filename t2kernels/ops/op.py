"""`svf_linear`: argument checks, gradients, and the registration under `torch.ops.t2kernels`. dispatch.py runs a call.

The schemas are made with `Library.define` and `Library.impl`: the `custom_op` decorator does the same at about three
times the cost a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError, OutOfRangeError

from .dispatch import IMPLEMENTATIONS, run, run_backward, run_saving
from .precision import FACTOR_DTYPES, X_DTYPES, forward_precision


def svf_linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    scale: Tensor,
    expert_ids: Tensor,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = base + ((x V) * scale[expert_ids]) Uᵀ + bias.

    One op for both forms of a patched layer (Transformer², arXiv 2501.06252, section 3.1: W' = U diag(sigma * z) Vᵀ).
    *Factored*: base is None, and scale rows are sigma * z. *Delta*: base = x Wᵀ, and scale rows are sigma * (z - 1) of
    a support of k components.

    x: [..., N] fp32, bf16 or fp16 (fp64 for checks), of any rank
    V: [N, C] right singular vectors in columns, best stored as a contiguous Vᵀ; x's dtype, or fp16, bf16 or int8 with
        any x (`ops.precision`)
    U: [M, C] left singular vectors in columns; V's dtype. C is the rank R, or more if a component has several columns
        (int8)
    scale: [E, C] fp32, one row an expert, times the column steps of int8 factors. Row 0 is the base model by convention
    expert_ids: int32 or int64, the row of each token. Its shape is a leading part of x.shape[:-1]: () for one row for
        all, [B], [B, S]
    base: [..., M] x's dtype, added
    bias: [M] x's dtype, added
    impl: "auto" chooses (`plan` says what and why). A name means that implementation or an error: "torch", "cpp" (CPU,
        no gradients), "triton", "cuda" (1 to 32 tokens, no gradients)

    Returns y [..., M] in x's dtype; sums are fp32. x, scale, base and bias get gradients; U and V are frozen.
    Raises ValueError for wrong shapes and dtypes, IndexError for rows that do not exist (on a CPU),
    ImplUnavailableError for an implementation that cannot run.
    """
    _check(x, V, [U], scale, expert_ids, [base], [bias], impl)
    return call(x, V, U, scale, expert_ids, base, bias, impl)


def svf_linear_group(
    x: Tensor,
    V: Tensor,
    U: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    base: list[Tensor] | None = None,
    bias: list[Tensor] | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i for matrices that share x (q, k, v; gate, up).

    V: [N, C_1 + C_2 + ...] the members' V side by side; scale: [E, C_1 + C_2 + ...] likewise
    U: [M_i, C_i] of each member
    base, bias: one a member, or None
    Other arguments and errors as in `svf_linear`. Returns y_i [..., M_i] of each member.
    """
    bases, biases = list(base or []), list(bias or [])
    for name, given in (("base", bases), ("bias", biases)):
        if given and len(given) != len(U):
            raise InputError(
                f"svf_linear_group: {name} has {len(given)} members, U has {len(U)}; give one a member or None"
            )
    _check(x, V, list(U), scale, expert_ids, bases or [None] * len(U), biases or [None] * len(U), impl)
    return call_group(x, V, list(U), scale, expert_ids, bases, biases, impl)


def call(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    scale: Tensor,
    expert_ids: Tensor,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`svf_linear` without its checks, for callers whose arguments are right by construction."""
    if _differentiated(x, scale):
        # h = x V, which the backward needs, is an output of this op: activation checkpointing drops it with the rest of
        # the block.
        op = torch.ops.t2kernels.svf_linear_saving
        return op(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[0]
    if unobserved(x, V, U, scale, expert_ids):
        return run(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[0]
    return torch.ops.t2kernels.svf_linear(x, V, U, scale, expert_ids, base, bias, impl)


def call_group(
    x: Tensor,
    V: Tensor,
    U: list[Tensor],
    scale: Tensor,
    expert_ids: Tensor,
    base: list[Tensor],
    bias: list[Tensor],
    impl: str = "auto",
) -> list[Tensor]:
    """`svf_linear_group` without its checks. base, bias: one a member, or []."""
    if _differentiated(x, scale):
        return torch.ops.t2kernels.svf_linear_saving(x, V, U, scale, expert_ids, base, bias, impl)[:-1]
    if unobserved(x, V, U[0], scale, expert_ids):
        return run(x, V, U, scale, expert_ids, base, bias, impl)
    return torch.ops.t2kernels.svf_linear_group(x, V, U, scale, expert_ids, base, bias, impl)


def _torch_private(path: str) -> Any:
    """A private function of torch._C, or None if this torch does not have it."""
    found: Any = torch._C
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_dispatch_modes = _torch_private("_len_torch_dispatch_stack")
_transform = _torch_private("_functorch.peek_interpreter_stack")
_tracing = _torch_private("_get_tracing_state")
_profiling = _torch_private("_autograd._profiler_enabled")
# Without any of them nobody can say that a call is unobserved: every call then goes through the dispatcher.
_CAN_TELL = None not in (_dispatch_modes, _transform, _tracing, _profiling)


def unobserved(x: Tensor, V: Tensor, U: Tensor, scale: Tensor, ids: Tensor) -> bool:
    """True if we can skip torch's dispatcher: plain CPU tensors, no grad, no torch.compile, tracing, transform,
    dispatch mode or profiler.

    Saves about 6 us a call on a CPU, twice the time of a product with a 128 x 128 matrix.
    """
    return (
        type(V) is type(U) is type(scale) is Tensor and unobserved_input(x, ids) and not torch.compiler.is_compiling()
    )


def unobserved_input(x: Tensor, ids: Tensor) -> bool:
    """`unobserved` for factors and a table that are known to be plain tensors, outside of an export."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and _CAN_TELL
        and type(x) is type(ids) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not _dispatch_modes()
        and _transform() is None
        and _tracing() is None
        and not _profiling()
    )


def untransformed(x: Tensor) -> bool:
    """True for a plain tensor outside of torch.compile, tracing, function transforms and dispatch modes."""
    return (
        not torch.compiler.is_compiling()
        and _CAN_TELL
        and type(x) is Tensor
        and not _dispatch_modes()
        and _transform() is None
        and _tracing() is None
    )


def _differentiated(x: Tensor, scale: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)


def _listed(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _check(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    ids: Tensor,
    bases: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    impl: str,
) -> None:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise InputError(f"impl={impl!r} is unknown, expected 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    lead = x.shape[:-1]
    if x.dtype not in X_DTYPES:
        raise _error("x.dtype", x.dtype, "float32, bfloat16, float16 or float64")
    if x.dim() < 1 or V.dim() != 2 or x.shape[-1] != V.shape[0]:
        raise _error("V's shape", list(V.shape), f"[N, C] with N the last size of x, {list(x.shape)}")
    if not Us or any(U.dim() != 2 for U in Us):
        raise _error("U", [list(U.shape) for U in Us], "[M, C], at least one")
    C = sum(U.shape[1] for U in Us)
    if C != V.shape[1]:
        raise _error("the columns of U", C, f"V's, {V.shape[1]}")
    if scale.dim() != 2 or scale.shape[1] != C:
        raise _error("scale's shape", list(scale.shape), f"[E, C={C}]")
    if scale.dtype != torch.float32 and not scale.dtype == x.dtype == torch.float64:
        raise _error("scale.dtype", scale.dtype, "float32")
    if ids.dtype not in (torch.int32, torch.int64):
        raise _error("expert_ids.dtype", ids.dtype, "int32 or int64")
    if ids.dim() > len(lead) or ids.shape != lead[: ids.dim()]:
        raise _error("expert_ids' shape", list(ids.shape), f"a leading part of x.shape[:-1] = {list(lead)}")
    frozen = [("V", V), *((f"U[{i}]", U) for i, U in enumerate(Us))]
    added = []
    for i, (U, base, bias) in enumerate(zip(Us, bases, biases, strict=True)):
        if base is not None:
            if base.shape != (*lead, U.shape[0]):
                raise _error(f"base[{i}]'s shape", list(base.shape), [*lead, U.shape[0]])
            added.append((f"base[{i}]", base))
        if bias is not None:
            if bias.shape != (U.shape[0],):
                raise _error(f"bias[{i}]'s shape", list(bias.shape), [U.shape[0]])
            added.append((f"bias[{i}]", bias))
    if V.dtype not in FACTOR_DTYPES:
        raise _error("V.dtype", V.dtype, "x's, float16, bfloat16 or int8")
    for name, t in frozen:
        if t.dtype != V.dtype:
            raise _error(f"{name}'s dtype", t.dtype, f"V's, {V.dtype}")
    for name, t in added:
        if t.dtype != x.dtype:
            raise _error(f"{name}'s dtype", t.dtype, f"x's, {x.dtype}")
    for name, t in [*frozen, *added, ("scale", scale), ("expert_ids", ids)]:
        if t.device != x.device:
            raise _error(f"{name}'s device", t.device, f"x's, {x.device}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= scale.shape[0]:
            raise OutOfRangeError(
                f"svf_linear: expert_ids holds {low if low < 0 else high}; scale has rows 0 to {scale.shape[0] - 1}"
            )


def _error(name: str, got: object, expected: object) -> InputError:
    return InputError(f"svf_linear: {name} is {got}, expected {expected}")


# --- registration ------------------------------------------------------------------------------------------

_lib = torch.library.Library("t2kernels", "DEF")
# Schemas with tensor lists have no defaults: the dispatcher drops arguments that equal their default before autograd
# sees them, and torch's autograd for lists then finds more gradients than inputs.
_GROUP = "Tensor x, Tensor V, Tensor[] U, Tensor scale, Tensor expert_ids"
_lib.define(
    "svf_linear(Tensor x, Tensor V, Tensor U, Tensor scale, Tensor expert_ids, Tensor? base=None, Tensor? bias=None,"
    " str impl='auto') -> Tensor"
)
_lib.define(f"svf_linear_group({_GROUP}, Tensor[] base, Tensor[] bias, str impl) -> Tensor[]")
_lib.define(f"svf_linear_saving({_GROUP}, Tensor[] base, Tensor[] bias, str impl) -> Tensor[]")
_lib.define(
    f"svf_linear_backward(Tensor[] dy, {_GROUP}, Tensor? h, bool need_dx, bool need_dscale, str impl)"
    " -> (Tensor, Tensor)"
)


def _forward_impl(x, V, U, scale, expert_ids, base=None, bias=None, impl="auto"):
    return run(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[0]


_KERNELS: dict[str, Callable[..., Any]] = {
    "svf_linear": _forward_impl,
    "svf_linear_group": run,
    "svf_linear_saving": run_saving,
    "svf_linear_backward": run_backward,
}
for _name, _fn in _KERNELS.items():
    _lib.impl(_name, _fn, "CompositeExplicitAutograd")


@torch.library.register_fake("t2kernels::svf_linear", lib=_lib)
def _forward_fake(x, V, U, scale, expert_ids, base=None, bias=None, impl="auto"):
    return x.new_empty(*x.shape[:-1], U.shape[0])


@torch.library.register_fake("t2kernels::svf_linear_group", lib=_lib)
def _group_fake(x, V, U, scale, expert_ids, base, bias, impl):
    return [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]


@torch.library.register_fake("t2kernels::svf_linear_saving", lib=_lib)
def _saving_fake(x, V, U, scale, expert_ids, base, bias, impl):
    ys = [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]
    return [*ys, x.new_empty(x.shape[:-1].numel(), V.shape[1], dtype=forward_precision(x.dtype, V.dtype).dtype)]


@torch.library.register_fake("t2kernels::svf_linear_backward", lib=_lib)
def _backward_fake(dy, x, V, U, scale, expert_ids, h, need_dx, need_dscale, impl):
    return x.new_empty(x.shape if need_dx else 0), scale.new_empty(scale.shape if need_dscale else 0)


def _save(ctx, inputs, output):
    x, V, U, scale, expert_ids, base, bias, impl = inputs
    single = not isinstance(U, (list, tuple))
    members = [U] if single else list(U)
    ctx.single, ctx.impl, ctx.members = single, impl, len(members)
    ctx.has_base = base is not None if single else len(base) > 0
    ctx.has_bias = bias is not None if single else len(bias) > 0
    h = output[-1] if not single and len(output) > len(members) else None
    ctx.save_for_backward(x, V, scale, expert_ids, h, *members)


def _grad(ctx, dy):
    x, V, scale, expert_ids, h, *U = ctx.saved_tensors
    dys = [dy] if ctx.single else list(dy)[: ctx.members]
    dys = [x.new_zeros(*x.shape[:-1], u.shape[0]) if d is None else d for d, u in zip(dys, U, strict=True)]
    need = ctx.needs_input_grad
    need_dx, need_dscale = need[0], need[3]
    dx = dscale = None
    if need_dx or need_dscale:
        dx, dscale = torch.ops.t2kernels.svf_linear_backward(
            dys, x, V, U, scale, expert_ids, h, need_dx, need_dscale, ctx.impl
        )
    dbase = dys if ctx.has_base else []
    dbias = (
        [d.reshape(-1, d.shape[-1]).sum(0, dtype=torch.promote_types(d.dtype, torch.float32)).to(d.dtype) for d in dys]
        if ctx.has_bias
        else []
    )
    if ctx.single:
        d_u, d_base, d_bias = None, dbase[0] if dbase else None, dbias[0] if dbias else None
    else:
        d_u, d_base, d_bias = [None] * ctx.members, dbase, dbias
    return dx if need_dx else None, None, d_u, dscale if need_dscale else None, None, d_base, d_bias, None


for _name in ("svf_linear", "svf_linear_group", "svf_linear_saving"):
    torch.library.register_autograd(f"t2kernels::{_name}", _grad, setup_context=_save, lib=_lib)
