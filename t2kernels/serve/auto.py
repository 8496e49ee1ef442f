"""`model="auto"`: which expert answers a prompt, by a strategy of `t2kernels.adapt` (Transformer², arXiv 2501.06252, section 3.2, two passes)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from t2kernels.adapt import Strategy, make_strategy, strategy_names
from t2kernels.adapt.question import choosable
from t2kernels.adapt.strategy_registry import own_options, strategy_options
from t2kernels.experts.names import CLASSIFIER
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.http.errors import APIError

from .registry import Chosen, Experts


class Router:
    """way: a strategy by name, or the name of a classification expert, which the strategy "classify" asks
    tiny: whether the model is the built-in one, which is asked in its own words; margin: nats by which an expert must lead over the others

    Requests that come together are asked together, in one forward between two steps of generation.
    """

    def __init__(self, engine: Engine, experts: Experts, tokenizer, way: str, tiny: bool = False, margin: float = 0.0):
        self.engine, self.experts, self.tokenizer, self.way, self.tiny, self.margin = (
            engine,
            experts,
            tokenizer,
            way,
            tiny,
            margin,
        )
        self._made: tuple[int, Strategy, object] | None = None  # for which names the strategy was made
        self._asked: list[tuple[object, asyncio.Future]] = []
        self._task: asyncio.Task | None = None
        try:
            self._strategy()
        except APIError as error:
            raise ValueError(f"--route {way}: {error.message}") from None

    async def choose(self, prompt) -> Chosen:
        """The expert for a prompt, text or chat, held for the caller. Raises APIError."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append((prompt, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            try:
                strategy = self._strategy()
                back = {version.key: name for name, version in self.experts.current.items()}
                names = await asyncio.to_thread(self._pass, strategy, [prompt for prompt, _ in asked])
            except Exception as error:
                wrong = f"no expert could be chosen: {error}"
                failed = error if isinstance(error, APIError) else APIError(500, wrong, "routing_failed")
                for _, future in asked:
                    if not future.done():
                        future.set_exception(failed)
                continue
            for (_, future), key in zip(asked, names, strict=True):
                if future.done():  # its client has gone
                    continue
                try:
                    named = {back.get(k, k): w for k, w in key.items()} if isinstance(key, Mapping) else back.get(key)
                    future.set_result(self.experts.of_names(named))
                except APIError as error:  # it was removed during the pass
                    future.set_exception(error)

    def _pass(self, strategy: Strategy, prompts: Sequence) -> list:
        with self.engine.paused():
            return strategy.choose(prompts)

    def _strategy(self) -> Strategy:
        """For the names as they are now. Raises APIError 503 if there is nothing to choose from, or nobody to choose."""
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
