"""How many tokens a CPU second does the engine of `t2 serve` make with experts, beside transformers' own batching?

    python benchmarks/serve_decode.py MODEL FACTORS --ranks 36 256 --streams 8 32

MODEL: a checkpoint's directory; FACTORS: written by `t2 decompose MODEL`, with at least the largest rank. The first arm
is transformers' continuous batching of the dense model, as `transformers serve` runs it. Then there is `Engine` with
the base model's row, and with another of 8 experts for each request of a step; and `generate`, which answers all
prompts, of one length, in one batch without a queue or pages: about what the best loop would. All share the dense
weights, and take turns with the same greedy requests. A number is the median of round-by-round ratios of the process's
CPU time to the first; `bytes` is what the numbers of weights and factors alone predict.

Before anything is timed, the log-probabilities of an answer are compared with those of the model in fp32 whose weights
are the expert's; twice the error of that model in the engine's dtype is allowed. Rows are appended to
benchmarks/results/serve_decode.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, append, machine, require, show, timing
from real_decode import predicted, sharing
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig
from vllm_decode import CHECKED, EXPERTS, PROMPT, exact, expert_files

import t2kernels as t2
from t2kernels.layers.dense.head import contiguous_head
from t2kernels.serve.engine.batching import BatchSettings
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.engine.sampling import Sampling

PLAIN = "transformers, no experts"
Arm = Callable[[int, int], Coroutine[Any, Any, list[list[int]]]]
"""(streams, tokens) -> the tokens of each request"""


def prompts(streams: int) -> list[list[int]]:
    return [[*PROMPT, 400 + i] for i in range(streams)]


def plain(dense: torch.nn.Module, settings: BatchSettings) -> tuple[Any, Arm]:
    """transformers' manager with the sizes of the engine's, and the arm that asks it."""
    manager = dense.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
        settings.config(dense.device),
    )
    manager.start()

    def ask(streams: int, tokens: int) -> list[list[int]]:
        names = [manager.add_request(p, max_new_tokens=tokens) for p in prompts(streams)]
        found = {}
        while len(found) < streams:
            if (out := manager.get_result(timeout=1)) is not None:
                found[out.request_id] = out.generated_tokens
        return [found[name] for name in names]

    return manager, lambda streams, tokens: asyncio.to_thread(ask, streams, tokens)


def ours(engine: Engine, names: list[str | None]) -> Arm:
    """The arm that asks the engine, with the experts of `names` in turn."""

    async def one(prompt: list[int], name: str | None, tokens: int) -> list[int]:
        return [t async for new in engine.submit(prompt, tokens, name) for t in new]

    async def ask(streams: int, tokens: int) -> list[list[int]]:
        asked = (one(p, names[i % len(names)], tokens) for i, p in enumerate(prompts(streams)))
        return await asyncio.gather(*asked)

    return ask


def whole(model: torch.nn.Module, **experts: Any) -> Arm:
    """The arm that generates all answers in one batch. experts: arguments of `generate`, which may be longer"""

    def ask(streams: int, tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts(streams))
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        given |= {name: (some * streams)[:streams] for name, some in experts.items()}
        with contiguous_head(model):
            out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **given)
        return out[:, ids.shape[1] :].tolist()

    return lambda streams, tokens: asyncio.to_thread(ask, streams, tokens)


async def error(engine: Engine, model: str, factors: t2.Factors, expert: t2.Expert, dtype: torch.dtype) -> float:
    """How far the log-probabilities of an answer are from the expert's in fp32, relative to them."""
    sampling = Sampling(logprobs=0)
    answer = [t async for new in engine.submit(prompts(1)[0], CHECKED, "e0", sampling) for t in new]
    found = torch.tensor([value for value, _ in sampling.reported])
    want, own = (exact(model, factors, expert, answer, d) for d in (torch.float32, dtype))
    off, allowed = (((t - want).norm() / want.norm()).item() for t in (found, own))
    return require("the engine with an expert", off, 2 * allowed + 1e-5)


async def measure(args: argparse.Namespace, rank: int, folder: Path, table: Table) -> None:
    """One rank: its arms in turn, and their rows."""
    dtype, factors = getattr(torch, args.dtype), t2.Factors.load(args.factors)
    expert_files(folder, factors, rank)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    delta = sharing(dense)
    bank = t2.patch_model(delta, factors=factors, rank=rank, form="delta", rows=EXPERTS + 2)
    for i in range(EXPERTS):
        bank.add(f"e{i}", folder / f"{rank}-{i}.safetensors")
    settings = BatchSettings()
    engine = Engine(delta, [-1], settings)
    await engine.start()
    off = await error(engine, args.model, factors, t2.Expert.load(folder / f"{rank}-0.safetensors"), dtype)
    manager, dense_arm = plain(dense, settings)
    mixed = [f"e{i}" for i in range(EXPERTS)]
    arms = {PLAIN: dense_arm, "base row": ours(engine, [None]), f"{EXPERTS} experts": ours(engine, mixed)}
    arms |= {"generate, no experts": whole(dense), f"generate, {EXPERTS} experts": whole(delta, experts=mixed)}
    for n in args.streams:
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for i in range(args.repeats + 1):
            for name, arm in arms.items():
                start = time.process_time()
                found = await arm(n, args.tokens)
                spent = time.process_time() - start
                if any(len(tokens) != args.tokens for tokens in found):
                    raise RuntimeError(f"{name}: an answer has not {args.tokens} tokens")
                if i:
                    seconds[name].append(spent)
        for name, t in timing(seconds).items():
            rate, of = n * args.tokens / t.median, 1 / t.ratio
            row = {"model": Path(args.model).name, "dtype": args.dtype, "rank": rank, "streams": n, "arm": name}
            row |= {"rate": rate, "of_plain": of, "bytes": 1.0 if "no experts" in name else predicted(delta)}
            row["error"] = off
            append(args.out, row | machine())
            table.add_row(str(rank), str(n), name, f"{rate:.1f}", f"{of:.3f}", f"{1 / row['bytes']:.3f}")
    await engine.drain(1)
    manager.stop(block=True, timeout=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("factors", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[36])
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_decode.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    title = f"{args.model}, {args.dtype}"
    table = Table("rank", "streams", "arm", "tokens a CPU second", "of transformers'", "bytes alone", title=title)
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as place:
            asyncio.run(measure(args, rank, Path(place), table))
    show(table)


if __name__ == "__main__":
    main()
