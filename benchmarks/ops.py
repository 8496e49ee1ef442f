"""The cost of svf_linear, forward and backward, beside every other way to compute it and the ceilings of the machine.

    python benchmarks/ops.py                            this machine: some minutes on a CPU
    python benchmarks/ops.py --models llama-3-70b --tokens 1 8 --forms delta --ranks 64 256 1024

Calls take their weights from copies in turn, which together are larger than four times the cache; on a GPU they are in
one CUDA graph. Every arm is compared with fp64 first. Ours may have 1.1 times the error of plain torch in the same
dtypes; a wrong result gets no time. "layer" is a whole layer without attention, with its norms and activation between
the groups. Rows are appended to benchmarks/results/ops.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cases
import torch
import torch.nn.functional as F
import vllm_lora
from cases import Arm, Weights
from graphs import ceilings, last_level_cache, per_call
from measure import RESULTS, WrongResult, able, append, machine, require, show
from rich.table import Table

from t2kernels.ops import ImplUnavailableError, plan
from t2kernels.ops.dispatch import IMPLEMENTATIONS, device_of
from t2kernels.ops.planner import Call, bytes_moved, operations

ROOM = 1.1  # over the error of plain torch
PEER_ROOM = 4.0  # peers round at other places: W' itself, once more
KEPT_BYTES = 2 * 10**9
PEFT = "PEFT LoRA r=16"
KEEPING = ("W' kept an expert", "dense int8, same kernel", "vLLM LoRA r=16")


def arms(
    form: str, ids: torch.Tensor, impls: list[str], compiled: bool, adapters: int, kept: int, report: Callable
) -> dict[str, tuple[Arm, Arm]]:
    """{name: (arm, its truth)}. kept: bytes of a dense copy for each expert."""
    rows = cases.rows_of(ids)
    found: dict[str, tuple[Arm, Arm]] = {"dense, no expert": (cases.dense, cases.exact_dense)}
    found |= {f"t2 {impl}": (cases.ours(impl), cases.exact) for impl in impls}
    found["two matmuls, eager"] = cases.two_matmuls, cases.exact
    if compiled:
        torch._dynamo.reset()  # else it gives up compiling after eight shapes, and says nothing
        found["two matmuls, compiled"] = torch.compile(cases.two_matmuls, dynamic=False), cases.exact
    found["W' rebuilt an expert"] = cases.rebuilt(rows), cases.exact
    if kept <= KEPT_BYTES:
        found["W' kept an expert"] = cases.copies(rows), cases.exact
    else:
        report(f"W' of {len(rows)} experts kept: not run, {kept / 1e9:.0f} GB for this group alone")
    if adapters and form == "delta":
        names = cases.lora_names(ids, adapters)
        found[PEFT] = cases.peft_lora(names), cases.exact_lora(names)
        if why := vllm_lora.why_not(ids.device):
            report(f"vLLM's LoRA kernels: not run, {why}")
        else:
            found["vLLM LoRA r=16"] = vllm_lora.arm(ids, adapters), cases.exact_lora(names)
    return found


def sampled(T: int, count: int = 16) -> slice:
    """The rows of y that are compared with fp64: enough to find a wrong tile, and few enough to be quick."""
    return slice(None, None, max(1, T // count))


def check(name: str, arm: Arm, truth: Arm, x, ids, w: Weights) -> float:
    some = sampled(len(x))
    got = [y[some] for y in arm(x, ids, w)]
    work = x[some], ids[some], w
    # The allowance is the error of plain torch on the same work; for LoRA arms, its error on the op.
    torchs, exact = (cases.dense, cases.exact_dense) if truth is cases.exact_dense else (cases.two_matmuls, cases.exact)
    found = exact(*work)
    wanted = found if truth is exact else cases.exact_lora(cases.lora_names(ids[some], adapters_of(w)))(*work)
    room = ROOM if name.startswith("t2") else PEER_ROOM
    return require(name, cases.error(got, wanted), room * cases.error(torchs(*work), found))


def adapters_of(w: Weights) -> int:
    return len(w.lora[0].lora_A) if w.lora else 0


def one_case(
    model: str,
    group: str,
    T: int,
    mix: str,
    form: str,
    k: int | None,
    format,
    dtype,
    impls,
    peers,
    compiled,
    device,
    seconds,
    report,
) -> Iterator[dict]:
    """All arms on the same work, in turn."""
    N, Ms = cases.shapes(model, group)
    ids = cases.mixed(mix, T, device)
    adapters = min(8, int(ids.max())) if peers and able([PEFT], report) else 0
    make = partial(cases.weights, N, Ms, form, k, format, dtype, device, adapters)
    copies = [make()]
    size = sum(
        t.nbytes
        for t in ((*copies[0].W, copies[0].V, *copies[0].U) if form == "delta" else (copies[0].V, *copies[0].U))
    )
    copies += [make() for _ in range(min(15, 4 * last_level_cache(device) // size))]
    x = torch.randn(T, N, device=device).to(dtype)
    kept = ids.unique().numel() * sum(W.nbytes for W in copies[0].W) * len(copies)
    every = arms(form, ids, impls, peers and T in compiled, adapters, kept, report)
    if not peers:
        every = {n: a for n, a in every.items() if n.startswith(("dense", "t2", "two matmuls, eager"))}
    elif format != torch.int8 and device.type == "cuda":
        every["dense int8, same kernel"] = cases.dense_int8(), None
    errors = {}
    for name, (arm, truth) in list(every.items()):
        try:
            errors[name] = check(name, arm, truth, x, ids, copies[0]) if truth else 0.0
        except WrongResult as wrong:
            report(f"{model} {group} T={T} {form}: {wrong}; not timed")
            del every[name]
        except ImplUnavailableError as refused:  # an implementation by name that runs here, but not these sizes
            report(f"{model} {group} T={T} {form}: {name} not run, {refused}")
            del every[name]
    for w in copies:  # arms that keep something make it before the clock starts
        for name, (arm, _) in every.items():
            if name in KEEPING:
                arm(x, ids, w)
    runs = {name: partial(arm, x, ids) for name, (arm, _) in every.items()}
    found = per_call(runs, copies, device, seconds)
    call = cases.call_of(x, copies[0], mix == "one")
    ceiling = ceilings(device, dtype)
    for name, times in found.items():
        path = plan(x, copies[0].V, copies[0].U, ids, copies[0].delta).path if name == "t2 auto" else ""
        moved = (
            dense_weights(call) + dense_activations(call)
            if name.startswith("dense")
            else bytes_moved(call) + (dense_weights(call) if form == "delta" else 0)
        )
        ops = (
            dense_ops(call)
            if name.startswith("dense")
            else operations(call) + (dense_ops(call) if form == "delta" else 0)
        )
        t = times.median
        yield {
            "model": model,
            "group": group,
            "T": T,
            "mix": mix,
            "experts": int(ids.unique().numel()),
            "form": form,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "factors": str(format).removeprefix("torch."),
            "arm": name,
            "path": path,
            "us": t * 1e6,
            "low_us": times.low * 1e6,
            "high_us": times.high * 1e6,
            "over_dense": times.ratio,
            "GB_s": moved / t / 1e9 if counted(name) else None,
            "TFLOP_s": ops / t / 1e12 if counted(name) else None,
            "of_bandwidth": moved / t / 1e9 / ceiling["read_GB_s"] if counted(name) else None,
            "of_arithmetic": ops / t / 1e12 / ceiling["TFLOP_s"] if counted(name) else None,
            "error": errors[name],
            "copies": len(copies),
            "weight_bytes": size,
            **ceiling,
        }


def counted(name: str) -> bool:
    """True if the arm moves the bytes and does the operations of the op."""
    return name.startswith(("dense, no", "t2", "two"))


def dense_weights(call: Call) -> int:
    """Bytes of W of all members."""
    return call.x.itemsize * sum(M * call.N for M in call.M)


def dense_activations(call: Call) -> int:
    """Bytes of x and y of the dense layers; each member reads x."""
    return call.x.itemsize * sum(call.T * (M + call.N) for M in call.M)


def dense_ops(call: Call) -> int:
    """Floating-point operations of the dense layers."""
    return sum(2 * call.T * M * call.N for M in call.M)


def backward_case(model: str, group: str, T: int, mix: str, form: str, k, dtype, device, seconds) -> Iterator[dict]:
    """Forward and backward, as in training: gradients of x and of the table (ours), of x and LoRA's A and B (PEFT), of
    x (dense)."""
    N, Ms = cases.shapes(model, group)
    ids = cases.mixed(mix, T, device)
    w = cases.weights(N, Ms, form, k, dtype, dtype, device, lora=len(able([PEFT], lambda said: None)))
    x, dy = (
        torch.randn(T, N, device=device).to(dtype).requires_grad_(),
        [torch.randn(T, M, device=device).to(dtype) for M in Ms],
    )
    scale = w.scale.clone().requires_grad_()
    for layer in w.lora or ():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    some = sampled(T)

    def step(arm: Arm, leaves: list, w=w) -> Callable[[Weights], tuple]:
        return lambda _: torch.autograd.grad(arm(x, ids, w), leaves, dy)

    arms_ = {
        "dense, no expert": step(cases.dense, [x]),
        "t2 auto": step(cases.ours("auto"), [x, scale], w._replace(scale=scale)),
        "two matmuls, eager": step(cases.two_matmuls, [x, scale], w._replace(scale=scale)),
    }
    if form == "delta" and w.lora:
        A_B = [p for layer in w.lora for p in layer.parameters() if p.requires_grad]
        arms_[PEFT] = step(lambda x, ids, w: [layer(x) for layer in w.lora], [x, *A_B])
    grads = [(dx[some].double(), ds.double()) for dx, ds in (arms_[n](w) for n in ("t2 auto", "two matmuls, eager"))]
    dx, dscale = exact_grads(x.detach(), dy, ids, w)
    far = [
        [((g - t).norm() / t.norm()).item() for g, t in zip(pair, (dx[some], dscale), strict=True)] for pair in grads
    ]
    worst = max(
        require(f"backward {model} {group} T={T}", ours, ROOM * plain) for ours, plain in zip(*far, strict=True)
    )
    for name, times in per_call(arms_, [w], device, seconds).items():
        yield {
            "model": model,
            "group": group,
            "T": T,
            "mix": mix,
            "form": form,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "arm": name,
            "backward": True,
            "us": times.median * 1e6,
            "low_us": times.low * 1e6,
            "high_us": times.high * 1e6,
            "over_dense": times.ratio,
            "error": worst if name == "t2 auto" else None,
        }


def exact_grads(x, dy, ids, w: Weights):
    """dx = (dy U * scale[ids]) Vᵀ (+ dy W), dscale[e] = sum over its tokens of (x V)(dy U), in fp64."""
    p = torch.cat([d.double() @ U.double() for d, U in zip(dy, w.U, strict=True)], 1)
    dx = (p * w.scale.double()[ids]) @ w.V.double().t()
    if w.delta:
        dx = dx + sum(d.double() @ W.double() for d, W in zip(dy, w.W, strict=True))
    dscale = torch.zeros_like(w.scale, dtype=torch.float64).index_add_(0, ids, (x.double() @ w.V.double()) * p)
    return dx, dscale


def layer_case(
    model: str, T: int, mix: str, form: str, k, format, dtype, impls, device, seconds, report
) -> Iterator[dict]:
    """A layer without attention: norm, q k v, o, norm, gate and up, activation, down; each group's weights its own."""
    hidden, _, kv = cases.MODELS[model]
    ids = cases.mixed(mix, T, device)

    def make() -> list[Weights]:
        return [cases.weights(*cases.shapes(model, g), form, k, format, dtype, device) for g in cases.GROUPS]

    copies = [make(), make()] if device.type == "cuda" else [make()]
    x = torch.randn(T, hidden, device=device).to(dtype)

    def run(arm: Arm, ws: list[Weights]):
        n = F.rms_norm(x, (hidden,))
        q, _, v = arm(n, ids, ws[0])
        h = x + arm(q + v.repeat(1, hidden // kv), ids, ws[1])[0]
        gate, up = arm(F.rms_norm(h, (hidden,)), ids, ws[2])
        return [h + arm(F.silu(gate) * up, ids, ws[3])[0]]

    every = {
        "dense, no expert": cases.dense,
        **{f"t2 {i}": cases.ours(i) for i in impls},
        "two matmuls, eager": cases.two_matmuls,
    }
    truth = run(
        lambda x, ids, w: [y.to(dtype) for y in cases.exact(x, ids, w)], copies[0]
    )  # only rounded between the groups
    allowed = ROOM * cases.error(run(cases.two_matmuls, copies[0]), [t.double() for t in truth])
    errors = {}
    for name in [n for n in every if n.startswith("t2")]:
        try:
            errors[name] = require(name, cases.error(run(every[name], copies[0]), [t.double() for t in truth]), allowed)
        except WrongResult as wrong:
            report(f"{model} layer T={T} {form}: {wrong}; not timed")
            del every[name]
        except ImplUnavailableError as refused:
            report(f"{model} layer T={T} {form}: {name} not run, {refused}")
            del every[name]
    for name, times in per_call({n: partial(run, a) for n, a in every.items()}, copies, device, seconds).items():
        yield {
            "model": model,
            "group": "layer",
            "T": T,
            "mix": mix,
            "form": form,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "factors": str(format).removeprefix("torch."),
            "arm": name,
            "us": times.median * 1e6,
            "low_us": times.low * 1e6,
            "high_us": times.high * 1e6,
            "over_dense": times.ratio,
            "error": errors.get(name),
        }


def impls_here(device: torch.device, dtype: torch.dtype) -> list[str]:
    """auto, and each implementation by name that can run. Triton's interpreter is for checks, not for times."""
    here = device_of(device)
    able = [
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if not here.unsupported(name)
        and not implementation.unsupported(Call(1, 16, (16,), (16,), dtype, dtype))
        and not (name == "triton" and device.type == "cpu")
    ]
    return ["auto", *able] if device.type == "cuda" or len(able) > 1 else ["auto"]


def run(device: torch.device, a: argparse.Namespace, report: Callable[[str], None] = print) -> Iterator[dict]:
    deadline, report = time.monotonic() + a.seconds, functools.cache(report)  # the same is said once
    dtype = getattr(torch, a.dtype)
    impls = impls_here(device, dtype)
    formats = [getattr(torch, f) for f in a.formats]
    todo = []
    for model in a.models:
        for form in a.forms:
            for k in a.ranks if form == "delta" else [None]:
                for format in formats:
                    for T in a.tokens:
                        first = (form, k, format) == (a.forms[0], a.ranks[0], formats[0])
                        for mix in a.mixes if first else a.mixes[:1]:
                            peers = format == formats[0] and (form == "factored" or k == a.ranks[0])
                            todo += [
                                partial(
                                    one_case,
                                    model,
                                    g,
                                    T,
                                    mix,
                                    form,
                                    k,
                                    format,
                                    dtype,
                                    impls,
                                    peers,
                                    a.compiled,
                                    device,
                                    a.each,
                                    report,
                                )
                                for g in a.groups
                            ]
                        todo.append(
                            partial(
                                layer_case, model, T, a.mixes[0], form, k, format, dtype, impls, device, a.each, report
                            )
                        )
                if a.backward:
                    todo += [
                        partial(backward_case, model, g, a.backward, a.mixes[0], form, k, dtype, device, a.each)
                        for g in a.groups[:2]
                    ]
    for i, case in enumerate(todo):
        if time.monotonic() > deadline:
            report(f"ops: out of time after {i} of {len(todo)} cases")
            return
        with torch.enable_grad() if case.func is backward_case else torch.no_grad():
            yield from case()


def table(rows: list[dict]) -> Table:
    """A line for each arm, a column for each T: microseconds, over the dense layer of the same run, per cent of the
    nearer ceiling."""
    Ts = sorted({r["T"] for r in rows})
    out = Table("work", "experts", "arm", *(f"T={T}" for T in Ts), title="svf_linear: us, over dense, % of ceiling")
    cells: dict[tuple, dict[int, str]] = {}
    for r in rows:
        other = f" {r['factors']}" if r.get("factors", r["dtype"]) != r["dtype"] else ""
        form = r["form"] + ("" if r["k"] is None else f" k={r['k']}") + other
        what = f"{r['model']} {r['group']} {r['dtype']} {form}" + (", with backward" if r.get("backward") else "")
        share = f" {100 * max(r['of_bandwidth'], r['of_arithmetic']):.0f}%" if r.get("of_bandwidth") is not None else ""
        cells.setdefault((what, r["mix"], r["arm"]), {})[r["T"]] = f"{r['us']:.0f} {r['over_dense']:.2f}x{share}"
    for key, found in cells.items():
        out.add_row(*key, *(found.get(T, "") for T in Ts))
    return out


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    p.add_argument("--models", nargs="+", choices=list(cases.MODELS), default=["llama-3-8b"])
    p.add_argument("--groups", nargs="+", choices=list(cases.GROUPS), default=list(cases.GROUPS))
    p.add_argument(
        "--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 1024, 4096, 16384] if gpu else [1, 8, 64, 512]
    )
    p.add_argument(
        "--mixes",
        nargs="+",
        choices=list(cases.MIXES),
        default=["all distinct", "one", "8 sorted", "8 random", "half base"],
    )
    p.add_argument("--forms", nargs="+", choices=["delta", "factored"], default=["delta", "factored"])
    p.add_argument("--ranks", nargs="+", type=int, default=[256, 64, 1024], help="components in delta form")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if gpu else "float32")
    p.add_argument(
        "--formats",
        nargs="+",
        choices=["float32", "bfloat16", "float16", "int8"],
        default=None,
        help="of U and V; the first is x's by default",
    )
    p.add_argument(
        "--backward", type=int, metavar="T", default=4096 if gpu else 128, help="tokens of a training step; 0: none"
    )
    p.add_argument(
        "--compiled",
        nargs="*",
        type=int,
        metavar="T",
        default=[8] if gpu else [],
        help="for which T torch.compile is a peer",
    )
    p.add_argument("--seconds", type=float, default=480.0, help="begin no case after this many")
    p.add_argument("--each", type=float, default=1.0, help="seconds an arm of a case may take, about")
    p.add_argument("--out", type=Path, default=RESULTS / "ops.jsonl")
    return p


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    a = parser().parse_args(given)
    a.formats = a.formats or [a.dtype, "int8"]
    return a


def main() -> None:
    a = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    facts, rows = machine(("torch", "peft")), []
    for row in run(device, a):
        append(a.out, row | facts)
        rows.append(row)
    show(table(rows))


if __name__ == "__main__":
    main()
