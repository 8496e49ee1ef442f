"""`svf_linear`: argument checks, the choice of an implementation, and the registration under `torch.ops.t2kernels`.

The schemas are made with `Library.define` and `Library.impl`: the `custom_op` decorator does the same at about three times the cost a call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .device import machine_of
from .impls import cpp_kernels, cuda_kernels, torch_kernels
from .impls import triton as triton_kernels
from .planner import IMPLS, Call, Choice, Machine, choose, could_be_dense, why_missing
from .precision import FACTOR_DTYPES, X_DTYPES, forward_precision

SKINNY = ("pair", "decode")  # paths of `plan` that stream each factor once and can take the activation of an MLP in


class ImplUnavailableError(RuntimeError):
    """The implementation asked for by name cannot run here; the message says why."""


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

    One op for both forms of a patched layer (Transformer², arXiv 2501.06252, section 3.1: W' = U diag(sigma * z) Vᵀ):
    *factored*, base None and scale rows sigma * z; *delta*, base = x Wᵀ and scale rows sigma * (z - 1) of a support of k components.

    x: [..., N] fp32, bf16 or fp16 (fp64 for checks), any rank
    V: [N, C] right singular vectors in columns, best stored as Vᵀ contiguous; x's dtype, fp16, bf16 or int8, whatever x is (`ops.precision`)
    U: [M, C] left singular vectors in columns; V's dtype. C is the rank R, and more where a component has several columns (int8)
    scale: [E, C] fp32, one row an expert, with whatever int8 columns have been divided by multiplied in; row 0 is the base model by convention
    expert_ids: int32 or int64, the row of each token; its shape is a leading part of x.shape[:-1]: () for one row for all, [B], [B, S]
    base: [..., M] x's dtype, added
    bias: [M] x's dtype, added
    impl: "auto" chooses (`plan` tells what and why); "torch", "cpp" (CPU, no gradients), "triton" or "cuda" (1 to 32 tokens, no gradients) mean
        that one or an error

    Returns [..., M] in x's dtype; sums in fp32. Gradients for x, scale, base and bias; U and V are frozen and get none.
    Raises ValueError on shapes and dtypes that do not fit, IndexError on rows that are not there (CPU), ImplUnavailableError.
    """
    _check(x, V, [U], scale, expert_ids, [base], [bias])
    _check_impl(impl, x, V, [U], scale)
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

    V: [N, C_1 + C_2 + ...] the members' V side by side; scale: [E, C_1 + C_2 + ...] likewise; U: one [M_i, C_i] a member
    base, bias: one a member, or None for no member. The rest as in `svf_linear`. Returns one [..., M_i] a member.
    """
    bases, biases = list(base or []), list(bias or [])
    for name, given in (("base", bases), ("bias", biases)):
        if given and len(given) != len(U):
            raise ValueError(
                f"svf_linear_group: {name} has {len(given)} members, U has {len(U)}; give one a member or None"
            )
    _check(x, V, list(U), scale, expert_ids, bases or [None] * len(U), biases or [None] * len(U))
    _check_impl(impl, x, V, U, scale)
    return call_group(x, V, list(U), scale, expert_ids, bases, biases, impl)


def call(x, V, U, scale, expert_ids, base=None, bias=None, impl="auto") -> Tensor:
    """`svf_linear` without its checks, for callers whose arguments are right by construction."""
    if _differentiated(x, scale):
        # What the backward needs of the forward is an output of this op: it is dropped with the rest of a checkpointed block.
        return torch.ops.t2kernels.svf_linear_saving(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[
            0
        ]
    if _plainly(x, V, U, scale, expert_ids):
        return _run(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[0]
    return torch.ops.t2kernels.svf_linear(x, V, U, scale, expert_ids, base, bias, impl)


def call_group(x, V, U, scale, expert_ids, base, bias, impl="auto") -> list[Tensor]:
    """`svf_linear_group` without its checks."""
    if _differentiated(x, scale):
        return torch.ops.t2kernels.svf_linear_saving(x, V, U, scale, expert_ids, base, bias, impl)[:-1]
    if _plainly(x, V, U[0], scale, expert_ids):
        return _run(x, V, U, scale, expert_ids, base, bias, impl)
    return torch.ops.t2kernels.svf_linear_group(x, V, U, scale, expert_ids, base, bias, impl)


def shrink(x, V, scale, expert_ids) -> Tensor:
    """g = (x V) * scale[expert_ids] [T, C]: the first half of the op alone, without gradients, for `expand`, which gives it its meaning."""
    choice = _plan_of_half(x, V.shape[1:], V.shape[1:], x.dtype, V, [])
    if choice.path == "decode":
        return cuda_kernels.shrink(x, V, scale, expert_ids)
    if choice.path == "pair":
        return triton_kernels.shrink(x, V, scale, expert_ids)
    if choice.impl == "cpp":
        return cpp_kernels.shrink(x, V, scale, expert_ids)
    if choice.impl == "triton":
        return triton_kernels.shrink_mm(x, V, scale, expert_ids)
    return torch_kernels.shrink(x, V, scale, expert_ids)[0]


def expand(g, Us, bases, biases, dtype, lead) -> list[Tensor]:
    """y_i = base_i + g_i U_iᵀ + bias_i [*lead, M_i]: the second half. dtype, lead: those of the x that g was made from."""
    choice = _plan_of_half(g, *zip(*(U.shape for U in Us), strict=True), dtype, None, Us)
    if choice.path in SKINNY:
        kernels = cuda_kernels if choice.path == "decode" else triton_kernels
        return [y.reshape(*lead, y.shape[-1]) for y in kernels.expand(g, Us, bases, biases, dtype)]
    if choice.impl == "cpp":
        return cpp_kernels.expand(g, Us, bases, biases, dtype, lead)
    return torch_kernels.expand(g, Us, bases, biases, dtype, lead)


def swiglu(x, V, Us, scale, expert_ids, bases, biases) -> Tensor:
    """silu(y_0) * y_1 for two members y_i, in one launch; for calls whose `plan` is one of `SKINNY`, without gradients."""
    path = plan(x, V, Us, expert_ids, bases[0] is not None).path
    kernels = cuda_kernels if path == "decode" else triton_kernels
    return kernels.forward_swiglu(x, V, Us, scale, expert_ids, bases, biases)


def skinny_kernels(device: torch.device) -> bool:
    """Whether `auto` may pick the skinny kernels on a device at all: where not, nothing needs to be asked call by call."""
    machine = machine_of(device)
    return machine.trusts("triton") or machine.trusts("cuda")


def _plan_of_half(
    a: Tensor, M: tuple[int, ...], C: tuple[int, ...], dtype: torch.dtype, V: Tensor | None, Us: list[Tensor]
) -> Choice:
    # The kernels of a GPU all leave g in one dtype and units, so there the halves may decide apart; elsewhere they decide alike, by T. A base
    # is what keeps W' from being considered.
    machine = machine_of(a.device)
    unfit = cuda_kernels.misfit(a, V, Us) if machine.trusts("cuda") else None
    factors = (Us[0] if V is None else V).dtype
    return choose(
        Call(a.shape[:-1].numel(), a.shape[-1], tuple(M), tuple(C), dtype, factors, base=True, unfit=unfit), machine
    )


def _plainly(x: Tensor, V: Tensor, U: Tensor, scale: Tensor, ids: Tensor) -> bool:
    """Whether nobody looks at the op itself, neither gradients nor a compiler, tracer, transform, mode, profiler or kind of tensor: then the
    dispatcher, which costs 6 us on a CPU, twice the product of a 128 x 128 matrix, has nothing to do."""
    return (
        not torch.is_grad_enabled()
        and type(x) is type(V) is type(U) is type(scale) is type(ids) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )


def _differentiated(x: Tensor, scale: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)


def _listed(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def plan(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    expert_ids: Tensor,
    base: bool = False,
    impl: str = "auto",
    grad: bool = False,
) -> Choice:
    """What a call with these tensors runs, and why. Looks at values of expert_ids on the CPU only, and only where they can matter."""
    lead, one = x.shape[:-1], expert_ids.numel() == 1
    M, C = (Us[0].shape[:1], Us[0].shape[1:]) if len(Us) == 1 else zip(*(U.shape for U in Us), strict=True)
    machine = machine_of(x.device)
    rows = x.device.type != "cpu" or cpp_kernels.why_not_these(V, Us) is None
    unfit = cuda_kernels.misfit(x, V, Us) if impl == "cuda" or (impl == "auto" and machine.trusts("cuda")) else None
    asked = lead.numel(), x.shape[-1], M, C, x.dtype, V.dtype, one, base, grad, rows, unfit
    choice, ask = _planned(asked, machine, impl)
    if not ask or expert_ids.device.type != "cpu":
        return choice
    rows, counts = expert_ids.unique(return_counts=True)
    repeat = torch_kernels.tokens_per_id(expert_ids, lead)
    tokens = tuple((int(r), int(c) * repeat) for r, c in zip(rows, counts, strict=True))
    return choose(_call(asked)._replace(tokens=tokens), machine, impl)


@functools.lru_cache(4096)  # decoding asks the same again for every token: 2 us instead of 8
def _planned(asked: tuple, machine: Machine, impl: str) -> tuple[Choice, bool]:
    """What sizes alone decide, and whether it matters which expert has how many of the tokens."""
    call = _call(asked)
    return choose(call, machine, impl), not call.one and could_be_dense(call)


def _call(asked: tuple) -> Call:
    T, N, M, C, x, factors, one, base, grad, rows, unfit = asked
    return Call(T, N, tuple(M), tuple(C), x, factors, one, base=base, grad=grad, rows=rows, unfit=unfit)


def _check_impl(impl: str, x: Tensor, V: Tensor, Us: list[Tensor], scale: Tensor) -> None:
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl={impl!r} is unknown; wanted 'auto' or one of {', '.join(map(repr, IMPLS))}")
    if impl == "auto":
        return
    why = why_missing(machine_of(x.device), impl, x.dtype)
    if why is None and impl == "cpp":
        why = (
            "it has no backward: call it under torch.no_grad()"
            if _differentiated(x, scale)
            else cpp_kernels.why_not_these(V, Us)
        )
    if why:
        raise ImplUnavailableError(
            f"impl={impl!r} cannot run here: {why}; use impl='torch', or 'auto' to have one chosen"
        )


def _check(
    x: Tensor,
    V: Tensor,
    Us: list[Tensor],
    scale: Tensor,
    ids: Tensor,
    bases: list[Tensor | None],
    biases: list[Tensor | None],
) -> None:
    lead = x.shape[:-1]
    if x.dtype not in X_DTYPES:
        raise _misfit("x.dtype", x.dtype, "float32, bfloat16, float16 or float64")
    if x.dim() < 1 or V.dim() != 2 or x.shape[-1] != V.shape[0]:
        raise _misfit("V's shape", list(V.shape), f"[N, C] with N the last size of x, {list(x.shape)}")
    if not Us or any(U.dim() != 2 for U in Us):
        raise _misfit("U", [list(U.shape) for U in Us], "[M, C], at least one")
    C = sum(U.shape[1] for U in Us)
    if C != V.shape[1]:
        raise _misfit("the columns of U", C, f"V's, {V.shape[1]}")
    if scale.dim() != 2 or scale.shape[1] != C:
        raise _misfit("scale's shape", list(scale.shape), f"[E, C={C}]")
    if scale.dtype != torch.float32 and not scale.dtype == x.dtype == torch.float64:
        raise _misfit("scale.dtype", scale.dtype, "float32")
    if ids.dtype not in (torch.int32, torch.int64):
        raise _misfit("expert_ids.dtype", ids.dtype, "int32 or int64")
    if ids.dim() > len(lead) or ids.shape != lead[: ids.dim()]:
        raise _misfit("expert_ids' shape", list(ids.shape), f"a leading part of x.shape[:-1] = {list(lead)}")
    frozen = [("V", V), *((f"U[{i}]", U) for i, U in enumerate(Us))]
    added = []
    for i, (U, base, bias) in enumerate(zip(Us, bases, biases, strict=True)):
        if base is not None:
            if base.shape != (*lead, U.shape[0]):
                raise _misfit(f"base[{i}]'s shape", list(base.shape), [*lead, U.shape[0]])
            added.append((f"base[{i}]", base))
        if bias is not None:
            if bias.shape != (U.shape[0],):
                raise _misfit(f"bias[{i}]'s shape", list(bias.shape), [U.shape[0]])
            added.append((f"bias[{i}]", bias))
    if V.dtype not in FACTOR_DTYPES:
        raise _misfit("V.dtype", V.dtype, "x's, float16, bfloat16 or int8")
    for name, t in frozen:
        if t.dtype != V.dtype:
            raise _misfit(f"{name}'s dtype", t.dtype, f"V's, {V.dtype}")
    for name, t in added:
        if t.dtype != x.dtype:
            raise _misfit(f"{name}'s dtype", t.dtype, f"x's, {x.dtype}")
    for name, t in [*frozen, *added, ("scale", scale), ("expert_ids", ids)]:
        if t.device != x.device:
            raise _misfit(f"{name}'s device", t.device, f"x's, {x.device}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= scale.shape[0]:
            raise IndexError(
                f"svf_linear: expert_ids holds {low if low < 0 else high}; scale has rows 0 to {scale.shape[0] - 1}"
            )


def _misfit(name: str, got: object, wanted: object) -> ValueError:
    return ValueError(f"svf_linear: {name} is {got}, wanted {wanted}")


# --- registration ----------------------------------------------------------------------------------------------------------------

_lib = torch.library.Library("t2kernels", "DEF")
# No default in the schemas with tensor lists: the dispatcher drops arguments that equal their default before autograd sees them, and torch's
# autograd for lists then finds more gradients than inputs.
_lib.define(
    "svf_linear(Tensor x, Tensor V, Tensor U, Tensor scale, Tensor expert_ids, Tensor? base=None, Tensor? bias=None, str impl='auto') -> Tensor"
)
_lib.define(
    "svf_linear_group(Tensor x, Tensor V, Tensor[] U, Tensor scale, Tensor expert_ids, Tensor[] base, Tensor[] bias, str impl) -> Tensor[]"
)
_lib.define(
    "svf_linear_saving(Tensor x, Tensor V, Tensor[] U, Tensor scale, Tensor expert_ids, Tensor[] base, Tensor[] bias, str impl) -> Tensor[]"
)
_lib.define(
    "svf_linear_backward(Tensor[] dy, Tensor x, Tensor V, Tensor[] U, Tensor scale, Tensor expert_ids, Tensor? h, bool need_dx, bool need_dscale,"
    " str impl) -> (Tensor, Tensor)"
)


def _run(x, V, U, scale, expert_ids, base, bias, impl, saving=False) -> list[Tensor]:
    """y of each member, and behind them h where it is to be saved."""
    base, bias = (list(t) or [None] * len(U) for t in (base, bias))
    choice = plan(x, V, U, expert_ids, base[0] is not None, impl, saving)
    arguments = (x, V, U, scale, expert_ids, base, bias)
    if choice.path == "refused":
        raise ImplUnavailableError(
            f"impl={impl!r} cannot run this call: {choice.why_path}; use impl='auto' to have another one chosen"
        )
    if choice.path == "decode":
        return cuda_kernels.forward(*arguments)
    if choice.path == "dense":
        return torch_kernels.materialised(*arguments, choice.experts)
    if choice.path == "pair":
        return triton_kernels.forward_pair(*arguments)
    if choice.impl == "cpp":
        why = "it has no backward" if saving else cpp_kernels.why_not_these(V, U) if impl == "cpp" else None
        if why:
            raise ImplUnavailableError(f"impl='cpp' cannot run here: {why}")
        return cpp_kernels.forward(*arguments)
    forward = triton_kernels.forward_mm if choice.impl == "triton" else torch_kernels.forward
    ys, h = forward(*arguments, saving)
    return [*ys, h] if saving else ys


def _forward_impl(x, V, U, scale, expert_ids, base=None, bias=None, impl="auto"):
    return _run(x, V, [U], scale, expert_ids, _listed(base), _listed(bias), impl)[0]


def _group_impl(x, V, U, scale, expert_ids, base, bias, impl):
    return _run(x, V, U, scale, expert_ids, base, bias, impl)


def _saving_impl(x, V, U, scale, expert_ids, base, bias, impl):
    return _run(x, V, U, scale, expert_ids, base, bias, impl, saving=True)


def _backward_impl(dy, x, V, U, scale, expert_ids, h, need_dx, need_dscale, impl):
    kernels = triton_kernels if plan(x, V, U, expert_ids, impl=impl, grad=True).impl == "triton" else torch_kernels
    return kernels.backward(dy, x, V, U, scale, expert_ids, need_dx, need_dscale, h)


_IMPLEMENTATIONS = {
    "svf_linear": _forward_impl,
    "svf_linear_group": _group_impl,
    "svf_linear_saving": _saving_impl,
    "svf_linear_backward": _backward_impl,
}
for _name, _fn in _IMPLEMENTATIONS.items():
    _lib.impl(_name, _fn, "CompositeExplicitAutograd")


@torch.library.register_fake("t2kernels::svf_linear", lib=_lib)
def _(x, V, U, scale, expert_ids, base=None, bias=None, impl="auto"):
    return x.new_empty(*x.shape[:-1], U.shape[0])


@torch.library.register_fake("t2kernels::svf_linear_group", lib=_lib)
def _(x, V, U, scale, expert_ids, base, bias, impl):
    return [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]


@torch.library.register_fake("t2kernels::svf_linear_saving", lib=_lib)
def _(x, V, U, scale, expert_ids, base, bias, impl):
    ys = [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]
    return [*ys, x.new_empty(x.shape[:-1].numel(), V.shape[1], dtype=forward_precision(x.dtype, V.dtype).dtype)]


@torch.library.register_fake("t2kernels::svf_linear_backward", lib=_lib)
def _(dy, x, V, U, scale, expert_ids, h, need_dx, need_dscale, impl):
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
