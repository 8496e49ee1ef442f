"""Few-shot adaptation: search the mixture of experts that does best on a few labelled prompts (arXiv 2501.06252, 3.2).

    z' = 1 + Σ_k alpha_k (z_k - 1)            alpha ~ N(mean, std²), refitted to the elite of each generation

This is the cross-entropy method. A candidate is a row of the bank's table and a generation is one batch: P rows with K
examples each. Nothing is rebuilt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.experts.expert import Expert
from t2kernels.rollout.checks import check_setting

from .examples import Examples, Scores
from .mixing import Mixer

SCORES: tuple[str, ...] = ("reward", "likelihood", "both", "expected")
Score = Callable[[Tensor], Iterable[Scores]]
"""alpha [P, E, G] -> the scores of the P mixtures in order, in one batch or in several."""


@dataclass
class CEMConfig:
    """Settings of `search`.

    population: candidates of a generation; elite: the share of them that the next distribution is fitted to
    iterations: most generations
    patience: generations in a row without a better candidate, after which the search ends
    tolerance: the search also ends when every std is below it
    mean, std: of the first distribution of alphas; mean=None: 1 / E
    low, high: alphas are cut to this range
    per: an alpha of an expert holds for all of it ("expert"), for a block ("layer") or for a matrix ("matrix")
    mixing: "delta", "z", "normalised" or "logits" (see `Mixer`)
    score: "reward" of the answers, ties broken by the likelihood of right ones where they are known; "likelihood" of
        right answers, one forward without decoding; "both", reward + likelihood_weight * likelihood; "expected", the
        mean probability of the right option, all candidates equally sure, for examples with options
    temperature, samples: of the answers that are rewarded; 0 is greedy
    keep_best: True to put the best candidate so far into each generation
    take: the result is the centre of the last distribution ("mean") or the best candidate ("best")
    seed: of the candidates
    known: True to put the base model and each expert alone into the first generation, at most half of it
    penalty: a score loses penalty / K * sum of alpha² (their mean over the G parts), K examples: a normal prior around
        the base model
    Raises ValueError for a value that is not one of these.
    """

    population: int = 32
    elite: float = 0.2
    iterations: int = 8
    patience: int = 3
    tolerance: float = 0.02
    mean: float | None = None
    std: float = 0.5
    low: float | None = None
    high: float | None = None
    per: str = "expert"
    mixing: str = "delta"
    score: str = "both"
    likelihood_weight: float = 0.01
    temperature: float = 0.0
    samples: int = 1
    keep_best: bool = True
    take: str = "mean"
    seed: int = 0
    known: bool = False
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("population", "iterations", "patience", "samples"):
            check_setting(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_setting(0 < self.elite <= 1, "elite", self.elite, "a share above 0, at most 1")
        check_setting(self.std > 0, "std", self.std, "more than 0")
        check_setting(self.penalty >= 0, "penalty", self.penalty, "0 or more")
        check_setting(self.score in SCORES, "score", self.score, ", ".join(map(repr, SCORES)))
        check_setting(self.take in ("mean", "best"), "take", self.take, "'mean' or 'best'")
        check_setting(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        one = self.samples == 1 or self.temperature > 0
        check_setting(one, "samples", self.samples, "1 at temperature 0, where all answers to a prompt are the same")
        ordered = self.low is None or self.high is None or self.low < self.high
        check_setting(ordered, "low", self.low, f"less than high={self.high!r}")

    @classmethod
    def options(cls, **changes: Any) -> CEMConfig:
        """The settings for examples that are answered by the likeliest option. `changes` replace single settings.

        16 candidates, at most 3 generations and none after one that brought nothing, score "expected" less a penalty of
        .25, and the best candidate. Accuracy on 16 examples has 17 values, which many candidates share; the likelihood
        asks how sure a candidate is, which changes no choice; and the centre of an elite with several peaks may lie
        on none of them.
        """
        settings = {
            "population": 16,
            "iterations": 3,
            "patience": 1,
            "score": "expected",
            "penalty": 0.25,
            "known": True,
            "take": "best",
        }
        return cls(**{**settings, **changes})

    @classmethod
    def paper(cls, **changes: Any) -> CEMConfig:
        """The settings of the authors' release. `changes` replace single settings.

        32 candidates, elite 0.2, an alpha for each expert and matrix in [0, 1] from .5 ± .5, mixing of logits, at most
        50 generations with the best candidate so far in each and taken at the end, accuracy of greedy answers with ties
        broken by likelihood.
        """
        settings = {
            "iterations": 50,
            "patience": 50,
            "mean": 0.5,
            "std": 0.5,
            "low": 0.0,
            "high": 1.0,
            "per": "matrix",
            "mixing": "logits",
            "score": "reward",
            "take": "best",
        }
        return cls(**{**settings, **changes})

    @property
    def elites(self) -> int:
        """The number of candidates that the next distribution is fitted to."""
        return max(1, min(self.population, round(self.elite * self.population)))


@dataclass
class Found:
    """The result of a search.

    alpha: [E, G]; expert: the mixture as an `Expert`, whose manifest records it
    scores: the best fitness of each generation
    stopped: why the search ended; candidates: how many were scored; seconds: how long it took
    answers: for each example, the right answers that candidates wrote
    """

    alpha: Tensor
    expert: Expert
    scores: list[float]
    stopped: str
    candidates: int
    seconds: float
    answers: list[list[str]] = field(default_factory=list, repr=False)


def search(
    examples: Examples,
    experts: Sequence[str] | Mapping[str, Expert],
    name: str = "few-shot",
    config: CEMConfig | None = None,
    logits: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """Search the mixture of `experts` that does best on `examples`, by the cross-entropy method.

    experts: names in the bank, or {name: Expert}
    name: of the expert that is made; it is returned, not put into the bank
    config: None: `CEMConfig.options()` for examples with options, else `CEMConfig()`
    logits: as of `Mixer`
    progress: called with the number of generations done and the best fitness of the last

    Raises ValueError before any forward: no experts, examples without the reward or the right answers that the score
    needs, a population that does not fit into the bank.
    """
    config = config or (CEMConfig() if examples.chooser is None else CEMConfig.options())
    mixer = Mixer(examples.bank, experts, config.per, config.mixing, logits)
    rewarded = config.score in ("reward", "both")
    if rewarded and examples.scorer is None:
        raise InputError(
            f"score={config.score!r} needs a reward, and these examples have none: use score='likelihood', or give one"
        )
    if config.score != "reward" and examples.gold is None:
        raise InputError(
            f"score={config.score!r} needs gold answers, and these examples have none: use score='reward', or give some"
        )
    if config.score == "expected" and examples.chooser is None:
        raise InputError(
            "score='expected' needs examples with options, of a task with check 'choice'; these are answered in text: "
            "use another score"
        )
    chunk = min(config.population, examples.chunk(config.samples))
    if chunk > examples.bank.rows - 1:
        raise InputError(
            f"{chunk} candidates at once need {chunk + 1} rows, and the bank has {examples.bank.rows}: "
            f"patch_model(..., rows={chunk + 1})"
        )
    # The reward of the likeliest option costs no forward; its right answers are kept.
    rewarded = rewarded or config.score == "expected"
    with examples.bank.scratch(chunk) as rows:

        def score(alpha: Tensor) -> Iterable[Scores]:
            for part in alpha.split(chunk):
                yield examples.score(rows.write(mixer(part)), config.temperature, config.samples, reward=rewarded)

        return cross_entropy_method(
            score,
            mixer.shape,
            len(examples),
            lambda *of, **facts: mixer.expert(*of, name=name, **facts),
            config,
            progress,
        )


def cross_entropy_method(
    score: Score,
    shape: tuple[int, int],
    examples: int,
    make: Callable[..., Expert],
    config: CEMConfig,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """The search itself, for any way to score candidates.

    score: alpha [P, E, G] -> the scores of the P mixtures
    shape: (E, G); examples: their number
    make: (alpha [E, G], **manifest) -> the expert of that mixture
    config, progress: as of `search`
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    E, G = shape
    mean = torch.full((E, G), 1 / E if config.mean is None else config.mean, dtype=torch.float32)
    std = torch.full((E, G), float(config.std), dtype=torch.float32)
    best, best_key = mean.clone(), None
    history: list[float] = []
    since, candidates, stopped = 0, 0, f"{config.iterations} generations"
    answers: list[dict[str, None]] = [{} for _ in range(examples)]
    bounded = config.low is not None or config.high is not None
    alone = torch.cat([torch.zeros(1, E), torch.eye(E)])[: config.population // 2, :, None].expand(-1, -1, G)
    for step in range(config.iterations):
        alpha = mean + std * torch.randn(config.population, E, G, generator=generator, dtype=torch.float32)
        if config.known and not step and config.population > 1:
            alpha[1 : 1 + len(alone)] = alone
        alpha = alpha.clamp(config.low, config.high) if bounded else alpha
        alpha[0] = mean
        if config.keep_best and step and config.population > 1:
            alpha[1] = best
        keys = _fitness(score(alpha), alpha, config, answers)
        candidates += len(alpha)
        order = sorted(range(len(alpha)), key=lambda i: keys[i], reverse=True)
        top = order[0]
        since = 0 if best_key is None or keys[top] > best_key else since + 1
        if best_key is None or keys[top] >= best_key:
            best, best_key = alpha[top].clone(), keys[top]
        history.append(keys[top][0])
        elite = alpha[order[: config.elites]]
        mean, std = elite.mean(0), elite.std(0, unbiased=len(elite) > 1)
        if progress:
            progress(step + 1, history[-1])
        if std.max() < config.tolerance:
            stopped = f"converged: std below {config.tolerance}"
            break
        if since >= config.patience:
            stopped = f"nothing better in {since} generations"
            break
    chosen = best if config.take == "best" else mean
    if config.take == "best" and not config.temperature and best_key is not None:
        final = best_key
    else:
        final = _fitness(score(chosen[None]), chosen[None], config, answers)[0]
    facts = {
        "search": dataclasses.asdict(config),
        "examples": examples,
        "score": final[0],
        "stopped": stopped,
        "candidates": candidates,
    }
    return Found(
        chosen,
        make(chosen, **facts),
        history,
        stopped,
        candidates,
        time.perf_counter() - start,
        [list(a) for a in answers],
    )


def _fitness(
    batches: Iterable[Scores], alpha: Tensor, config: CEMConfig, answers: list[dict[str, None]]
) -> list[tuple[float, float]]:
    """(fitness, tie-breaker) of each candidate. Right answers are added to `answers`."""
    keys: list[tuple[float, float]] = []
    for scores in batches:
        keys += _keys(scores, config)
        if scores.answers is not None:
            for written, right in zip(scores.answers, (scores.rewards > 0).tolist(), strict=True):
                for i, (text, good) in enumerate(zip(written, right, strict=True)):
                    if good:
                        answers[i // config.samples].setdefault(text if isinstance(text, str) else text[-1]["content"])
    lost = config.penalty / len(answers) * alpha.square().sum(1).mean(1)
    return [(round(a - b, 6), tie) for (a, tie), b in zip(keys, lost.tolist(), strict=True)]


def _keys(scores: Scores, config: CEMConfig) -> list[tuple[float, float]]:
    """(fitness, tie-breaker) of each candidate, from the mean reward and the likelihood."""
    zero = torch.zeros(len(scores.rewards if scores.rewards is not None else scores.likelihood), dtype=torch.float32)
    reward = zero if scores.reward is None else scores.reward
    likelihood = zero if scores.likelihood is None else scores.likelihood
    if config.score == "expected":
        first = scores.expected.mean(1)
    else:
        weight = {"reward": 0.0, "both": config.likelihood_weight}.get(config.score)
        first = likelihood if weight is None else reward + weight * likelihood
    return list(zip(first.tolist(), likelihood.tolist(), strict=True))
