"""A small model, experts, and what models with materialised weights answer; engines that serve it.

An engine takes half a minute to start, so a test shares it with all others of its file.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.rollout.generation import completion_logits, log_probs

NEW = 24  # tokens of an answer
LONG = "the quick brown fox jumps over the lazy dog again and again"  # longer than a block of the prefix cache
PROMPTS = ["47+38+59?", "rsx(gcaf)?", "hello world", "a", "zz 12345", LONG]
EXPERTS = 5
# Engines of this tier: eager, fp32, two slots for five experts, prompts prefilled in chunks, blocks of the prefix cache
# shorter than a prompt.
SMALL = dict(
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    block_size=32,
    disable_log_stats=True,
)


@dataclass
class World:
    """A checkpoint, its factors, experts, and the greedy answers of (expert, prompt), 0 being the base model."""

    model: Path
    factors: Path
    experts: dict[int, Path] = field(default_factory=dict)
    answers: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def pairs(self) -> list[tuple[str, int]]:
        return [(p, e) for p in PROMPTS for e in range(EXPERTS + 1)]


def answers_of(model, tokenizer, prompts=PROMPTS) -> list[list[int]]:
    out = []
    for p in prompts:
        ids = tokenizer(p, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        out.append(made[0, ids.shape[1] :].tolist())
    return out


def agrees_with_hf(drawn, model, bank, sampler, prompts, policies) -> None:
    """A greedy rollout of an engine has the tokens and the log-probabilities that HF gives under each policy."""
    ids, mask = sampler.encode(prompts, torch.device("cpu"))
    wanted = sampler.draw(model, ids, mask, 0.0, expert_ids=bank.ids(policies))
    assert drawn.completion_ids() == wanted.completion_ids()
    with torch.no_grad():
        logits = completion_logits(model, drawn, expert_ids=bank.ids(policies))
    told = log_probs(logits).gather(2, drawn.tokens[..., None])[..., 0]
    there = drawn.completion
    assert (told[there] - drawn.sampled[there]).abs().max() < 1e-3


def materialise(model, factors, expert) -> None:
    """Replace the weights of a model by U diag(sigma * z) Vᵀ."""
    with torch.no_grad():
        for name, z in expert.z.items():
            model.get_submodule(name).weight.copy_(factors[name].dense(z))


def make(folder: Path) -> World:
    """The built-in model with experts that change every component."""
    torch.set_num_threads(1)  # its matrices are small, and engines run beside it
    factors = t2.decompose(str(tiny.path()), folder / "factors")
    made = World(tiny.path(), folder / "factors")
    for e in range(EXPERTS + 1):
        model, tokenizer = tiny.load()
        if e:
            g = torch.Generator().manual_seed(100 + e)
            expert = t2.Expert.trained_on(
                factors, {n: 1 + 0.5 * torch.randn(r, generator=g) for n, r in factors.ranks.items()}
            )
            made.experts[e] = expert.save(folder / f"e{e}")
            materialise(model, factors, expert)
        for prompt, answer in zip(PROMPTS, answers_of(model, tokenizer), strict=True):
            made.answers[e, prompt] = answer
    for prompt in PROMPTS:
        assert len({tuple(made.answers[e, prompt]) for e in range(EXPERTS + 1)}) == EXPERTS + 1, (
            f"{prompt}: experts are not told apart"
        )
    return made


@contextlib.contextmanager
def engine(model, **arguments):
    """An offline engine, shut down at the end."""
    from vllm import LLM

    llm = LLM(str(model), **{**SMALL, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm, world, pairs, **settings):
    """vLLM's outputs for (prompt, expert) pairs; an expert is a number, or a request."""
    from vllm import SamplingParams

    from t2kernels.integrations.vllm import expert

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **settings)
    who = [None if e == 0 else expert(f"e{e}", world.experts[e]) if isinstance(e, int) else e for _, e in pairs]
    return llm.generate([p for p, _ in pairs], sampling, lora_request=who, use_tqdm=False)


def wrong(outputs, world, pairs) -> list:
    """The pairs that were not answered as the materialised model does."""
    return [
        (p, e)
        for (p, e), out in zip(pairs, outputs, strict=True)
        if list(out.outputs[0].token_ids) != world.answers[e, p]
    ]


def checkpoint_with(folder: Path, **config) -> None:
    """Change the config of a checkpoint."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
