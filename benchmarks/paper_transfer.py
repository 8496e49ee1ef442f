"""A part of paper.py: experts of the built-in model on a sibling of it, with the shuffled control."""

from __future__ import annotations

import torch
from paper_setup import Bench, Setup, mean

import t2kernels as t2
from t2kernels import tiny
from t2kernels.adapt import alignment, shuffled, transfer
from t2kernels.cli import models


def moved(setup: Setup, task: str, seed: int) -> dict:
    """Experts on a sibling of the built-in model (--sibling: 'web' trains it on, or a checkpoint's directory), with the
    shuffled control."""
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
