"""What does decoding with experts cost on a GPU, layer by layer, beside the dense layer and beside plain torch?

    python benchmarks/decode.py              the groups of Llama-3-8B, T = 1, 8, 32, 128, every token its own expert: some four minutes
    python benchmarks/decode.py --dry-run    tiny sizes, on the CPU too (TRITON_INTERPRET=1): the checks, and no time
    python benchmarks/decode.py --small      one small call of every kernel, for compute-sanitizer
    python benchmarks/decode.py --between    an elementwise kernel of torch after every call, as in a model: no call starts under the one before

The CUDA kernel takes part where the extension holds it, in the variants that are to be chosen from: launches that depend (PDL) or wait, one
cooperative launch (fused), the depth of the ring, blocks a multiprocessor, clusters of blocks, and the base weight read in the same launch.

A time is that of one call in a CUDA graph of many, whose weights are copies taken in turn, in all more than four times the L2 cache. What the
graph wrote is compared with fp64 first: the error may be 1.1 times that of plain torch in the same dtypes. A wrong result gets no time.
Rows are appended to benchmarks/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import RESULTS, append, machine
from torch import Tensor

from t2kernels.ops.impls import cuda_kernels, torch_kernels
from t2kernels.ops.impls import triton as triton_kernels
from t2kernels.ops.impls.cuda_kernels import Variant

GROUPS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate+up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BF16, INT8 = torch.bfloat16, torch.int8
E, DELTA = 128, 256
ROOM = 1.1


class Weights(NamedTuple):
    """One copy of a group: W of every member, or None in factored form, its row scales where it is int8, and the factors."""

    W: list[Tensor] | None
    rows: list[Tensor] | None
    V: Tensor
    U: list[Tensor]
    scale: Tensor


class Run(NamedTuple):
    """One variant: f of (x, ids, weights), from and up to how many tokens, and whether experts are in it."""

    f: Callable[[Tensor, Tensor, Weights], list[Tensor]]
    tokens: int = 1 << 30
    experts: bool = True
    least: int = 1


class Case(NamedTuple):
    """form: what the factors are, and the base; run: by the variant's name."""

    form: str
    run: dict[str, Run]


def base(x: Tensor, w: Weights) -> list[Tensor | None]:
    return [None] * len(w.U) if w.W is None else [F.linear(x, W) for W in w.W]


def none(w: Weights) -> list[None]:
    return [None] * len(w.U)


def dense(x, ids, w):
    return [F.linear(x, W) for W in w.W]


def plain_torch(x, ids, w):
    return torch_kernels.forward(x, w.V, w.U, w.scale, ids, base(x, w), none(w), keep_h=False)[0]


def triton_pair(x, ids, w):
    return triton_kernels.forward_pair(x, w.V, w.U, w.scale, ids, base(x, w), none(w))


def triton_mm(x, ids, w):
    return triton_kernels.forward_mm(x, w.V, w.U, w.scale, ids, base(x, w), none(w))[0]


def cuda_pair(variant: Variant) -> Run:
    """The library's base product, if any, then the CUDA kernel."""
    tokens = 8 if variant.fused or variant.depth else 32
    return Run(lambda x, ids, w: cuda_kernels.forward(x, w.V, w.U, w.scale, ids, base(x, w), none(w), variant), tokens)


def cuda_over(variant: Variant) -> Run:
    """The base weight read in the same launch as V."""
    tokens = 8 if variant.fused or variant.depth else 32
    return Run(
        lambda x, ids, w: cuda_kernels.forward_over(x, w.W, w.V, w.U, w.scale, ids, none(w), w.rows, variant=variant),
        tokens,
    )


def cases(device: torch.device) -> tuple[Case, ...]:
    plain = Run(plain_torch)
    found = (
        Case(
            "delta bf16",
            {
                "dense F.linear": Run(dense, experts=False),
                "dense + torch": plain,
                "dense + triton pair": Run(triton_pair),
            },
        ),
        Case(
            "factored bf16",
            {"torch mm, scale, mm": plain, "triton mm, scale, mm": Run(triton_mm), "triton pair": Run(triton_pair)},
        ),
        Case("factored int8", {"triton pair": Run(triton_pair)}),
        Case("delta bf16, int8 base", {}),
        Case("delta int8, int8 base", {}),
    )
    if why := cuda_kernels.why_not(device):
        print(f"without the CUDA kernel: {why}")
        return found[:3]
    pdl, fused = Variant(), Variant(fused=True)
    one_a_sm = Variant(blocks=torch.cuda.get_device_properties(device).multi_processor_count)
    over = {"cuda over W, PDL": cuda_over(pdl), "cuda over W, fused": cuda_over(fused)}
    alone = Run(lambda x, ids, w: cuda_kernels.dense(x, w.W, w.rows), 32, experts=False)
    found[0].run.update(
        {
            "cuda dense": alone,
            "dense + cuda, PDL": cuda_pair(pdl),
            **over,
            "cuda over W, no PDL": cuda_over(Variant(False)),
        }
    )
    ring = {f"cuda, ring of {depth}": cuda_pair(Variant(depth=depth)) for depth in (2, 3)}
    found[1].run.update(
        {
            "cuda, PDL": cuda_pair(pdl),
            "cuda, no PDL": cuda_pair(Variant(False)),
            "cuda, fused": cuda_pair(fused),
            **ring,
        }
    )
    found[1].run["cuda, one block a SM"] = cuda_pair(one_a_sm)
    ring = {f"cuda, ring of {depth}": cuda_pair(Variant(depth=depth)) for depth in (2, 4)}
    found[2].run.update(
        {
            "cuda, PDL": cuda_pair(pdl),
            "cuda, no PDL": cuda_pair(Variant(False)),
            "cuda, fused": cuda_pair(fused),
            **ring,
        }
    )
    found[2].run["cuda, one block a SM"] = cuda_pair(one_a_sm)
    for case in found[1:3]:
        case.run["cuda, no cluster"] = cuda_pair(Variant(cluster=1))._replace(least=9)
    for case in found[3:]:
        case.run.update({"cuda dense": alone, **over})
    return found


def weights(form: str, N: int, Ms: tuple[int, ...], device: torch.device, delta: int) -> Weights:
    dtype = INT8 if form.split(",")[0].endswith("int8") else BF16

    def factor(rows: int, columns: int) -> Tensor:
        w = torch.randn(rows, columns, device=device) / columns**0.5
        return (w * (127 / w.abs().amax())).round().to(INT8) if dtype == INT8 else w.to(BF16)

    extra = 32 if form == "factored int8" else 0  # 3 % residual columns, in whole tiles
    ranks = [
        delta if form.startswith("delta") else min(M, N) + -(-min(M, N) // (32 * extra)) * extra if extra else min(M, N)
        for M in Ms
    ]
    V, U = factor(sum(ranks), N).t(), [factor(M, R) for M, R in zip(Ms, ranks, strict=True)]
    scale = torch.rand(E, sum(ranks), device=device) + 0.5
    if dtype == INT8:
        scale /= V.float().norm(dim=0).mean() * U[0].float().norm(dim=0).mean()
    W = [(torch.randn(M, N, device=device) / N**0.5).to(BF16) for M in Ms] if form.startswith("delta") else None
    rows = None
    if form.endswith("int8 base"):
        rows = [w.float().abs().amax(1) / 127 for w in W]
        W = [(w / r[:, None]).round().to(INT8) for w, r in zip(W, rows, strict=True)]
    return Weights(W, rows, V, U, scale)


def floats(w: Weights, dtype: torch.dtype) -> list[Tensor]:
    """W, with its row scales."""
    return [W.to(dtype) if w.rows is None else (W.double() * w.rows[i][:, None]).to(dtype) for i, W in enumerate(w.W)]


def exact(x: Tensor, ids: Tensor, w: Weights, with_experts: bool) -> list[Tensor]:
    ys = [x.double() @ W.t() for W in floats(w, torch.float64)] if w.W is not None else [0.0] * len(w.U)
    if with_experts:
        g = (x.double() @ w.V.double()) * w.scale.double()[ids]
        parts = g.split([U.shape[1] for U in w.U], 1)
        ys = [y + g_i @ U.double().t() for y, g_i, U in zip(ys, parts, w.U, strict=True)]
    return ys


def eager(x: Tensor, ids: Tensor, w: Weights, with_experts: bool) -> list[Tensor]:
    """Every step rounded to bf16, as plain torch code would."""
    ys = none(w) if w.W is None else [x @ W.t() for W in floats(w, BF16)]
    if with_experts:
        g = ((x @ w.V.to(BF16)) * w.scale[ids]).to(BF16)
        parts = g.split([U.shape[1] for U in w.U], 1)
        found = [g_i @ U.to(BF16).t() for g_i, U in zip(parts, w.U, strict=True)]
        ys = [f if y is None else y + f for y, f in zip(ys, found, strict=True)]
    return ys


def error(ys: list[Tensor], truth: list[Tensor]) -> float:
    return max(((y.double() - t).norm() / t.norm()).item() for y, t in zip(ys, truth, strict=True))


def replayed(
    run: Callable, x: Tensor, ids: Tensor, copies: list[Weights], calls: int, between: bool
) -> tuple[Callable[[], None], list[Tensor]]:
    """(what replays `calls` calls, the outputs of the last of them): a CUDA graph on a GPU, a loop elsewhere. between: x = 1 x after each."""
    if x.device.type == "cpu":
        found = run(x, ids, copies[(calls - 1) % len(copies)])
        return lambda: None, found
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate
        for w in copies[:2]:
            run(x, ids, w)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            found = run(x, ids, copies[i % len(copies)])
            if between:
                x.mul_(1)
    for y in found:
        y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, found


def seconds_of(replay: Callable[[], None], repeats: int = 30) -> list[float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found = []
    for _ in range(3 + repeats):
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return found[3:]


def measure(
    name: str, case: Case, Ts: list[int], device: torch.device, shrink: int, deadline: float, between: bool = False
) -> list[dict]:
    N, Ms = GROUPS[name][0] // shrink, tuple(M // shrink for M in GROUPS[name][1])
    first = weights(case.form, N, Ms, device, DELTA // min(shrink, 8))
    size = sum(t.numel() * t.element_size() for t in (*(first.W or ()), first.V, *first.U))
    L2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = [first] + [
        weights(case.form, N, Ms, device, first.scale.shape[1] // len(Ms))
        for _ in range(max(3, 4 * L2 // size) if L2 else 1)
    ]
    calls, rows = len(copies) * -(-16 // len(copies)), []
    for T in Ts:
        if time.monotonic() > deadline:
            print(f"out of time before {name}, {case.form}, T={T}")
            break
        x, ids = torch.randn(T, N, device=device).to(BF16), (torch.arange(T, device=device) % E).int()
        for variant, run in case.run.items():
            if not run.least <= T <= run.tokens:
                continue
            experts = run.experts
            replay, ys = replayed(run.f, x, ids, copies, calls, between)
            last = copies[(calls - 1) % len(copies)]
            truth = exact(x, ids, last, experts)
            found, allowed = error(ys, truth), ROOM * error(eager(x, ids, last, experts), truth)
            row = dict(
                group=name,
                form=case.form,
                T=T,
                variant=variant,
                between=between,
                experts=min(T, E) if experts else 0,
                error=found,
                allowed=allowed,
            )
            right = found <= allowed
            if right and device.type == "cuda":
                per_call = sorted(s / calls for s in seconds_of(replay))
                low, _, high = statistics.quantiles(per_call, n=4)
                row |= dict(
                    us=statistics.median(per_call) * 1e6,
                    low_us=low * 1e6,
                    high_us=high * 1e6,
                    copies=len(copies),
                    weight_bytes=size,
                )
            rows.append(row | dict(passed=right))
            print(
                f"{name:8} {case.form:14} T={T:<4} {variant:22} error {found:.2e} of {allowed:.2e}{'' if right else '   WRONG'}",
                flush=True,
            )
    return rows


def bandwidth(device: torch.device) -> dict[str, float]:
    """GB/s of reading 4 GB, and of copying it, both ways counted: the ceilings of this machine."""
    data, out = torch.randn(2**30, device=device), torch.empty(2**30, device=device)
    read = statistics.median(seconds_of(lambda: data.sum(), 10))
    copy = statistics.median(seconds_of(lambda: out.copy_(data), 10))
    return {"read_GB_s": data.nbytes / read / 1e9, "copy_GB_s": 2 * data.nbytes / copy / 1e9}


def check_small(name: str, run: Callable, form: str, x: Tensor, ids: Tensor, w: Weights) -> None:
    truth = exact(x, ids, w, True)
    found, allowed = error(run(x, ids, w), truth), ROOM * error(eager(x, ids, w, True), truth)
    assert found <= allowed, f"{name}, {form}, T={len(x)}: error {found:.2e}, allowed {allowed:.2e}"


def small_cuda(device: torch.device) -> None:
    """Every variant of the CUDA kernel once, on sizes that are no whole number of tiles."""
    for case in cases(device) if cuda_kernels.why_not(device) is None else ():
        w = weights(case.form, 208, (80, 80), device, 48)
        runs = dict(case.run)
        if not case.form.endswith("int8 base"):
            runs["cuda, clusters"] = cuda_pair(Variant(cluster=4))._replace(
                least=9
            )  # which rows as short as these would not get
        for (variant, run), T in ((v, T) for v in runs.items() for T in (5, 13, 32)):
            if variant.startswith("cuda") and run.experts and run.least <= T <= run.tokens:
                x, ids = torch.randn(T, 208, device=device).to(BF16), (torch.arange(T, device=device) % 7).int()
                check_small(variant, run.f, case.form, x, ids, w)
                if len(w.U) == 2:
                    assert cuda_kernels.forward_swiglu(x, w.V, w.U, w.scale, ids, none(w), none(w)).isfinite().all()


def small(device: torch.device) -> None:
    """Every kernel once, on sizes that are no whole number of tiles."""
    for dtype in (BF16, INT8):
        form = "factored int8" if dtype == INT8 else "delta bf16"
        w = weights(form, 200, (72, 72), device, 40)
        for T in (5, 40):
            x, ids = torch.randn(T, 200, device=device).to(BF16), (torch.arange(T, device=device) % 7).int()
            for run in (triton_pair, triton_mm):
                check_small(run.__name__, run, form, x, ids, w)
            gate = triton_kernels.forward_swiglu(x, w.V, w.U, w.scale, ids, base(x, w), none(w))
            assert gate.isfinite().all()
            dys = [torch.randn(T, 72, device=device).to(BF16) for _ in w.U]
            for deterministic in (True, False):
                dx, dscale = triton_kernels.backward(
                    dys, x, w.V, w.U, w.scale, ids, True, True, deterministic=deterministic
                )
                assert dx.isfinite().all()
                assert dscale.isfinite().all()
    print("small: all right")


def table(rows: list[dict]) -> None:
    for form in dict.fromkeys(r["form"] for r in rows):
        Ts = list(dict.fromkeys(r["T"] for r in rows))
        print(
            f"\n{form}: us a call, and over dense F.linear in bf16".ljust(62) + "".join(f"{f'T={T}':>18}" for T in Ts)
        )
        for group, variant in dict.fromkeys((r["group"], r["variant"]) for r in rows if r["form"] == form):
            cells = []
            for T in Ts:
                found = {(r["form"], r["variant"]): r for r in rows if (r["group"], r["T"]) == (group, T)}
                row, peer = found.get((form, variant)), found.get(("delta bf16", "dense F.linear"))
                if row is None:
                    cells.append("not run")
                elif not row["passed"]:
                    cells.append("wrong")
                elif "us" not in row:
                    cells.append("right")
                else:
                    cells.append(
                        f"{row['us']:.1f}" + (f"  {row['us'] / peer['us']:.2f}x" if peer and "us" in peer else "")
                    )
            print(f"  {group:10}{variant:50}" + "".join(f"{c:>18}" for c in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--between", action="store_true")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this many")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.jsonl")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if why := triton_kernels.why_not(device):
        parser.error(why)
    if device.type == "cpu" and not (arguments.dry_run or arguments.small):
        parser.error("no CUDA GPU here; --dry-run goes through everything but the timing")
    torch.manual_seed(0)
    if arguments.small:
        small(device)
        small_cuda(device)
        return 0
    deadline, rows = time.monotonic() + arguments.seconds, []
    facts = machine(("torch", "triton"))
    ceilings = bandwidth(device) if device.type == "cuda" and not arguments.dry_run else {}
    print(facts, ceilings, flush=True)
    Ts = arguments.tokens or ([1, 33] if arguments.dry_run else [1, 8, 32, 128])
    for name in arguments.groups:
        for case in cases(device):
            rows += measure(name, case, Ts, device, 32 if arguments.dry_run else 1, deadline, arguments.between)
    if not arguments.dry_run:
        append(arguments.out, *(row | ceilings | facts for row in rows))
    table(rows)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
