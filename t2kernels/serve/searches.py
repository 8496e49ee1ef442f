"""An expert made by a call: the mixture that does best on a few labelled prompts, searched between two steps of generation
(Transformer², arXiv 2501.06252, section 3.2, "few-shot adaptation").
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from t2kernels.adapt import CEMConfig, Examples, FewShot
from t2kernels.experts.expert import Expert
from t2kernels.serve.http.errors import APIError, bad

from .registry import MOST_IN_A_MIXTURE, Chosen

if TYPE_CHECKING:
    from .app import Service

MEMORY = 1 << 30
"""Bytes that the search may take beside the weights and the KV cache."""
MOST_TOKENS = 1 << 19
"""Of one generation of the search, over all candidates and examples: the search can be stopped between generations only."""


class Example(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str | list[dict[str, Any]] = Field(min_length=1)
    answer: str = Field(min_length=1)


class FewShotRequest(BaseModel):
    """experts: names to mix; examples: prompts, text or messages, with the answer that the model should give, as it should write it
    score: "likelihood" of the answers, "exact" match of greedy ones, or "both"; population, iterations, per, seed: of `CEMConfig`
    caution: how many standard errors above the base model it must be, where answers are matched; where they are not it must be above
    """

    model_config = ConfigDict(extra="forbid")

    experts: list[str] = Field(min_length=1, max_length=MOST_IN_A_MIXTURE)
    examples: list[Example] = Field(min_length=1, max_length=64)
    score: Literal["likelihood", "exact", "both"] = "likelihood"
    population: int = Field(16, ge=2, le=64)
    iterations: int = Field(8, ge=1, le=20)
    per: Literal["expert", "layer", "matrix"] = "expert"
    caution: float = Field(2.0, ge=0, le=10)
    seed: int = Field(0, ge=0, lt=1 << 63)
    replace: bool = False

    def config(self) -> CEMConfig:
        score = "reward" if self.score == "exact" else self.score
        return CEMConfig(
            population=self.population, iterations=self.iterations, per=self.per, score=score, seed=self.seed
        )


class FewShots:
    """Makes one expert at a time. While it searches nothing is generated: requests that run go on afterwards, new ones wait.

    seconds: that waiting for a row and the search may take, each; looked at between generations of the search
    """

    def __init__(self, service: Service, seconds: float):
        self.service, self.seconds = service, seconds
        self._busy = False

    async def make(self, name: str, asked: FewShotRequest) -> tuple[Expert, dict]:
        """The expert, which is nowhere yet, and what to say of the search.

        Raises APIError: 400 unknown experts, or examples that cannot be; 409 another search runs; 422 not better than the base model;
        503 too long, or shutting down. Then nothing has changed.
        """
        experts, engine = self.service.experts, self.service.engine
        if self._busy:
            raise APIError(
                409, "another few-shot expert is being made; try again later", "busy", headers={"Retry-After": "5"}
            )
        unknown = [n for n in asked.experts if n not in experts.current]
        if unknown:
            known = ", ".join(experts.current) or "none"
            raise bad(
                f"experts: there is no expert {unknown[0]!r} to mix; there are {known}", "experts", "unknown_expert"
            )
        if len(set(asked.experts)) < len(asked.experts):
            raise bad(f"experts: a name occurs twice in {asked.experts}", "experts")
        self._busy = True
        held = [experts.choose(n) for n in asked.experts]
        key = experts.new_key(name)
        try:
            examples = await asyncio.to_thread(self._examples, asked)
            async with engine.reserved(self.seconds) as rows:
                examples.at_once = max(1, rows - 1)  # the classification expert may need one
                few = await asyncio.to_thread(self._search, key, asked, examples, held)
            expert, facts = few.found.expert, {"gain": few.gain, "gain_error": few.error}
            if few.name is None:
                raise APIError(
                    422,
                    f"no mixture of {', '.join(asked.experts)} was found that does better on these examples than the base model: gain "
                    f"{few.gain:.3g}, standard error {few.error:.3g}, caution={asked.caution:g}; nothing has changed. Give other experts, "
                    "more examples, score='likelihood', or less caution",
                    "no_gain",
                )
            facts["versions"] = {c.label: c.held[0].digest for c in held}
            manifest = {**expert.manifest, **facts, "name": name}
            said = {k: manifest[k] for k in ("mixed", "score", "examples", "candidates", "stopped")}
            return Expert(expert.z, manifest, expert.sketch), {**said, **facts, "seconds": few.found.seconds}
        finally:
            experts.leave(key)
            for chosen in held:
                experts.release(chosen)
            self._busy = False

    # --- not on the event loop

    def _examples(self, asked: FewShotRequest) -> Examples:
        service = self.service
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in asked.examples]
        longest = 1 + max(
            len(service.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in rows
        )  # and its end
        try:
            reward = None if asked.score == "likelihood" else exact
            made = Examples(service.model, service.tokenizer, rows, reward, "answer", longest, MEMORY)
        except Exception as error:  # chat templates raise what they like
            raise bad(f"examples: {error}", "examples", "bad_examples") from None
        tokens = made.ids.shape[1] + longest
        if tokens > service.context:
            raise bad(
                f"examples: the longest takes {tokens} tokens with its answer; this server's context is {service.context}",
                "examples",
            )
        if len(rows) * tokens * asked.population > MOST_TOKENS:
            raise bad(
                f"a generation would read {asked.population} candidates x {len(rows)} examples x {tokens} tokens, at most {MOST_TOKENS} are "
                "read: take fewer or shorter examples, or a smaller population",
                "examples",
                "search_too_large",
            )
        return made

    def _search(self, key: str, asked: FewShotRequest, examples: Examples, held: list[Chosen]) -> FewShot:
        service, bank, until = self.service, self.service.experts.bank, time.monotonic() + self.seconds

        def go_on(*_) -> None:
            service.engine.check_open()
            if time.monotonic() > until:
                raise APIError(
                    503,
                    f"the search took longer than {self.seconds:g} s; nothing has changed. Take fewer examples, candidates or iterations",
                    "search_too_long",
                )

        mixed = {chosen.label: bank[chosen.expert] for chosen in held}
        try:
            with service.engine.paused(), torch.no_grad():
                return FewShot(
                    service.model,
                    service.tokenizer,
                    examples,
                    mixed,
                    asked.config(),
                    key,
                    caution=asked.caution,
                    progress=go_on,
                )
        except APIError:
            raise
        except Exception as error:
            raise APIError(
                500, f"the search failed: {type(error).__name__}: {error}; nothing has changed", "search_failed"
            ) from error


def exact(completions: list, answer: list[str], **_) -> list[float]:
    """1 where the text is the answer, but for space around it."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.strip() == right.strip()) for text, right in zip(texts, answer, strict=True)]
