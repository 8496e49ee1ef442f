"""`refine`: gradient steps on z from where a search ended, on the same few examples. Not in the paper.

    maximise (1/K) Σ_i mean_y log p(y | x_i; z)        y: right completions of example i

The right completions are given, or candidates of the search wrote them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from t2kernels import InputError
from t2kernels.experts.expert import Expert
from t2kernels.rollout.chat import AnyPrompt
from t2kernels.rollout.generation import Rollout, Sampler, completion_logits, log_probs
from t2kernels.rollout.modes import eval_mode, frozen

from .examples import Examples, encode_completions


def refine(
    examples: Examples,
    completions: Sequence[Sequence[str]],
    start: Expert | None = None,
    name: str = "refined",
    steps: int = 15,
    lr: float = 0.005,
    batch: int = 32,
    seed: int = 0,
) -> Expert:
    """Train an expert to make right completions of the examples likelier. It is returned, not put into the bank.

    completions: for each example, texts that are right, such as `Found.answers` of a search or [[gold], ...]; an
        example without any is left out
    start: where z starts; None: the base model
    steps, lr, batch, seed: as in `supervise`

    Raises ValueError before any step: a count that differs from the examples', no completion at all, a name that is in
    the bank.
    """
    if len(completions) != len(examples):
        raise InputError(f"{len(completions)} lists of completions for {len(examples)} examples; wanted one for each")
    pairs = [(i, text) for i, texts in enumerate(completions) for text in texts]
    if not pairs:
        raise InputError(
            "no example has a right completion to learn from: give gold answers, or search with samples at a "
            "temperature above 0"
        )
    model, bank = examples.model, examples.bank
    count = {i: len(texts) for i, texts in enumerate(completions)}
    with frozen(model):
        parameters = bank.start_training(name, init=start)
        try:
            row = bank.ids(name)
            work = [(examples.prompts[i], text, 1 / count[i]) for i, text in pairs]
            supervise(model, examples.sampler, parameters, work, steps, lr, batch, seed, expert_ids=row)
            del row
        except BaseException:
            bank.stop_training(name)
            bank.remove(name)
            raise
    made = bank.stop_training(
        name, name=name, refined={"steps": steps, "learning_rate": lr, "completions": len(pairs), "seed": seed}
    )
    bank.remove(name)
    return Expert(made.z, {**(start.manifest if start is not None else {}), **made.manifest}, made.sketch)


def supervise(
    model: nn.Module,
    sampler: Sampler,
    parameters: Sequence[nn.Parameter],
    work: Sequence[tuple[AnyPrompt, str, float]],
    steps: int,
    lr: float,
    batch: int = 32,
    seed: int = 0,
    **routing: torch.Tensor,
) -> None:
    """Maximise Σ weight log p(completion | prompt) over `parameters`, without dropout.

    work: (prompt, completion, weight); if there are more than `batch`, each step draws `batch` of them
    steps, lr: of Adam; the rate goes from lr to 5 % of it in a straight line, the gradient norm is cut at 1
    routing: `expert_ids` of the forwards
    """
    r, device = random.Random(seed), parameters[0].device
    optimiser = torch.optim.Adam(parameters, lr=lr)
    with eval_mode(model):
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * max(0.05, 1 - step / steps)
            picked = work if len(work) <= batch else r.sample(work, batch)
            ids, mask = sampler.encode([prompt for prompt, _, _ in picked], device)
            tokens, there = encode_completions(sampler.tokenizer, [text for _, text, _ in picked], device)
            rollout = Rollout(torch.cat([ids, tokens], 1), torch.cat([mask, there.long()], 1), there)
            found = log_probs(completion_logits(model, rollout, **routing)).gather(-1, tokens[..., None])[..., 0]
            weights = torch.tensor([weight for _, _, weight in picked], dtype=torch.float32, device=device)
            loss = -(weights * torch.where(there, found, 0).sum(1)).sum() / weights.sum()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
