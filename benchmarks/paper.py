"""The tables of the Transformer² paper (arXiv 2501.06252), on the built-in model or on any causal language model.

    python benchmarks/paper.py --model tiny                                    every part, two processes; docs/paper.md holds the tables
    python benchmarks/paper.py --model meta-llama/Meta-Llama-3-8B-Instruct --jobs 1 --cache runs/llama      the same, by the release's settings

Parts: lora (adapters of the trained tasks, kept in --cache), routes (each unseen task: base, every expert, every way to choose one), few
(each unseen task and seed: CEM and its controls on the same examples), mixings (what CEM mixes), mixed (routing on mixed traffic, cost of the first pass), transfer,
speed (a CEM generation). For another model also experts, which trains and keeps them. What RL gains on the trained tasks is
benchmarks/rl.py's question: its rows are read, not measured again. A row for each cell is appended to benchmarks/results/paper.jsonl;
cells that are there already, for the same model and settings, are not run again unless --again. The unseen tasks were fixed before any result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import RESULTS, append, machine
from rich.console import Console
from rl import lora, prepare

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.adapt import (
    CEMConfig,
    Classifier,
    Examples,
    FewShot,
    Prompt,
    Question,
    Router,
    ZeroShot,
    alignment,
    labelled,
    refine,
    shuffled,
    transfer,
)
from t2kernels.adapt.refine import supervise
from t2kernels.adapt.transfer import factors_of
from t2kernels.cli import models
from t2kernels.cli.answers import answers
from t2kernels.cli.race import rebuild
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.rollout import Rollout, Sampler, completion_logits

CACHE = Path(__file__).parent / "cache"
LONG = {False: 128, True: 96}  # tokens of a long answer; the built-in model has 128 positions


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
    dtype: str | None = None
    device: str | None = None

    @property
    def is_tiny(self) -> bool:
        return self.model == models.TINY

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
        return self.cache / f"lora-{Path(task).stem}"


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
        return Question.tiny(self.names) if self.setup.is_tiny else Question.about(self.names, chat=bool(self.tokenizer.chat_template))

    def rows(self, task: str, split: str = "test", n: int | None = None, seed: int = 0) -> list[dict]:
        """At most n problems."""
        n = self.setup.n if n is None else n
        loaded = tasks.load(task)
        try:
            return loaded.split(split, n, seed)
        except ValueError:
            return loaded.split(split, None, seed)[:n]

    def right(self, task: str, problems: list[dict], experts: list | None) -> list[bool]:
        loaded = tasks.load(task)
        prompts = [row["prompt"] for row in problems]
        written = answers(self.model, self.tokenizer, prompts, experts, loaded.max_new_tokens, 512 if self.setup.is_tiny else 64)
        columns = {key: [row[key] for row in problems] for key in problems[0] if key != "prompt"}
        return [reward > 0 for reward in loaded.reward(prompts, written, **columns)]

    def accuracy(self, task: str, problems: list[dict], expert) -> float:
        return mean(self.right(task, problems, [expert] * len(problems)))

    def examples(self, task: str, seed: int) -> Examples:
        """The few labelled prompts of a seed, from the training split. The gold answer of the built-in tasks is given at once."""
        gold = (lambda row: "=" + row["answer"]) if self.setup.is_tiny else (lambda row: row.get("solution") or row["answer"])
        return Examples(
            self.model, self.tokenizer, self.rows(task, "train", self.setup.shots, 500 + seed), tasks.load(task), gold, memory=2**33
        )


def mean(values) -> float:
    return round(sum(values) / len(values), 4)


# --- cells: each returns what it measured


def train_expert(setup: Setup, task: str, seed: int) -> dict:
    """An expert of a trained task by the release's settings, or the classification expert. Kept in the cache; the built-in model ships its own."""
    path = setup.experts[task]
    bench = Bench(setup, experts=False, rows=4)
    data = (
        tasks.load(task)
        if task != "classify"
        else labelled(dict(zip(bench.question.labels, map(tasks.load, setup.trained), strict=False)), bench.question)
    )
    config = SVFConfig.paper(
        str(setup.cache / "checkpoints" / path.stem),
        max_steps=setup.steps,
        max_new_tokens=data.max_new_tokens,
        seed=seed,
        use_cpu=bench.model.device.type == "cpu",
    )
    trainer = SVFTrainer(bench.model, config, data, experts=path.stem, processing_class=bench.tokenizer)
    trainer.train()
    saved = trainer.experts[path.stem]
    saved.manifest["question"] = bench.question.record()
    saved.save(path)
    return {"numbers": saved.numel, "steps": setup.steps}


def train_lora(setup: Setup, task: str, seed: int) -> dict:
    """A LoRA adapter of a trained task by the same RL as in rl.py (tiny), or by likelihood of the answers (another model)."""
    start = time.process_time()
    if setup.is_tiny:
        trainer, numbers = prepare(task, "lora r=16", seed, setup.steps)
        trainer.train()
        trainer.model.save_pretrained(setup.adapter(task))
        return {"numbers": numbers, "steps": setup.steps, "cpu_seconds": round(time.process_time() - start, 1)}
    loaded = models.load(setup.model, setup.dtype, setup.device)
    model = lora(loaded.model, 16, seed)
    data = tasks.load(task)
    work = [(row["prompt"], row.get("solution") or row["answer"], 1.0) for row in data.split("train")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    supervise(model, Sampler(model, loaded.tokenizer, data.max_new_tokens), parameters, work, setup.steps, 2e-4, batch=16, seed=seed)
    model.save_pretrained(setup.adapter(task))
    return {"numbers": sum(p.numel() for p in parameters), "steps": setup.steps}


def routes(setup: Setup, task: str, seed: int) -> dict:
    """Every expert on an unseen task, every way to choose one for each prompt, and the LoRA adapter of the related task."""
    import peft

    bench = Bench(setup)
    problems = bench.rows(task)
    prompts = [row["prompt"] for row in problems]
    experts = [None, *bench.names]
    flat = bench.right(task, [row for row in problems for _ in experts], experts * len(problems))
    right = {name: flat[k :: len(experts)] for k, name in enumerate(experts)}
    out = {str(name or "base"): mean(right[name]) for name in experts}
    model, tokenizer = bench.model, bench.tokenizer
    judges = {"prompt": Prompt(model, tokenizer, bench.question), "classifier": Classifier(model, tokenizer, bench.question)}
    ways = {
        **judges,
        "prompt, generated": Prompt(model, tokenizer, bench.question, method="generate"),
        "zero-shot likelihood": ZeroShot(model, tokenizer, bench.names),
        "zero-shot confidence": ZeroShot(model, tokenizer, bench.names, by="confidence"),
    }
    by = lambda chosen: mean([right[name][i] for i, name in enumerate(chosen)])  # noqa: E731
    out |= {name: by(way.choose(prompts)) for name, way in ways.items()}
    out["router"] = mean(bench.right(task, problems, Router(judges["classifier"]).choose(prompts)))
    # The margin by validation data: of the trained tasks, which is what a user has; and by the few shots of this task.
    known = [(name, row) for name in setup.trained for row in bench.rows(name, "validation", 100)]
    by_task = dict(zip(setup.trained, map(tasks.load, setup.trained), strict=True))

    def reward(prompts, completions, task, **columns):
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(prompts))]
        return [
            by_task[t].reward([p], [c], **{k: [v] for k, v in row.items()})[0]
            for p, c, t, row in zip(prompts, completions, task, rows, strict=True)
        ]

    for name, judge in judges.items():
        longest = max(t.max_new_tokens for t in by_task.values())
        judge.fit_margin([{**row, "task": trained} for trained, row in known], reward, longest)
        out[f"{name}, margin"] = by(judge.choose(prompts))
        few = []
        for s in range(3):
            judge.fit_margin(bench.rows(task, "train", setup.shots, 500 + s), tasks.load(task))
            few.append(by(judge.choose(prompts)))
        out[f"{name}, margin by shots"] = few
    related = dict(zip(setup.unseen, setup.related, strict=True))[task]
    loaded = models.load(setup.model, setup.dtype, setup.device)
    bench.model = peft.PeftModel.from_pretrained(loaded.model, setup.adapter(related)).eval()
    out["lora"] = mean(bench.right(task, problems, None))
    return {"N": len(problems), "related": related, "accuracy": out}


def few(setup: Setup, task: str, seed: int) -> dict:
    """CEM on a few examples, and on the same ones its controls: the best single expert, shuffled experts, LoRA, gradient steps from CEM's point."""
    bench = Bench(setup)
    problems, out, facts = bench.rows(task), {}, {}
    examples = bench.examples(task, seed)
    single = examples.score(bench.bank.ids([None, *bench.names]))
    best = max(range(len(bench.names) + 1), key=lambda i: (single.reward[i].item(), single.likelihood[i].item()))
    facts["best_single"] = [None, *bench.names][best]
    variants: dict[str, tuple] = {
        "cem": (bench.names, CEMConfig(seed=seed, **setup.cem)),
        "shuffled": ({n: shuffled(bench.bank[n], seed) for n in bench.names}, CEMConfig(seed=seed, **setup.cem)),
    }
    for name, (experts, config) in variants.items():
        strategy = FewShot(bench.model, bench.tokenizer, examples, experts, config, name, caution=None)
        out[name] = bench.accuracy(task, problems, name)
        facts[name] = {
            "alpha": strategy.found.alpha.mean(1).tolist(),
            "gain": round(strategy.gain, 4),
            "error": round(strategy.error, 4),
            "generations": len(strategy.found.scores),
            "stopped": strategy.found.stopped,
            "seconds": round(strategy.found.seconds, 1),
        }
        if name == "cem":
            found = strategy.found
    if any(found.answers):
        bench.bank.add("refined", refine(examples, found.answers, found.expert, "refining", seed=seed))
        out["cem + gradient"] = bench.accuracy(task, problems, "refined")
        rewards = examples.score(bench.bank.ids(["cem", "refined"]), likelihood=False).rewards
        facts["cem + gradient"] = {"gain": round((rewards[1] - rewards[0]).mean().item(), 4)}
    loaded = models.load(setup.model, setup.dtype, setup.device)
    bench.model = lora(loaded.model, 16, seed)
    gold = examples.sampler.tokenizer.batch_decode(
        [row[there] for row, there in zip(*examples.gold, strict=True)], skip_special_tokens=True
    )
    work = [(prompt, text, 1.0) for prompt, text in zip(examples.prompts, gold, strict=True)]
    parameters = [p for p in bench.model.parameters() if p.requires_grad]
    supervise(bench.model, examples.sampler, parameters, work, 30, 1e-3, seed=seed)
    out["lora on the shots"] = mean(bench.right(task, problems, None))
    return {"N": len(problems), "shots": len(examples), "accuracy": out, "facts": facts}


def mixings(setup: Setup, task: str, seed: int) -> dict:
    """CEM with other things mixed, or mixed more finely."""
    bench = Bench(setup)
    problems, examples, out = bench.rows(task), bench.examples(task, seed), {}
    free = {"seed": seed, **setup.cem}
    configs = {
        "per layer": CEMConfig(per="layer", std=0.3, **free),
        "z": CEMConfig(mixing="z", **free),
        "release": CEMConfig.paper(**{"iterations": 8, **free}),
    }
    for name, config in configs.items():
        FewShot(bench.model, bench.tokenizer, examples, bench.names, config, name, caution=None)
        out[name] = bench.accuracy(task, problems, name)
    return {"N": len(problems), "shots": len(examples), "accuracy": out}


def mixed(setup: Setup, task: str, seed: int) -> dict:
    """Mixed traffic of the trained tasks: accuracy by each way to route, and its first pass in shares of the second."""
    bench = Bench(setup)
    each = min(len(bench.rows(t)) for t in setup.trained)
    pairs = [
        (name, t, row)
        for rows in zip(*(bench.rows(t, n=each) for t in setup.trained), strict=True)
        for name, t, row in zip(bench.names, setup.trained, rows, strict=True)
    ]
    prompts, longest = [row["prompt"] for _, _, row in pairs], max(tasks.load(t).max_new_tokens for t in setup.trained)
    experts = [None, *bench.names]
    flat = answers(
        bench.model, bench.tokenizer, [p for p in prompts for _ in experts], experts * len(prompts), longest, 512 if setup.is_tiny else 64
    )
    right = {}
    for k, name in enumerate(experts):
        given = flat[k :: len(experts)]
        right[name] = [
            tasks.load(t).reward([row["prompt"]], [text], **{key: [v] for key, v in row.items() if key != "prompt"})[0] > 0
            for (_, t, row), text in zip(pairs, given, strict=True)
        ]
    by = lambda chosen: mean([right[name][i] for i, name in enumerate(chosen)])  # noqa: E731
    oracle = [name for name, _, _ in pairs]
    out = {"base": by([None] * len(pairs)), "oracle": by(oracle)}
    question, model, tokenizer = bench.question, bench.model, bench.tokenizer
    ways = {
        "prompt": Prompt(model, tokenizer, question),
        "prompt, generated": Prompt(model, tokenizer, question, method="generate"),
        "classifier": Classifier(model, tokenizer, question),
        "zero-shot likelihood": ZeroShot(model, tokenizer, bench.names),
        "zero-shot confidence": ZeroShot(model, tokenizer, bench.names, by="confidence"),
    }
    routed = {}
    for name, way in ways.items():
        chosen = way.choose(prompts)
        out[name], routed[name] = by(chosen), mean([a == b for a, b in zip(chosen, oracle, strict=True)])
    batch = prompts[: 96 if setup.is_tiny else 16]
    first: dict[str, list[float]] = {name: [] for name in ways}
    second, long = [], []
    for _ in range(5):  # interleaved, so that a busy moment falls on all of them
        for name, way in ways.items():
            first[name].append(clock(lambda way=way: way.choose(batch)))
        second.append(clock(lambda: answers(model, tokenizer, batch, oracle[: len(batch)], longest, len(batch))))
        long.append(clock(lambda: fixed_length(bench, batch, oracle[: len(batch)], LONG[setup.is_tiny])))
    alone: dict[str, list[float]] = {name: [] for name in ways}
    for prompt, expert in zip(batch[:8], oracle[:8], strict=True):
        for name, way in ways.items():
            pass_1 = clock(lambda way=way, prompt=prompt: way.choose([prompt]))
            alone[name].append(
                pass_1 / clock(lambda prompt=prompt, expert=expert: fixed_length(bench, [prompt], [expert], LONG[setup.is_tiny]))
            )
    median = statistics.median
    cost_alone = {name: round(median(shares), 4) for name, shares in alone.items()}
    cost = {name: round(median(seconds) / median(second), 4) for name, seconds in first.items()}
    cost_long = {name: round(median(seconds) / median(long), 4) for name, seconds in first.items()}
    return {
        "N": len(pairs),
        "accuracy": out,
        "routed_right": routed,
        "first_pass": cost,
        "first_pass_of_long": cost_long,
        "first_pass_of_one_long": cost_alone,
        "second_pass_seconds": round(median(second), 3),
    }


def fixed_length(bench: Bench, prompts: list[str], experts: list, length: int) -> None:
    """Decode `length` tokens for each prompt, whatever they are; as many as the model has positions for."""
    inputs = bench.tokenizer(prompts, padding=True, return_tensors="pt").to(bench.model.device)
    length = min(length, bench.model.config.max_position_embeddings - inputs["input_ids"].shape[1])
    with torch.inference_mode():
        bench.model.generate(**inputs, experts=experts, max_new_tokens=length, min_new_tokens=length, do_sample=False)


def clock(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def moved(setup: Setup, task: str, seed: int) -> dict:
    """Experts on a sibling of the built-in model (--sibling: 'web' trains it on, or a checkpoint's directory), with the shuffled control."""
    bench = Bench(setup)
    other = models.load(task, None, None) if task != "web" else sibling(120, 7)
    bank = t2.patch_model(other.model)
    found = alignment(bench.bank, bank)
    out = {}
    target = Bench.__new__(Bench)
    target.setup, target.model, target.tokenizer, target.bank = setup, other.model, other.tokenizer, bank
    for name, trained in zip(bench.names, setup.trained, strict=True):
        problems, expert = bench.rows(trained), bench.bank[name]
        arms = {"expert": transfer(expert, bank, bench.bank), "half": transfer(expert, bank, bench.bank, strength=0.5)}
        arms |= {f"shuffled {s}": transfer(shuffled(expert, s), bank, bench.bank) for s in range(3)}
        arms["half shuffled"] = transfer(shuffled(expert, 0), bank, bench.bank, strength=0.5)
        for arm, moved_ in arms.items():
            bank.add(f"{name} {arm}", moved_)
        wanted = [None, *(f"{name} {arm}" for arm in arms)]
        flat = target.right(trained, [row for row in problems for _ in wanted], wanted * len(problems))
        out[name] = {arm: mean(flat[k :: len(wanted)]) for k, arm in enumerate(["base", *arms])}
        out[name]["source"] = bench.accuracy(trained, problems, name)
    return {
        "N": len(problems),
        "alignment": {"leading": round(found.leading, 4), "all": round(found.all, 4), "chance": round(found.chance, 4)},
        "accuracy": out,
    }


def sibling(steps: int, seed: int) -> models.Loaded:
    """The built-in model, trained on for some steps on fresh documents: other weights, the same trunk."""
    from t2kernels.tiny import corpus, pretrain

    model, tokenizer = tiny.load()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    documents = pretrain.batches(corpus.web(9000 + seed))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20) * max(0.02, 1 - step / steps)
        ids, labels, mask, _ = next(documents)
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        counted = labels != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[counted])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.config._name_or_path = "t2kernels-tiny-sibling"
    return models.Loaded("sibling", model.eval(), tokenizer)


def speed(setup: Setup, task: str, seed: int) -> dict:
    """A CEM generation of 32 candidates over 10 examples: in one batch, a candidate at a time, and as the release does it, with dense weights
    rebuilt for each. Then the same candidates made of five experts instead of three. CPU seconds where there is one thread, else wall.
    """
    from t2kernels.adapt.mixing import Mixer

    bench = Bench(Setup(**{**asdict(setup), "shots": 10}))
    torch.set_num_threads(seed or 1)
    examples = bench.examples(task, 0)
    alpha = 1 / 3 + 0.5 * torch.randn(32, len(bench.names), 1, generator=torch.Generator().manual_seed(0))
    mixer = Mixer(bench.bank, bench.names)
    # Two more experts, whose alphas are 0: answers, and so the decoding, stay the same.
    five = Mixer(bench.bank, {f"{n}{i}": bench.bank[n] for i in range(2) for n in bench.names[: 3 if i == 0 else 2]})
    wide = torch.cat([alpha, torch.zeros(32, five.shape[0] - len(bench.names), 1)], 1)
    dense = models.load(setup.model, setup.dtype, setup.device).model
    factors = factors_of(bench.bank)
    now = time.process_time if torch.get_num_threads() == 1 and dense.device.type == "cpu" else time.perf_counter
    modes = {"reward": {"likelihood": False}, "both": {}}
    out: dict[str, dict] = {}
    with bench.bank.scratch(32) as rows:
        for mode, what in modes.items():
            work = {
                "batch": lambda what=what: examples.score(rows.write(mixer(alpha)), **what).answers,
                "batch of five experts": lambda what=what: examples.score(rows.write(five(wide)), **what).answers,
                "one at a time": lambda what=what: [examples.score(rows.write(mixer(a)), **what).answers[0] for a in alpha.split(1)],
                "rebuilt": lambda mode=mode: [rebuilt(dense, factors, mixer.expert(a), examples, mode) for a in alpha],
                "mixing": lambda: rows.write(five(wide)),
            }
            found = {name: do() for name, do in work.items()}
            if not found["batch"] == found["one at a time"] == found["batch of five experts"]:
                raise AssertionError("the same candidates answered differently in a batch and alone: their times cannot be compared")
            times: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(7):  # interleaved: a busy moment falls on all of them
                for name, do in work.items():
                    start = now()
                    do()
                    times[name].append(now() - start)
            seconds = {name: round(statistics.median(t), 4) for name, t in times.items()}
            added = statistics.median(b / a for a, b in zip(times["batch"], times["batch of five experts"], strict=True))
            out[mode] = {
                "seconds": seconds,
                "one_at_a_time_over_batch": round(seconds["one at a time"] / seconds["batch"], 2),
                "rebuilt_over_batch": round(seconds["rebuilt"] / seconds["batch"], 2),
                "five_over_three_experts": round(added, 4),
                "rebuilt_answers_equal": mean(
                    [a == b for x, y in zip(found["batch"], found["rebuilt"], strict=True) for a, b in zip(x, y, strict=True)]
                ),
            }
    return {"population": 32, "examples": 10, "threads": torch.get_num_threads(), "modes": out}


def rebuilt(dense, factors: dict, expert, examples: Examples, mode: str) -> list[str]:
    """One candidate as the release scores it: W' = U diag(sigma z) Vᵀ in every dense weight, then the answers (and likelihoods)."""
    rebuild(dense, factors, expert.z)
    tokenizer = examples.sampler.tokenizer
    written = answers(dense, tokenizer, examples.prompts, None, examples.sampler.max_new_tokens)
    if mode == "both":
        tokens, there = examples.gold
        with torch.no_grad():
            completion_logits(dense, Rollout(torch.cat([examples.ids, tokens], 1), torch.cat([examples.mask, there.long()], 1), there))
    return written


PARTS = {
    "experts": train_expert,
    "lora": train_lora,
    "routes": routes,
    "few": few,
    "mixed": mixed,
    "mixings": mixings,
    "transfer": moved,
    "speed": speed,
}


def cells(setup: Setup, parts: list[str], seeds: list[int], siblings: list[str]) -> list[list[tuple[str, str, int]]]:
    """(part, task, seed) of everything to do, in stages: a stage needs what the one before it made."""
    first = [("experts", t, 0) for t in setup.experts] if not setup.is_tiny else []
    first += [("lora", t, 0) for t in setup.trained]
    second = [("few", t, s) for t in setup.unseen for s in seeds] + [("routes", t, 0) for t in setup.unseen] + [("mixed", "", 0)]
    second += [("mixings", t, 0) for t in setup.unseen]
    if setup.is_tiny:
        second += [("transfer", s, 0) for s in siblings]
    stages = [
        first,
        second,
        [("speed", task, threads) for task in setup.unseen[:1] + setup.unseen[5:6] for threads in (1, 2)],
    ]  # times are taken when nothing else runs
    return [[cell for cell in stage if cell[0] in parts] for stage in stages]


def run(setup: Setup, part: str, task: str, seed: int) -> dict:
    start = time.perf_counter()
    row = PARTS[part](setup, task, seed)
    return {
        "model": setup.model,
        "part": part,
        "task": Path(task).stem,
        "seed": seed,
        **row,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny', a checkpoint's directory, or a model's id on the hub")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--trained", nargs="+", help="tasks with an expert, by name or .jsonl file  [tiny: math code reason; else gsm8k mbpp arc-easy]"
    )
    parser.add_argument("--unseen", nargs="+", help="tasks without  [tiny: its eight; else math humaneval arc-challenge]")
    parser.add_argument("--related", nargs="+", help="for each unseen task the trained one whose LoRA adapter is tried on it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=1000, help="test problems of a task, at most")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of RL, for adapters and experts")
    parser.add_argument("--iterations", type=int, help="CEM generations at most")
    parser.add_argument("--siblings", nargs="+", default=["web"], help="where experts of the tiny model are taken: 'web', or checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 1 on a GPU")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained adapters and experts are kept")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--again", action="store_true", help="run also what the results hold already")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.jsonl")
    given = parser.parse_args()
    same = ("model", "n", "shots", "steps", "iterations", "cache", "dtype", "device")
    chosen = {key: getattr(given, key) for key in same}
    if given.model != models.TINY:
        chosen |= {
            "trained": ("gsm8k", "mbpp", "arc-easy"),
            "unseen": ("math", "humaneval", "arc-challenge"),
            "related": ("gsm8k", "mbpp", "arc-easy"),
        }
    chosen |= {key: tuple(getattr(given, key)) for key in ("trained", "unseen", "related") if getattr(given, key)}
    setup, console = Setup(**chosen), Console()
    if len(setup.related) != len(setup.unseen):
        parser.error(f"--related names {len(setup.related)} tasks for {len(setup.unseen)} unseen ones; one for each is wanted")
    for name in (*setup.trained, *setup.unseen):
        tasks.load(name).split("test", 1)  # what is not there is said now, not after hours
    there = set() if given.again else {key(row) for row in read(given.out) if row["settings"] == settings(setup)}
    facts = machine(("torch", "transformers", "peft")) | {"settings": settings(setup), "jobs": given.jobs}
    for stage in cells(setup, given.parts, given.seeds, given.siblings):
        waiting = [
            c
            for c in stage
            if (setup.model, c[0], Path(c[1]).stem, c[2]) not in there and not (c[0] == "lora" and setup.adapter(c[1]).is_dir())
        ]
        waiting = [c for c in waiting if c[0] != "experts" or not setup.experts[c[1]].is_file()]
        jobs = 1 if stage and stage[0][0] == "speed" else given.jobs
        for done, row in enumerate(work(setup, waiting, jobs), 1):
            append(given.out, row | facts)
            shown = {k: v for k, v in row.items() if k in ("accuracy", "modes")}
            console.print(f"{done}/{len(waiting)} {row['part']} {row['task']} {row['seed']}: {row['seconds']} s {shown}", highlight=False)


def work(setup: Setup, waiting: list[tuple[str, str, int]], jobs: int):
    """Rows as they are done, by `jobs` processes, or in this one."""
    if jobs == 1:
        yield from (run(setup, *cell) for cell in waiting)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, setup, *cell) for cell in waiting]):
            yield future.result()


def settings(setup: Setup) -> dict:
    return {"n": setup.n, "shots": setup.shots, "steps": setup.steps, "iterations": setup.iterations}


def key(row: dict) -> tuple:
    return row["model"], row["part"], row["task"], row["seed"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
