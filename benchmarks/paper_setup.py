"""What the parts of paper.py share: the settings of a run, the patched model with its experts, and a clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from measure import weights

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.adapt import Examples, Question
from t2kernels.cli import models
from t2kernels.evaluation import answers

CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Setup:
    """related: the trained task whose LoRA adapter, and whose expert, is the natural one for an unseen task."""

    model: str = "tiny"
    trained: tuple[str, ...] = ("math", "code", "reason")
    unseen: tuple[str, ...] = tuple(tasks.tiny.UNSEEN)
    related: tuple[str, ...] = ("math", "code", "math", "code", "math", "code", "reason", "math")
    n: int = 1000
    shots: int = 16
    steps: int = 100
    iterations: int | None = None
    cache: Path = CACHE
    chat: bool = False
    dtype: str | None = None
    device: str | None = None

    @property
    def is_tiny(self) -> bool:
        return self.model == models.TINY

    def task(self, name: str) -> tasks.Task:
        """A task; where its dataset has test rows only, some of them are kept for the shots and for validation."""
        if name.partition(":")[0] not in tasks.hub_names():
            return tasks.load(name, chat=self.chat)
        only_test = name.partition(":")[0] in ("humaneval", "math500")
        return tasks.load(name, chat=self.chat, holdout=max(64, 3 * self.shots) if only_test else 0)

    def gold(self, row: dict) -> str:
        """A right completion: the dataset's own solution where it has one."""
        return row.get("chat_target" if self.chat else "target") or row["answer"]

    @property
    def cem(self) -> dict:
        """What differs from the defaults of the search."""
        return {} if self.iterations is None else {"iterations": self.iterations}

    @property
    def experts(self) -> dict[str, Path]:
        if self.is_tiny:
            return tiny.experts()
        return {name: self.cache / "experts" / f"{Path(name).stem}.safetensors" for name in (*self.trained, "classify")}

    def adapter(self, task: str) -> Path:
        return self.cache / f"lora-{Path(task).stem}{'-' + weights() if self.is_tiny else ''}"


class Bench:
    """The patched model with its experts, and what it answers."""

    def __init__(self, setup: Setup, experts: bool = True, rows: int = 64):
        torch.set_num_threads(1 if setup.is_tiny else torch.get_num_threads())
        self.setup, self.loaded = setup, models.load(setup.model, setup.dtype, setup.device)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        # The release rescales every component of the MLP matrices and keeps the trace, which takes the factored form.
        how = {} if setup.is_tiny else {"targets": "mlp", "form": "factored"}
        self.bank = t2.patch_model(self.model, rows=rows, **how)
        self.names = [Path(name).stem for name in setup.trained]
        if experts:
            for name, path in setup.experts.items():
                self.bank.add(Path(name).stem, path)

    @cached_property
    def question(self) -> Question:
        return (
            Question.tiny(self.names)
            if self.setup.is_tiny
            else Question.about(self.names, chat=bool(self.tokenizer.chat_template))
        )

    def rows(self, task: str, split: str = "test", n: int | None = None, seed: int = 0) -> list[dict]:
        """At most n problems."""
        n = self.setup.n if n is None else n
        loaded = self.setup.task(task)
        try:
            return loaded.split(split, n, seed)
        except ValueError:
            return loaded.split(split, None, seed)[:n]

    def right(self, task: str, problems: list[dict], experts: list | None) -> list[bool]:
        loaded = self.setup.task(task)
        prompts = [row["prompt"] for row in problems]
        written = answers(
            self.model, self.tokenizer, prompts, experts, loaded.max_new_tokens, 512 if self.setup.is_tiny else 64
        )
        columns = {key: [row[key] for row in problems] for key in problems[0] if key != "prompt"}
        return [reward > 0 for reward in loaded.reward(prompts, written, **columns)]

    def accuracy(self, task: str, problems: list[dict], expert) -> float:
        return mean(self.right(task, problems, [expert] * len(problems)))

    def examples(self, task: str, seed: int) -> Examples:
        """The few labelled prompts of a seed, from the training split. The gold answer of the built-in tasks is given
        at once."""
        gold = (lambda row: "=" + row["answer"]) if self.setup.is_tiny else self.setup.gold
        return Examples(
            self.model,
            self.tokenizer,
            self.rows(task, "train", self.setup.shots, 500 + seed),
            self.setup.task(task),
            gold,
            memory=2**33,
        )


def mean(values) -> float:
    return round(sum(values) / len(values), 4)


def clock(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
