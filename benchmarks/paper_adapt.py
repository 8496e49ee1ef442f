"""Parts of paper.py: experts and adapters of the trained tasks; how prompts of unseen tasks, and of mixed traffic, find
their expert."""

from __future__ import annotations

import statistics
import time

import torch
from paper_setup import Bench, Setup, clock, mean
from rl import lora, prepare
from rl import run as run_rl

from t2kernels.adapt import CEMConfig, Classifier, FewShot, Prompt, Router, ZeroShot, labelled, refine, shuffled
from t2kernels.adapt.refinement import supervise
from t2kernels.cli import models
from t2kernels.evaluation import answers
from t2kernels.rollout.generation import Sampler
from t2kernels.train import SVFConfig, SVFTrainer

LONG = {False: 128, True: 96}  # tokens of a long answer; the built-in model has 128 positions


def trained(setup: Setup, cell: str, seed: int) -> dict:
    """What an arm of rl.py gains on a trained task of the built-in model: "task:arm"."""
    task, _, arm = cell.partition(":")
    return run_rl(task, arm, seed, setup.steps, None, lambda: None)


def train_expert(setup: Setup, task: str, seed: int) -> dict:
    """An expert of a trained task by the release's settings, or the classification expert. Kept in the cache; the
    built-in model ships its own."""
    path = setup.experts[task]
    bench = Bench(setup, experts=False, rows=4)
    data = (
        setup.task(task)
        if task != "classify"
        else labelled(dict(zip(bench.question.labels, map(setup.task, setup.trained), strict=False)), bench.question)
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
    """A LoRA adapter of a trained task by the same RL as in rl.py (tiny), or by likelihood of the answers (another
    model)."""
    start = time.process_time()
    if setup.is_tiny:
        trainer, numbers = prepare(task, "lora r=16", seed, setup.steps)
        trainer.train()
        trainer.model.save_pretrained(setup.adapter(task))
        return {"numbers": numbers, "steps": setup.steps, "cpu_seconds": round(time.process_time() - start, 1)}
    loaded = models.load(setup.model, setup.dtype, setup.device)
    model = lora(loaded.model, 16, seed)
    data = setup.task(task)
    work = [(row["prompt"], setup.gold(row), 1.0) for row in data.split("train")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    supervise(
        model,
        Sampler(model, loaded.tokenizer, data.max_new_tokens),
        parameters,
        work,
        setup.steps,
        2e-4,
        batch=16,
        seed=seed,
    )
    model.save_pretrained(setup.adapter(task))
    return {"numbers": sum(p.numel() for p in parameters), "steps": setup.steps}


def routes(setup: Setup, task: str, seed: int) -> dict:
    """Every expert on an unseen task, every way to choose one for each prompt, and the LoRA adapter of the related
    task."""
    import peft

    bench = Bench(setup)
    problems = bench.rows(task)
    prompts = [row["prompt"] for row in problems]
    experts = [None, *bench.names]
    flat = bench.right(task, [row for row in problems for _ in experts], experts * len(problems))
    right = {name: flat[k :: len(experts)] for k, name in enumerate(experts)}
    out = {str(name or "base"): mean(right[name]) for name in experts}
    model, tokenizer = bench.model, bench.tokenizer
    judges = {
        "prompt": Prompt(model, tokenizer, bench.question),
        "classifier": Classifier(model, tokenizer, bench.question),
    }
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
    by_task = dict(zip(setup.trained, map(setup.task, setup.trained), strict=True))

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
            judge.fit_margin(bench.rows(task, "train", setup.shots, 500 + s), setup.task(task))
            few.append(by(judge.choose(prompts)))
        out[f"{name}, margin by shots"] = few
    related = dict(zip(setup.unseen, setup.related, strict=True))[task]
    loaded = models.load(setup.model, setup.dtype, setup.device)
    bench.model = peft.PeftModel.from_pretrained(loaded.model, setup.adapter(related)).eval()
    out["lora"] = mean(bench.right(task, problems, None))
    return {"N": len(problems), "related": related, "accuracy": out}


def few(setup: Setup, task: str, seed: int) -> dict:
    """CEM on a few examples, and on the same ones its controls: the best single expert, shuffled experts, LoRA,
    gradient steps from CEM's point."""
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
        "normalised": CEMConfig(mixing="normalised", **free),
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
    prompts, longest = [row["prompt"] for _, _, row in pairs], max(setup.task(t).max_new_tokens for t in setup.trained)
    experts = [None, *bench.names]
    flat = answers(
        bench.model,
        bench.tokenizer,
        [p for p in prompts for _ in experts],
        experts * len(prompts),
        longest,
        512 if setup.is_tiny else 64,
    )
    right = {}
    for k, name in enumerate(experts):
        given = flat[k :: len(experts)]
        right[name] = [
            setup.task(t).reward([row["prompt"]], [text], **{key: [v] for key, v in row.items() if key != "prompt"})[0]
            > 0
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
                pass_1
                / clock(
                    lambda prompt=prompt, expert=expert: fixed_length(bench, [prompt], [expert], LONG[setup.is_tiny])
                )
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
