"""`model="auto"`: a strategy of `t2kernels.adapt` chooses the expert of a prompt.

It is the first of the two passes of Transformer² (arXiv 2501.06252, section 3.2).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from t2kernels.adapt import Strategy, make_strategy, strategy_names
from t2kernels.adapt.question import choosable
from t2kernels.adapt.strategy_registry import own_options, strategy_options
from t2kernels.experts.names import CLASSIFIER, Name
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.experts.registry import Chosen, ExpertRegistry
from t2kernels.serve.http.errors import APIError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)

AutoPrompt = str | list[dict[str, Any]]
"""A prompt to choose for: text, or messages of a chat."""


class Router:
    """Chooses an expert for each prompt.

    Prompts that arrive together are asked in one forward, between two steps of generation.

    engine, experts, tokenizer: of the server
    way: a strategy by name, or the name of a classification expert, which the strategy "classify" asks
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
                    named = {back.get(k, k): w for k, w in key.items()} if isinstance(key, Mapping) else back.get(key)
                    future.set_result(self.experts.of_names(named))
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
        experts = self.experts
        keys = {name: version.key for name, version in experts.current.items()}
        kind, options = self.way, {"margin": self.margin}
        if kind not in strategy_names():  # the name of a classification expert
            kind, options["classifier"] = CLASSIFIER, self.way
        judges = {}
        for option in strategy_options(kind):
            if option.expert:
                name = options.get(option.name, option.default)
                if name not in keys:
                    raise APIError(503, f"model 'auto' asks the expert {name!r}, which is not there", "no_router")
                judges[name] = options[option.name] = keys[name]
        names = choosable({name: version.manifest for name, version in experts.current.items() if name not in judges})
        try:
            strategy = make_strategy(
                kind,
                self.engine.model,
                self.tokenizer,
                {name: keys[name] for name in names},
                tiny=self.tiny,
                **own_options(kind, options),
            )
        except ValueError as error:
            raise APIError(503, f"model 'auto' cannot choose: {error}", "no_experts") from None
        readers = {key for key in strategy.readers if key is not None}
        if len(readers) + 2 > experts.bank.rows:
            raise APIError(
                503,
                f"model 'auto' keeps rows for {len(readers)} experts: --rows {len(readers) + 2} at least",
                "no_rows",
            )
        # Their rows are kept: the strategy must not wait for requests that wait for its choice.
        return strategy, [experts.bank.ids(key) for key in readers]
