"""Engines that draw completions, by name: "transformers", or what a package offers under `t2kernels.rollouts`.

An engine gets the policy as an `Expert` under a name with a version ("math@12"), and draws for rows that name it. A
version stays as it was published until it is dropped. A spec is NAME, or NAME:ADDRESS for an engine elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor, nn

from t2kernels import InputError, UnknownNameError
from t2kernels.experts.expert import Expert

from .generation import Rollout, Sampler

GROUP = "t2kernels.rollouts"
"""The entry points of engines: NAME = "package.module:make", with make(EngineContext) -> RolloutEngine."""
DEFAULT = "transformers"
"""`model.generate` of the model in training: it has one version of each expert, the present one."""


@dataclass(frozen=True)
class Draw:
    """How completions are drawn. temperature: 0 is greedy; samples: completions of each prompt, side by side

    seed: of this draw's random numbers; an engine that has its own generator may ignore it
    """

    temperature: float
    samples: int
    seed: int = 0


@dataclass(frozen=True)
class EngineContext:
    """What an engine is made from.

    model: the patched model in training, not wrapped; sampler: its tokens, ends and longest completion
    routing: expert names of rows -> arguments of the model's forward
    address: what stands behind "NAME:", or None; options: `SVFConfig.rollout_options`
    experts: how many train at once; seed: of the run
    """

    model: nn.Module
    sampler: Sampler
    routing: Callable[[Sequence[str | None]], dict[str, Tensor]]
    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 1
    seed: int = 0


class RolloutEngine(ABC):
    """Draws completions of published policies. One thread at a time calls it."""

    keeps_versions: bool = True
    """False: there is only the present policy, nothing is published, and names carry no version."""

    @abstractmethod
    def publish(self, policy: str, expert: Expert) -> int:
        """Make a policy known under a name that was never used before. Returns the bytes that were moved, all replicas
        together. Raises StateError that names the replica which did not take it."""

    @abstractmethod
    def draw(self, ids: Tensor, mask: Tensor, policies: Sequence[str | None], how: Draw) -> Rollout:
        """Completions of left-padded prompts, `how.samples` of each, side by side.

        ids, mask: [B, P] int64; policies: [B] published names, None: the base model
        Returns B * samples rows, with `sampled` where the sampler is not the trainer's own forward.
        """

    @abstractmethod
    def drop(self, policies: Sequence[str]) -> None:
        """Forget policies that nothing will ask for again."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds. It is not used again."""


class TransformersEngine(RolloutEngine):
    """`Sampler.draw` with the model in training."""

    keeps_versions = False

    def __init__(self, context: EngineContext) -> None:
        self.context: EngineContext = context

    def publish(self, policy: str, expert: Expert) -> int:
        """Nothing: the model in training is the policy."""
        return 0

    def draw(self, ids: Tensor, mask: Tensor, policies: Sequence[str | None], how: Draw) -> Rollout:
        """As `RolloutEngine.draw`; the random numbers are torch's."""
        of = self.context
        return of.sampler.draw(of.model, ids, mask, how.temperature, how.samples, **of.routing(policies))

    def drop(self, policies: Sequence[str]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


Maker = Callable[[EngineContext], RolloutEngine]
_MADE_BY: dict[str, Maker] = {DEFAULT: TransformersEngine}


def register_engine(name: str, make: Maker) -> None:
    """Add an engine, or replace one, in this process. Packages use the entry-point group `GROUP` instead."""
    _MADE_BY[name] = make


def engine_names() -> list[str]:
    """The names of all engines. It imports none of them."""
    return sorted({*_MADE_BY, *(point.name for point in entry_points(group=GROUP))})


def parse_spec(spec: str) -> tuple[str, str | None]:
    """(name, address or None) of "NAME" or "NAME:ADDRESS". Raises UnknownNameError with the names that there are."""
    name, colon, address = spec.partition(":")
    if name not in engine_names():
        raise UnknownNameError(
            f"rollout={spec!r}: there is no engine {name!r}; there are {', '.join(engine_names())} "
            "(an engine of another package is found once that package is installed)"
        )
    if colon and not address:
        raise InputError(f"rollout={spec!r} ends after the colon: wanted NAME, or NAME:ADDRESS")
    return name, address or None


def open_engine(spec: str, context: EngineContext) -> RolloutEngine:
    """Make the engine of a spec; `context.address` is that of the spec. Raises as `parse_spec`, and what it raises."""
    name, _ = parse_spec(spec)
    make = _MADE_BY.get(name)
    if make is None:
        make = next(point for point in entry_points(group=GROUP) if point.name == name).load()
    return make(context)
