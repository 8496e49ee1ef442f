"""Experts made from a few labelled prompts: the mixture that does best on them.

The search runs between two steps of generation. Few-shot adaptation of Transformer² (arXiv 2501.06252, section 3.2).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from t2kernels.adapt import CEMConfig, Examples, FewShot
from t2kernels.experts.expert import Expert
from t2kernels.serve.experts.registry import MOST_IN_A_MIXTURE, Chosen
from t2kernels.serve.http.errors import APIError, bad

from .service import Service

logger: logging.Logger = logging.getLogger(__name__)

MEMORY: int = 1 << 30
"""Most bytes that a search takes besides the weights and the KV cache."""
MAX_TOKENS: int = 1 << 19
"""Most tokens of one generation of the search, over all candidates and examples.

A search can be stopped between two generations only."""


class Example(BaseModel):
    """One labelled prompt: text or messages, and the answer as the model should write it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompt: str | list[dict[str, Any]] = Field(min_length=1)
    answer: str = Field(min_length=1)


class FewShotRequest(BaseModel):
    """The body of a few-shot call.

    experts: names to mix; examples: labelled prompts; replace: whether the new name may exist
    score: what counts: "likelihood" of the answers, "exact" match of greedy answers, or "both"
    population, iterations, per, seed: of `CEMConfig`
    caution: standard errors by which the expert must beat the base model if answers are matched; else any gain counts
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

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
        """The settings of the search."""
        score = "reward" if self.score == "exact" else self.score
        return CEMConfig(
            population=self.population, iterations=self.iterations, per=self.per, score=score, seed=self.seed
        )


class FewShotSearch:
    """Makes one expert at a time. Nothing is generated during a search: running requests pause, new ones wait.

    service: of the server
    seconds: most seconds of waiting for a row, and most of the search; checked between generations of the search
    """

    service: Service
    seconds: float

    def __init__(self, service: Service, seconds: float) -> None:
        self.service, self.seconds = service, seconds
        self._busy = False

    async def run(self, name: str, request: FewShotRequest) -> tuple[Expert, dict[str, Any]]:
        """Returns the expert, which is not served yet, and the facts of the search.

        Raises APIError, and then nothing has changed: 400 unknown experts or unusable examples, 409 another search
        runs, 422 not better than the base model, 503 too slow or shutting down.
        """
        experts, engine = self.service.experts, self.service.engine
        if self._busy:
            message = "another few-shot expert is being made; try again later"
            raise APIError(409, message, "busy", headers={"Retry-After": "5"})
        unknown = [n for n in request.experts if n not in experts.current]
        if unknown:
            known = ", ".join(experts.current) or "none"
            message = f"experts: there is no expert {unknown[0]!r} to mix; there are {known}"
            raise bad(message, "experts", "unknown_expert")
        if adapters := [n for n in request.experts if experts.current[n].adapter]:
            raise bad(f"experts: {adapters[0]!r} is a LoRA adapter; only experts are mixed into an expert", "experts")
        if len(set(request.experts)) < len(request.experts):
            raise bad(f"experts: a name occurs twice in {request.experts}", "experts")
        self._busy = True
        held = [experts.choose(n) for n in request.experts]
        key = experts.new_key(name)
        try:
            examples = await asyncio.to_thread(self._examples, request)
            async with engine.reserved(self.seconds) as rows:
                examples.at_once = max(1, rows - 1)  # the classification expert may need one
                few = await asyncio.to_thread(self._search, key, request, examples, held)
            if few.name is None:
                raise APIError(
                    422,
                    f"no mixture of {', '.join(request.experts)} does better on these examples than the base model: "
                    f"gain {few.gain:.3g}, standard error {few.error:.3g}, caution={request.caution:g}; "
                    "nothing has changed. Use other experts, more examples, score='likelihood', or less caution",
                    "no_gain",
                )
            expert = few.found.expert
            facts = {
                "gain": few.gain,
                "gain_error": few.error,
                "versions": {c.label: c.held[0].digest for c in held},
            }
            manifest = {**expert.manifest, **facts, "name": name}
            shown = {k: manifest[k] for k in ("mixed", "score", "examples", "candidates", "stopped")}
            return Expert(expert.z, manifest, expert.sketch), {**shown, **facts, "seconds": few.found.seconds}
        finally:
            experts.discard(key)
            for chosen in held:
                experts.release(chosen)
            self._busy = False

    # --- not on the event loop

    def _examples(self, request: FewShotRequest) -> Examples:
        service = self.service
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in request.examples]
        lengths = [len(service.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in rows]
        longest = 1 + max(lengths)  # an answer and its end token
        try:
            reward = None if request.score == "likelihood" else exact
            examples = Examples(service.model, service.tokenizer, rows, reward, "answer", longest, MEMORY)
        except Exception as error:  # a chat template may raise anything
            logger.warning("%d examples were refused", len(rows), exc_info=True)
            raise bad(f"examples: {error}", "examples", "bad_examples") from None
        tokens = examples.ids.shape[1] + longest
        if tokens > service.context:
            raise bad(
                f"examples: the longest takes {tokens} tokens with its answer; the context is {service.context} tokens",
                "examples",
            )
        if len(rows) * tokens * request.population > MAX_TOKENS:
            raise bad(
                f"one generation of the search would read {request.population} candidates x {len(rows)} examples "
                f"x {tokens} tokens; the limit is {MAX_TOKENS}. Use fewer or shorter examples, or a smaller population",
                "examples",
                "search_too_large",
            )
        return examples

    def _search(self, key: str, request: FewShotRequest, examples: Examples, held: Sequence[Chosen]) -> FewShot:
        service, bank, until = self.service, self.service.experts.bank, time.monotonic() + self.seconds

        def check(*_: object) -> None:
            service.engine.check_open()
            if time.monotonic() > until:
                raise APIError(
                    503,
                    f"the search took longer than {self.seconds:g} s; nothing has changed. "
                    "Use fewer examples, candidates or iterations",
                    "search_too_long",
                )

        mixed = {chosen.label: bank[chosen.held[0].key] for chosen in held}
        model, tokenizer, config = service.model, service.tokenizer, request.config()
        try:
            with service.engine.paused(), torch.no_grad():
                return FewShot(model, tokenizer, examples, mixed, config, key, caution=request.caution, progress=check)
        except APIError:
            raise
        except Exception as error:
            logger.exception("the few-shot search for %r failed", key)
            message = f"the search failed: {type(error).__name__}: {error}; nothing has changed"
            raise APIError(500, message, "search_failed") from error


def exact(completions: Sequence[Any], answer: Sequence[str], **_: object) -> list[float]:
    """A reward: 1 where the completion is the answer, apart from space around it, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.strip() == right.strip()) for text, right in zip(texts, answer, strict=True)]
