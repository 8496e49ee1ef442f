"""`few_shot`: an expert made in the engine, from a few labelled prompts and other experts (arXiv 2501.06252, 3.2).

    z' = 1 + Σ_k alpha_k (z_k - 1)            alpha by the cross-entropy method of `t2kernels.adapt`

A candidate is a request for a mixture. A generation is one call of `generate` with every example of every candidate,
which continuous batching runs together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.adapt.cem import CEMConfig, Found, cross_entropy_method
from t2kernels.adapt.examples import Scores, check_rows, rewarded, scorer_of
from t2kernels.adapt.few_shot import gain, is_better
from t2kernels.adapt.mixing import recorded
from t2kernels.experts.expert import Expert
from t2kernels.experts.files import require_file
from t2kernels.rollout.generation import Sampler

from .requests import Source, expert
from .support import asks_for_experts

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

ONLY = {"score": "reward", "per": "expert", "mixing": "delta"}
"""The only values of these options that a request for a mixture can have: it is answered in text."""
OF_FACTORS = ("base_model", "revision", "fingerprint", "fingerprints")
"""The entries of a manifest that name the factors."""


@dataclass
class Adapted:
    """What `few_shot` made.

    request: the value for `lora_request=` from now on: the new expert, or None, the base model, if the expert is not
        surely better
    file: the new expert's file, written in either case; found: the result of the search
    gain: mean reward of the examples' answers less that of the base model's; error: its standard error over examples
    """

    request: LoRARequest | None
    file: Path
    found: Found
    gain: float
    error: float


def few_shot(
    llm: LLM,
    experts: Mapping[str, Source],
    rows: Sequence[Mapping[str, Any]],
    reward: Any,
    out: Source,
    *,
    name: str = "few-shot",
    caution: float | None = 2.0,
    max_new_tokens: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Adapted:
    """Find the mixture of `experts` whose answers to the examples get the largest reward, and save it as an expert.

    llm: made with `engine_args`; its rows limit how many candidates take part in a step, the others wait in its queue
    experts: {name: file}; rows: dicts with a prompt (text or chat) and the columns that the reward takes
    reward: reward(prompts, completions, **columns), or a task
    out: file of the new expert, which this engine or any other can serve; name: of its requests
    caution: as in `t2kernels.adapt.FewShot`: the gain on the examples must be above this many of its standard errors;
        None: always take the new expert
    max_new_tokens: of an answer; None: the task's, else 64
    progress: called after each generation with its number and its score
    options: of `CEMConfig`: population=32, temperature=0.7, samples=4, ... The score is the reward, an alpha holds for
        a whole expert, and deltas are mixed. `seed` is that of the candidates; sampled answers use the engine's own
        seed

    Raises, before any forward, ValueError (other options, no experts or examples, a prompt that is too long, an engine
    without experts), ExpertError (a file that is not an expert), ExpertMismatch (experts of different factors). Raises
    OSError if `out` cannot be written.
    """
    config = CEMConfig(**{**ONLY, **options})
    for option, only in ONLY.items():
        if getattr(config, option) != only:
            raise InputError(
                f"{option}={getattr(config, option)!r}; in an engine it is {only!r}: "
                "use t2kernels.adapt.search for others"
            )
    if not isinstance(experts, Mapping) or not experts:
        raise InputError(f"experts={experts!r}; wanted {{name: file}} with at least one")
    if not asks_for_experts(llm.llm_engine.vllm_config):
        raise InputError("this engine serves no experts: make it with LLM(model, **engine_args(...))")
    population = Population(llm, experts, check_rows(rows), reward, max_new_tokens, config, name)

    def make(alpha: Tensor, **facts: Any) -> Expert:
        mixed = Expert.mix(list(zip(population.experts, alpha[:, 0].tolist(), strict=True)))
        # Other entries that the experts' manifests have in common describe their training.
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
    """Candidates as requests to an engine, scored by their answers.

    Takes the arguments of `few_shot`, and raises as it does.
    """

    llm: LLM
    rows: Sequence[Mapping[str, Any]]
    config: CEMConfig
    name: str
    files: list[Path]
    experts: list[Expert]
    scorer: Any
    sampler: Sampler
    prompts: list[Any]

    def __init__(
        self,
        llm: LLM,
        experts: Mapping[str, Source],
        rows: Sequence[Mapping[str, Any]],
        reward: Any,
        max_new_tokens: int | None,
        config: CEMConfig,
        name: str,
    ):
        self.llm, self.rows, self.config, self.name = llm, rows, config, f"{name}/candidate"
        self.files = [require_file(path).resolve() for path in experts.values()]
        if len(set(self.files)) < len(self.files):
            raise InputError(f"experts={dict(experts)}: a file occurs twice")
        self.experts = [Expert.load(file) for file in self.files]
        Expert.mix([(e, 1.0) for e in self.experts])  # raises for experts that do not go together
        if reward is None:
            raise InputError(
                "reward=None; wanted reward(prompts, completions, **columns), or a task: "
                "nothing else says what is right"
            )
        self.scorer, max_new_tokens = scorer_of(reward, rows, max_new_tokens)
        self.sampler = Sampler(None, llm.get_tokenizer(), max_new_tokens)
        self.sampler.limit = llm.llm_engine.vllm_config.model_config.max_model_len
        self.prompts = [row["prompt"] for row in rows]
        ids, mask = self.sampler.encode(self.prompts, torch.device("cpu"))
        self.tokens: Any = [
            {"prompt_token_ids": row[there.bool()].tolist()} for row, there in zip(ids, mask, strict=True)
        ]

    def score(self, alpha: Tensor) -> Iterable[Scores]:
        """The scores of mixtures alpha [P, E, 1] on the examples."""
        candidates = [
            expert(self.name, dict(zip(self.files, weights, strict=True))) for weights in alpha[..., 0].tolist()
        ]
        try:
            yield self.answer(candidates)
        finally:  # nobody asks for a candidate again: make room in the engine's host memory
            for number in {c.lora_int_id for c in candidates}:
                self.llm.llm_engine.remove_lora(number)

    def answer(self, requests: Sequence[LoRARequest | None]) -> Scores:
        """The rewards of P requests' answers to all examples, in one call of the engine."""
        from vllm import SamplingParams

        K, P, S = len(self.rows), len(requests), self.config.samples
        # Requests have no seeds of their own. On a CPU, vLLM 0.32 dies of a request with a seed whose prompt is read in
        # parts; and a request with a seed is sampled alone, not with the batch.
        sampling = SamplingParams(
            temperature=self.config.temperature, max_tokens=self.sampler.max_new_tokens, n=S, detokenize=False
        )
        requested: Any = [request for request in requests for _ in range(K)]
        drawn = self.llm.generate(self.tokens * P, sampling, lora_request=requested, use_tqdm=False)
        tokens = [one.token_ids for out in drawn for one in out.outputs]
        texts = self.sampler.read(tokens, [prompt for prompt in self.prompts for _ in range(S)] * P)
        rewards, answers = rewarded(self.scorer, self.rows, texts, S)
        return Scores(rewards, None, answers)
