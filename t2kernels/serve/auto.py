"""`model="auto"`: a strategy of `t2kernels.adapt` chooses the expert of a prompt.

It is the first of the two passes of Transformer² (arXiv 2501.06252, section 3.2).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from t2kernels.adapt import Classifier, Prompt, Question, Strategy
from t2kernels.experts.names import Name
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.http.errors import APIError, SettingsError

from .registry import Chosen, ExpertRegistry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)

PROMPT: str = "prompt"
"""The route on which the base model is asked."""
CLASSIFY: str = "classify"
"""Default name of a classification expert. The one that comes with the built-in model holds no question."""

AutoPrompt = str | list[dict[str, Any]]
"""A prompt to choose for: text, or messages of a chat."""


class Router:
    """Chooses an expert for each prompt.

    Prompts that arrive together are asked in one forward, between two steps of generation.

    engine, experts, tokenizer: of the server
    way: "prompt", where the base model says what a prompt is about, or the name of a classification expert
    tiny: whether the model is the built-in one, which has its own form of question
    margin: nats by which an expert must lead; below it the base model answers
    Raises SettingsError if the way cannot work.
    """

    engine: Engine
    experts: ExpertRegistry
    tokenizer: PreTrainedTokenizerBase
    way: str
    tiny: bool
    margin: float

    def __init__(
        self,
        engine: Engine,
        experts: ExpertRegistry,
        tokenizer: PreTrainedTokenizerBase,
        way: str,
        tiny: bool = False,
        margin: float = 0.0,
    ) -> None:
        self.engine, self.experts, self.tokenizer = engine, experts, tokenizer
        self.way, self.tiny, self.margin = way, tiny, margin
        self._made: tuple[int, Strategy, object] | None = None  # epoch of the names, strategy for them, its row
        self._asked: list[tuple[AutoPrompt, asyncio.Future[Chosen]]] = []
        self._task: asyncio.Task[None] | None = None
        if experts.bank.rows < 3 and way != PROMPT:
            raise SettingsError(f"--route {way} keeps a row for the classification expert: use --rows 3 or more")
        try:
            self.strategy()
        except APIError as error:
            raise SettingsError(f"--route {way}: {error.message}") from None

    async def choose(self, prompt: AutoPrompt) -> Chosen:
        """The expert for a prompt, held for the caller. Raises APIError."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append((prompt, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            try:
                strategy = self.strategy()
                back = {version.key: name for name, version in self.experts.current.items()}
                keys = await asyncio.to_thread(self._pass, strategy, [prompt for prompt, _ in asked])
            except Exception as error:
                failed = error
                if not isinstance(error, APIError):
                    logger.exception("no expert could be chosen for %d prompts", len(asked))
                    failed = APIError(500, f"no expert could be chosen: {error}", "routing_failed")
                for _, future in asked:
                    if not future.done():
                        future.set_exception(failed)
                continue
            for (_, future), key in zip(asked, keys, strict=True):
                if future.done():  # its client is gone
                    continue
                try:
                    future.set_result(self.experts.of_names(back.get(key)))
                except APIError as error:  # the expert was removed meanwhile
                    future.set_exception(error)

    def _pass(self, strategy: Strategy, prompts: Sequence[AutoPrompt]) -> list[Name]:
        with self.engine.paused():
            return strategy.choose(prompts)

    def strategy(self) -> Strategy:
        """The strategy for the current experts. Raises APIError 503 if there is no expert to choose or to ask."""
        if self._made is None or self._made[0] != self.experts.epoch:
            strategy, held = self._make()
            self._made = self.experts.epoch, strategy, held
        return self._made[1]

    def _make(self) -> tuple[Strategy, object]:
        experts, model = self.experts, self.engine.model
        keys = {name: version.key for name, version in experts.current.items()}
        if self.way == PROMPT:
            return Prompt(model, self.tokenizer, self._question(keys), self.margin), None
        if self.way not in keys:
            raise APIError(503, f"model 'auto' asks the expert {self.way!r}, which is not there; add it", "no_router")
        recorded = experts.current[self.way].manifest.get("question")
        if recorded is not None:  # a category whose expert is not there is answered by the base model
            question = Question(**recorded)
            question = replace(question, labels={label: keys.get(name) for label, name in question.labels.items()})
        else:
            question = self._question({name: key for name, key in keys.items() if name != self.way})
        held = experts.bank.ids(keys[self.way])  # its row is kept: it must not wait for those whose expert it chooses
        return Classifier(model, self.tokenizer, question, keys[self.way], margin=self.margin), held

    def _question(self, keys: dict[str, str]) -> Question:
        """The default question: which of the experts' names fits. Classification experts are not among them."""
        keys = {
            name: key
            for name, key in keys.items()
            if "question" not in self.experts.current[name].manifest and name != CLASSIFY
        }
        if not keys:
            raise APIError(503, "model 'auto' has no expert to choose", "no_experts")
        if not self.tiny:
            return Question.about(keys, chat=bool(self.tokenizer.chat_template))
        if len(keys) < 2:
            raise APIError(503, "model 'auto' needs two experts to choose from", "no_experts")
        question = Question.tiny(list(keys))
        return replace(question, labels={label: keys[name] for label, name in question.labels.items()})
