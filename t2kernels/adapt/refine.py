"""`refine`: a few gradient steps on z from where a search ended, on the same few examples. Not in the paper.

maximise (1/K) Σ_i mean_y log p(y | x_i; z)        y: right completions of example i, given, or written by candidates of the search
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ..expert import Expert
from ..train.loss import log_probs
from ..train.rollout import Rollout, completion_logits
from .examples import Examples, encode_completions


def refine(
    examples: Examples,
    completions: Sequence[Sequence[str]],
    start: Expert | None = None,
    name: str = "refined",
    steps: int = 30,
    lr: float = 0.01,
    decay: float = 0.0,
    batch: int = 32,
    seed: int = 0,
) -> Expert:
    """An expert that makes right completions of the examples likelier; returned, not put into the bank.

    completions: for each example, texts that are right; an example without any is left out. `Found.answers` of a search, or [[gold], ...]
    start: where z starts; None: the base model. decay: pull towards where it started, per step, of the learning rate
    Adam with a straight decline of the learning rate to 5 %, gradient norm cut at 1.

    Raises ValueError before any step: a count that differs from the examples', no completion at all, a name that is in the bank.
    """
    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} lists of completions for {len(examples)} examples; wanted one for each")
    pairs = [(i, text) for i, texts in enumerate(completions) for text in texts]
    if not pairs:
        raise ValueError(
            "no example has a right completion to learn from: give gold answers, or search with samples at a temperature above 0"
        )
    model, bank, sampler = examples.model, examples.bank, examples.sampler
    r, count = random.Random(seed), {i: len(texts) for i, texts in enumerate(completions)}
    training = model.training
    frozen = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    parameters = bank.start_training(name, init=start)
    try:
        origin = [p.detach().clone() for p in parameters]
        optimiser = torch.optim.Adam(parameters, lr=lr)
        row = bank.ids(name)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * max(0.05, 1 - step / steps)
            picked = pairs if len(pairs) <= batch else r.sample(pairs, batch)
            ids, mask = sampler.encode([examples.prompts[i] for i, _ in picked], bank.device)
            tokens, there = encode_completions(sampler.tokenizer, [text for _, text in picked], bank.device)
            rollout = Rollout(torch.cat([ids, tokens], 1), torch.cat([mask, there.long()], 1), there)
            found = log_probs(completion_logits(model, rollout, expert_ids=row)).gather(-1, tokens[..., None])[..., 0]
            weights = torch.tensor([1 / count[i] for i, _ in picked], device=found.device)
            loss = -(weights * torch.where(there, found, 0).sum(1)).sum() / weights.sum()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if decay:
                with torch.no_grad():
                    for p, p0 in zip(parameters, origin, strict=True):
                        p.lerp_(p0, optimiser.param_groups[0]["lr"] * decay)
        del row
    except BaseException:
        bank.stop_training(name)
        bank.remove(name)
        raise
    finally:
        model.train(training)
        for p, needed in frozen.items():
            p.requires_grad_(needed)
    made = bank.stop_training(name, name=name, refined={"steps": steps, "learning_rate": lr, "completions": len(pairs), "seed": seed})
    bank.remove(name)
    return Expert(made.z, {**(start.manifest if start is not None else {}), **made.manifest}, made.sketch)
