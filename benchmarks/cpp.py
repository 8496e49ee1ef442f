"""The C++ kernels beside torch on this CPU: call by call, and for decoding a model.

    python benchmarks/cpp.py                 calls, ten minutes on a quiet machine; --threads 1 2 repeats them
    python benchmarks/cpp.py --decode        greedy decoding of the built-in model and of a random Llama

Every case is checked against the reference in fp64 before it is timed. Factors larger than 4 MB are taken from copies
of 96 MB in turn, so that they come from memory, as in a model. Rows are appended to benchmarks/results/cpp.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import RESULTS, append, interleaved, machine, show
from rich.table import Table

import t2kernels as t2
from t2kernels.ops import dispatch, svf_linear_ref
from t2kernels.ops.impls import cpp_kernels, torch_kernels

# M of each member, N, columns of each member
SHAPES = {
    "hidden 128": ((128,), 128, (128,)),
    "hidden 128, q k v": ((128, 128, 128), 128, (128, 128, 128)),
    "hidden 128, k=16": ((128,), 128, (16,)),
    "hidden 1024": ((1024,), 1024, (1024,)),
    "hidden 1024, k=64": ((1024,), 1024, (64,)),
    "hidden 1024, gate up": ((2816, 2816), 1024, (1024, 1024)),
    "hidden 2048": ((2048,), 2048, (2048,)),
    "hidden 4096": ((4096,), 4096, (4096,)),
    "hidden 4096, k=256": ((4096,), 4096, (256,)),
    "hidden 2048, down": ((2048,), 5632, (2048,)),
}
FORMATS = {
    "fp32": (torch.float32, torch.float32),
    "fp32, bf16": (torch.float32, torch.bfloat16),
    "fp32, fp16": (torch.float32, torch.float16),
    "fp32, int8": (torch.float32, torch.int8),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp16": (torch.bfloat16, torch.float16),
    "bf16, int8": (torch.bfloat16, torch.int8),
    "fp16": (torch.float16, torch.float16),
    "fp16, int8": (torch.float16, torch.int8),
}
EXPERTS = 8


def case(shape: str, form: str, T: int, repeats: int) -> dict:
    """Median microseconds of a call by torch and by C++, and the median ratio."""
    (M, N, C), (x_dtype, w_dtype) = SHAPES[shape], FORMATS[form]
    delta = "k=" in shape
    size = w_dtype.itemsize * sum(c * (m + N) for m, c in zip(M, C, strict=True))
    copies = [_factors(M, N, C, w_dtype) for _ in range(max(1, 96_000_000 // size) if size > 4_000_000 else 1)]
    scale = torch.randn(EXPERTS, sum(C)) * (1e-4 if w_dtype == torch.int8 else 1)
    x, ids = torch.randn(T, N).to(x_dtype), torch.randint(0, EXPERTS, (T,))
    bases, none = [torch.randn(T, m).to(x_dtype) if delta else None for m in M], [None] * len(M)
    errors = _errors(x, *copies[0], scale, ids, bases)
    if not errors["cpp"] <= 1.1 * errors["torch"] + torch.finfo(x_dtype).eps / 4:
        raise SystemExit(f"{shape}, {form}, T={T}: relative errors {errors}; a wrong result gets no time")
    inner = max(1, min(500, int(2e6 / size * 4)))

    def run(forward):
        def timed():
            for i in range(inner):
                forward(x, *copies[i % len(copies)], scale, ids, bases, none)

        return timed

    found = interleaved({"torch": run(torch_kernels.forward), "cpp": run(cpp_kernels.forward)}, repeats)
    return {
        "shape": shape,
        "M": M,
        "N": N,
        "C": C,
        "T": T,
        "formats": form,
        "threads": torch.get_num_threads(),
        "isa": cpp_kernels.isa(),
        "error": errors["cpp"],
        "torch_us": found["torch"].median / inner * 1e6,
        "cpp_us": found["cpp"].median / inner * 1e6,
        "ratio": found["cpp"].ratio,
        "gb_s": size / (found["cpp"].median / inner) / 1e9,
    }


def _factors(M, N, C, dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    def make(*size):
        return (
            torch.randint(-127, 128, size, dtype=torch.int8)
            if dtype == torch.int8
            else (torch.randn(size) / size[1] ** 0.5).to(dtype)
        )

    return make(sum(C), N).t(), [make(m, c) for m, c in zip(M, C, strict=True)]


def _errors(x, V, Us, scale, ids, bases) -> dict[str, float]:
    arguments, none = (x, V, Us, scale, ids, bases), [None] * len(Us)
    worst = {"torch": 0.0, "cpp": 0.0}
    for name, forward in (("torch", torch_kernels.forward), ("cpp", cpp_kernels.forward)):
        start = 0
        for y, U, base in zip(forward(*arguments, none), Us, bases, strict=True):
            c = slice(start, start + U.shape[1])
            start = c.stop
            truth = svf_linear_ref(
                x.double(),
                V[:, c].double(),
                U.double(),
                scale[:, c].double(),
                ids,
                None if base is None else base.double(),
            )
            worst[name] = max(worst[name], ((y.double() - truth).norm() / truth.norm()).item())
    return worst


def decode(name: str, form: str, factors: str, batch: int, tokens: int, repeats: int) -> dict:
    """Tokens a second of greedy decoding, every sequence with its own expert, with the C++ kernels and without."""
    model = _model(name)
    bank = t2.patch_model(model, form=form, factors=factors, **({"rank": 64} if form == "delta" else {}))
    names = [f"e{i}" for i in range(min(batch, 4))]
    for expert in names:
        bank.add(expert, bank.expert({n: 1 + 0.25 * torch.randn(k).clamp(-2, 2) for n, k in bank.matrices.items()}))
    prompt = torch.randint(5, model.config.vocab_size, (batch, 8))
    experts = [names[i % len(names)] for i in range(batch)]
    probe = dispatch.device_of
    here = probe(torch.device("cpu"))
    without = here.without("cpp", "left out")

    def run(cpu):
        def timed():
            dispatch.device_of = lambda device: cpu
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), experts=experts, do_sample=False,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip

        return timed

    found = interleaved({"torch": run(without), "cpp": run(here)}, repeats, warmup=1)
    dispatch.device_of = probe
    return {
        "model": name,
        "form": form,
        "factors": factors,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "isa": cpp_kernels.isa(),
        "torch_tokens_s": batch * tokens / found["torch"].median,
        "cpp_tokens_s": batch * tokens / found["cpp"].median,
        "ratio": 1 / found["cpp"].ratio,
    }


def _model(name: str):
    if name == "built-in":
        from t2kernels import tiny

        return tiny.load()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpp.jsonl")
    arguments = parser.parse_args()
    if reason := cpp_kernels.CPP.unsupported_device(torch.device("cpu")):
        raise SystemExit(reason)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for row in decodes(arguments.repeats) if arguments.decode else calls(arguments):
                append(arguments.out, row | machine(("torch", "transformers") if arguments.decode else ("torch",)))
                rows.append(row)
    show(decode_table(rows) if arguments.decode else call_table(rows, arguments.tokens))


def decodes(repeats: int) -> Iterator[dict]:
    for name in ("built-in", "llama 1024x8"):
        for form in ("factored", "delta"):
            for factors in ("fp32", "int8"):
                yield from (decode(name, form, factors, batch, 16, max(3, repeats // 3)) for batch in (1, 4))


def calls(arguments: argparse.Namespace) -> Iterator[dict]:
    for shape in arguments.shapes:
        for form in arguments.formats:
            yield from (case(shape, form, T, arguments.repeats) for T in arguments.tokens)


def decode_table(rows: list[dict]) -> Table:
    out = Table(
        "threads",
        "model",
        "form",
        "factors",
        "batch",
        "torch",
        "C++",
        "ratio",
        title="greedy decoding, tokens a second",
    )
    for r in rows:
        speeds = f"{r['torch_tokens_s']:.0f}", f"{r['cpp_tokens_s']:.0f}", f"{r['ratio']:.2f}x"
        out.add_row(str(r["threads"]), r["model"], r["form"], r["factors"], str(r["batch"]), *speeds)
    return out


def call_table(rows: list[dict], tokens: list[int]) -> Table:
    out = Table(
        "threads", "shape", "formats", *(f"T={T}" for T in tokens), title="time of the C++ kernels over torch's"
    )
    for key in dict.fromkeys((r["threads"], r["shape"], r["formats"]) for r in rows):
        mine = [r for r in rows if (r["threads"], r["shape"], r["formats"]) == key]
        out.add_row(*map(str, key), *(f"{r['ratio']:.2f} {r['cpp_us']:.0f}us" for r in mine))
    return out


if __name__ == "__main__":
    main()
