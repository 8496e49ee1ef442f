"""`few_shot`: an expert made in the engine, from a few labelled prompts and the experts that are there (arXiv 2501.06252, section 3.2).

    z' = 1 + Σ_k alpha_k (z_k - 1)            alpha by the cross-entropy method of `t2kernels.adapt`

A candidate is a request for a mixture, and a generation one call of `generate` with every candidate's every example: continuous batching runs them together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2kernels.adapt.cem import CEMConfig, Found, cross_entropy_method
from t2kernels.adapt.examples import Scores, check_rows, rewarded, scorer_of
from t2kernels.adapt.few_shot import gain, is_better
from t2kernels.adapt.mixing import recorded
from t2kernels.experts.expert import Expert, find_file
from t2kernels.rollout.generation import Sampler

from .hooks import asks_for_experts
from .requests import expert

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

ONLY = {"score": "reward", "per": "expert", "mixing": "delta"}  # what a request for a mixture, answered in text, can be

OF_FACTORS = ("base_model", "revision", "fingerprint", "fingerprints")  # in a manifest


@dataclass
class Adapted:
    """What `few_shot` made.

    request: what `lora_request=` takes from now on: the new expert, or None, the base model, where the expert is not surely better
    file: where the expert was saved, in either case; found: what the search found
    gain, error: the mean reward of the examples' answers less that of the base model's, and its standard error over examples
    """

    request: LoRARequest | None
    file: Path
    found: Found
    gain: float
    error: float


def few_shot(
    llm: LLM,
    experts: Mapping[str, str | os.PathLike],
    rows: Sequence[Mapping],
    reward: Any,
    out: str | os.PathLike,
    *,
    name: str = "few-shot",
    caution: float | None = 2.0,
    max_new_tokens: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Adapted:
    """The mixture of `experts` whose answers to the examples are rewarded most, saved as an expert that this engine, or any, serves.

    llm: made with `engine_args`; its rows decide how many candidates take part in a step, all others wait in its queue
    experts: {name: file}; rows: dicts with a prompt (text or chat) and the columns that the reward takes
    reward: reward(prompts, completions, **columns), or a task; max_new_tokens: of an answer; None: the task's, else 64
    out: file of the new expert; name: of its requests
    caution: as in `t2kernels.adapt.FewShot`: its gain on the examples must be above so many of its standard errors; None: never mind the base model
    options: of `CEMConfig`: population=32, temperature=0.7, samples=4, ... The score is the reward, an alpha holds for a whole expert, and deltas are
        mixed. `seed` is that of the candidates; sampled answers are drawn as the engine's own seed has it

    Raises before any forward ValueError (other options, no experts or examples, a prompt that is too long, an engine without experts), ExpertError for a
    file that is no expert, ExpertMismatch for experts of different factors; OSError where `out` cannot be written.
    """
    config = CEMConfig(**{**ONLY, **options})
    for option, only in ONLY.items():
        if getattr(config, option) != only:
            raise ValueError(
                f"{option}={getattr(config, option)!r}; in an engine it is {only!r}: use t2kernels.adapt.search for others"
            )
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError(f"experts={experts!r}; wanted {{name: file}} with at least one")
    if not asks_for_experts(llm.llm_engine.vllm_config):
        raise ValueError("this engine serves no experts: make it with LLM(model, **engine_args(...))")
    population = Population(llm, experts, check_rows(rows), reward, max_new_tokens, config, name)

    def make(alpha: Tensor, **facts: Any) -> Expert:
        mixed = Expert.mix(list(zip(population.experts, alpha[:, 0].tolist(), strict=True)))
        # What else the experts' manifests have in common is about their training.
        facts |= {k: mixed.manifest[k] for k in OF_FACTORS if k in mixed.manifest}
        return Expert(
            mixed.z, {**recorded(list(experts), alpha, config.per, config.mixing), "name": name, **facts}, mixed.sketch
        )

    found = cross_entropy_method(population.score, (len(experts), 1), len(rows), make, config, progress)
    file = found.expert.save(Path(out).expanduser())
    request = expert(name, file)
    more, error = gain(population.answer([None, request]))
    return Adapted(request if is_better(more, error, caution) else None, file, found, more, error)


class Population:
    """Candidates as requests to an engine, scored by what they answer. Raises as `few_shot`."""

    def __init__(
        self,
        llm: LLM,
        experts: Mapping[str, str | os.PathLike],
        rows: Sequence[Mapping],
        reward: Any,
        max_new_tokens: int | None,
        config: CEMConfig,
        name: str,
    ):
        self.llm, self.rows, self.config, self.name = llm, rows, config, f"{name}/candidate"
        self.files = [find_file(Path(path).expanduser()).resolve() for path in experts.values()]
        if len(set(self.files)) < len(self.files):
            raise ValueError(f"experts={dict(experts)}: a file occurs twice")
        self.experts = [Expert.load(file) for file in self.files]
        Expert.mix([(e, 1.0) for e in self.experts])  # says which do not go together
        if reward is None:
            raise ValueError(
                "reward=None; wanted reward(prompts, completions, **columns), or a task: nothing else says what is right"
            )
        self.scorer, max_new_tokens = scorer_of(reward, rows, max_new_tokens)
        self.sampler = Sampler(None, llm.get_tokenizer(), max_new_tokens)
        self.sampler.limit = llm.llm_engine.vllm_config.model_config.max_model_len
        self.prompts = [row["prompt"] for row in rows]
        ids, mask = self.sampler.encode(self.prompts, torch.device("cpu"))
        self.tokens = [{"prompt_token_ids": row[there.bool()].tolist()} for row, there in zip(ids, mask, strict=True)]

    def score(self, alpha: Tensor) -> Iterable[Scores]:
        """What mixtures of alpha [P, E, 1] make of the examples."""
        candidates = [
            expert(self.name, dict(zip(self.files, weights, strict=True))) for weights in alpha[..., 0].tolist()
        ]
        try:
            yield self.answer(candidates)
        finally:  # the engine's host memory is for experts that are asked for again
            for number in {c.lora_int_id for c in candidates}:
                self.llm.llm_engine.remove_lora(number)

    def answer(self, requests: Sequence[LoRARequest | None]) -> Scores:
        """The rewards of P requests' answers to all examples, in one call of the engine."""
        from vllm import SamplingParams

        K, P, S = len(self.rows), len(requests), self.config.samples
        # No seeds of their own: on a CPU, vLLM 0.32 dies of a request with a seed whose prompt is read in parts, and each would be drawn alone.
        sampling = SamplingParams(
            temperature=self.config.temperature, max_tokens=self.sampler.max_new_tokens, n=S, detokenize=False
        )
        requested = [request for request in requests for _ in range(K)]
        drawn = self.llm.generate(self.tokens * P, sampling, lora_request=requested, use_tqdm=False)
        tokens = [one.token_ids for out in drawn for one in out.outputs]
        written = self.sampler.read(tokens, [prompt for prompt in self.prompts for _ in range(S)] * P)
        rewards, answers = rewarded(self.scorer, self.rows, written, S)
        return Scores(rewards, None, answers)
