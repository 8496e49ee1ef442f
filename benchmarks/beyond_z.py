"""What would an expert gain that carries more than a diagonal? Every kind by the same RL, on the built-in model.

    python benchmarks/beyond_z.py --tune      three learning rates a kind, on one seed and the validation problems
    python benchmarks/beyond_z.py             every kind, task and seed, each kind at the rate that --tune found best
    python benchmarks/beyond_z.py --tasks code --kinds "z 128" --rate 0.02      z at the library's own rate

W' = W + U C diag(sigma) Vᵀ with the leading k components of W = U diag(sigma) Vᵀ, which stay frozen. Kinds of C [k, k]:

    z        a diagonal: SVF itself (Transformer², arXiv 2501.06252)
    band     a diagonal with one neighbour on either side
    core     all k x k numbers (LoRA-XS, arXiv 2405.17604)
    tied     C = sum_u v_u P_u of random, fixed P, another P for each matrix, one v for all (TinyLoRA, arXiv 2602.04118)
    output   W' = diag(1 + s) W; one number for a block of outputs
    lora     W' = W + B A, as it is known (arXiv 2106.09685)

A kind is written with its size: "core 4" is 4 x 4. Every parameter begins at 0 (A of lora does not), so every run
begins as the base model. A row for each run is appended to benchmarks/results/beyond_z.jsonl: accuracy on the task's
own test problems, on those of the other trained tasks, and the rewards. `beyond_pages.py` makes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import RESULTS, append, machine, weights
from paper import read
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2kernels import tasks, tiny
from t2kernels.factors.factor import Factor, svd
from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.rewards import Scorer
from t2kernels.train import ReinforceTrainer, SVFConfig
from t2kernels.train.data import problems

OUT = RESULTS / "beyond_z.jsonl"
KINDS = {
    "z 16": (0.007, 0.02, 0.05, 0.15),
    "z 128": (0.003, 0.01, 0.03, 0.1),
    "band 43": (0.003, 0.01, 0.03, 0.1),
    "core 4": (0.007, 0.02, 0.05, 0.15),
    "core 11": (0.0015, 0.005, 0.015, 0.05),
    "core 60": (0.0003, 0.001, 0.003, 0.01),
    "tied 13": (0.002, 0.006, 0.02, 0.06, 0.2),
    "tied 448": (0.002, 0.006, 0.02, 0.06, 0.2),
    "output 128": (0.003, 0.01, 0.03, 0.1),
    "lora 8": (0.001, 0.003, 0.01),
}
"""{kind: the learning rates that --tune tries}; the more numbers move together, the smaller. Three at first, and
a third of the lowest where that was the best. Those of "tied" had to go down twice."""
TASKS = ("code", "ops5", "hop5", "add6")
"""One whose way of working the model has learned; three that are not in its corpus."""
FEW = {
    "ops5": ("z 128", "core 11", "tied 448", "output 128", "core 60", "lora 8"),
    "add6": ("z 128", "core 60", "lora 8"),
}
FEW["hop5"] = FEW["ops5"]
"""{task: the kinds that are tried on it}, all on the others. On add6 the base model is right once in 200 samples."""
OTHERS = ("math", "code", "reason", "classify")
BASE = "base"
TIED = 8  # the components of a tied core
TUNING_SEED = 100
STEPS, PROMPTS = 50, 40


class Change(nn.Module):
    """W [M, N] -> W', as a parametrisation of the weight of one linear layer."""

    def __init__(
        self, kind: str, W: Tensor, shared: nn.Parameter | None, seed: torch.Generator, factor: Factor | None = None
    ) -> None:
        super().__init__()
        name, size = kind.split()
        self.kind, self.size, self.on = name, int(size), True
        M, N = W.shape
        if name in ("output", "lora"):
            made = torch.zeros(self.size) if name == "output" else torch.zeros(M, self.size)
            if name == "lora":
                self.register_buffer(
                    "start", torch.empty(self.size, N).uniform_(-1, 1, generator=seed) * (3 / N) ** 0.5
                )
                self.A = nn.Parameter(self.start.clone())
            self.p = nn.Parameter(made)
            return
        k = min(TIED if name == "tied" else self.size, M, N)
        factor = svd(W, k) if factor is None else factor.cut(k)
        self.register_buffer("U", factor.U)
        self.register_buffer("right", factor.sigma[:, None] * factor.V.t())  # [k, N]
        i, j = torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij")
        reach = {"z": 0, "band": 1}.get(name, k)
        self.register_buffer("where", torch.stack([i, j])[:, (i - j).abs() <= reach])
        if shared is None:
            self.p = nn.Parameter(torch.zeros(self.where.shape[1]))
        else:
            self.p = shared
            mixed = torch.randn(k * k, len(shared), generator=seed)
            self.register_buffer("mix", mixed / len(shared) ** 0.5)

    def forward(self, W: Tensor) -> Tensor:
        if not self.on:
            return W
        if self.kind == "output":
            return W * self.scale(W.shape[0])[:, None]
        B, A = self.pair()
        return W + B @ A

    def output(self, layer: nn.Linear, args: tuple[Tensor], y: Tensor) -> Tensor:
        """A forward hook: y = x Wᵀ becomes x W'ᵀ. No W' is made, so no gradient of its size."""
        if not self.on:
            return y
        if self.kind == "output":
            return y * self.scale(y.shape[-1])
        B, A = self.pair()
        return y + (args[0] @ A.t()) @ B.t()

    def scale(self, M: int) -> Tensor:
        """1 + s of each output, [M]."""
        return 1 + self.p.repeat_interleave(M // self.size)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(B [M, k], A [k, N]) with W' = W + B A."""
        if self.kind == "lora":
            return self.p, self.A
        numbers = self.mix @ self.p if self.kind == "tied" else self.p
        if self.kind == "z":
            return self.U * numbers, self.right
        k = self.U.shape[1]
        return self.U @ self.U.new_zeros(k, k).index_put(tuple(self.where), numbers), self.right


def change(model: nn.Module, kind: str, seed: int, factors: Sequence[Factor] | None = None) -> list[Change]:
    """Freeze the model and put a change at every linear layer of its blocks.

    factors: of each of these layers, for a model whose W' is not to be made: the changes act on the layers' outputs
    """
    model.requires_grad_(False)
    name, size = kind.split()
    shared = nn.Parameter(torch.zeros(int(size))) if name == "tied" else None
    generator = torch.Generator().manual_seed(seed)
    out = []
    for at, module in enumerate(linear_layers(model)):
        out.append(Change(kind, module.weight.detach(), shared, generator, factors and factors[at]))
        if factors is None:
            parametrize.register_parametrization(module, "weight", out[-1])
        else:
            module.add_module("change", out[-1])
            module.register_forward_hook(out[-1].output)
    return out


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the blocks."""
    return [module for module in model.model.layers.modules() if type(module) is nn.Linear]


class ChangeTrainer(ReinforceTrainer):
    """Trains the changes of a model; the reference is the model without them."""

    changes: Sequence[Change] = ()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        for one in self.changes:
            one.on = False
        try:
            yield
        finally:
            for one in self.changes:
                one.on = True

    def rollout(self, rows) -> Rollout:
        with torch.no_grad(), parametrize.cached():  # W' is made once, not for every token
            return super().rollout(rows)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with torch.no_grad(), parametrize.cached():
            return super().evaluate(*args, **kwargs)


def settings(name: str, task: tasks.Task, seed: int, rate: float, steps: int) -> SVFConfig:
    """The settings of a run, of this benchmark and of continual.py. name: of its folder."""
    return SVFConfig(
        f"{name}-{os.getpid()}",
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=PROMPTS,
        learning_rate=rate,
        kl_coef=0.0,  # what a kind forgets is its own doing, not held by a penalty
        max_new_tokens=task.max_new_tokens,
        use_cpu=True,
    )


def prepare(task_name: str, kind: str, seed: int, rate: float, steps: int = STEPS) -> tuple[ChangeTrainer, int]:
    """(trainer, how many numbers it trains) of one run, on a fresh model."""
    task = tasks.load(task_name)
    model, tokenizer = tiny.load()
    changes = change(model, kind, seed)
    args = settings("beyond", task, seed, rate, steps)
    data = problems({"change": task}, "train", "train")
    trainer = ChangeTrainer(model, args, data, None, {"change": Scorer.of(task.reward)}, processing_class=tokenizer)
    trainer.changes = changes
    return trainer, sum(p.numel() for p in model.parameters() if p.requires_grad)


def accuracy(trainer: ChangeTrainer, task_name: str, split: str, count: int) -> float:
    """Greedy accuracy on `count` problems of a task."""
    task = tasks.load(task_name)
    data = problems({"change": task.split(split, count)}, "test", "test")
    trainer.scorers = {"change": Scorer.of(task.reward)}
    trainer.sampler.max_new_tokens = task.max_new_tokens
    return trainer.evaluate(data)["eval_accuracy"]


def run(task: str, kind: str, seed: int, rate: float, own: int, other: int, split: str, steps: int) -> dict:
    """One run: trained, and judged on its own task and on the others."""
    wall, cpu = time.perf_counter(), time.process_time()
    trainer, numbers = prepare(task, "z 1" if kind == BASE else kind, seed, rate, max(1, steps))
    if steps:
        trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    after = accuracy(trainer, task, split, own)
    others = {name: round(accuracy(trainer, name, split, other), 4) for name in OTHERS if other and name != task}
    return {
        "task": task,
        "kind": kind,
        "seed": seed,
        "split": split,
        "learning_rate": rate,
        "steps": steps,
        "prompts": PROMPTS,
        "N": own,
        "N_others": other,
        "numbers": numbers if steps else 0,
        "accuracy": round(after, 4),
        "others": others,
        "rewards": [round(r, 4) for r in rewards],
        "weights": weights(),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def best_rates(rows: Sequence[dict]) -> dict[str, float]:
    """{kind: the rate of the best run of --tune}."""
    tuned = [r for r in rows if r["split"] == "validation"]
    best: dict[str, dict] = {}
    for row in tuned:
        if row["kind"] not in best or row["accuracy"] > best[row["kind"]]["accuracy"]:
            best[row["kind"]] = row
    return {kind: row["learning_rate"] for kind, row in best.items()}


def cells(
    tune: bool, rows: Sequence[dict], chosen: Sequence[str], seeds: Sequence[int], kinds=tuple(KINDS), rate=None
) -> list:
    """The arguments of `run` of everything to do; what the rows hold is left out.

    rate: instead of the tuned one
    """
    if tune:
        wanted = [("code", k, TUNING_SEED, r, 200, 0, "validation", STEPS) for k in kinds for r in KINDS[k]]
    else:
        rates = best_rates(rows)
        wanted = [(task, BASE, 0, 0.0, 400, 100, "test", 0) for task in chosen]
        wanted += [
            (task, kind, seed, rate or rates[kind], 400, 100, "test", STEPS)
            for task in chosen
            for seed in seeds
            for kind in FEW.get(task, KINDS)
            if kind in kinds and kind in rates
        ]
    there = {(r["task"], r["kind"], r["seed"], r["learning_rate"]) for r in rows}
    return [cell for cell in wanted if cell[:4] not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="choose the learning rates")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="another learning rate than the tuned one")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = read(given.out)
    waiting = cells(given.tune, rows, given.tasks, given.seeds, given.kinds, given.rate)
    facts = machine(("torch", "transformers"))
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done, future in enumerate(as_completed([pool.submit(run, *cell) for cell in waiting]), 1):
            row = future.result()
            append(given.out, row | facts)
            shown = {key: row[key] for key in ("task", "kind", "seed", "learning_rate", "accuracy", "cpu_seconds")}
            print(f"{done}/{len(waiting)} {shown}", flush=True)


if __name__ == "__main__":
    main()
