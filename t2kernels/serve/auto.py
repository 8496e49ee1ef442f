"""`model="auto"`: which expert answers a prompt, by a strategy of `t2kernels.adapt` (Transformer², arXiv 2501.06252, section 3.2, two passes)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from t2kernels.adapt import Classifier, Prompt, Question, Strategy
from t2kernels.experts.names import CLASSIFIER
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.http.errors import APIError

from .registry import Chosen, Experts

PROMPT = "prompt"


class Router:
    """way: "prompt", the base model says what a prompt is about, or the name of a classification expert, which does
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
        if experts.bank.rows < 3 and way != PROMPT:
            raise ValueError(f"--route {way} keeps a row for the classification expert: --rows 3 at least")
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
                    future.set_result(self.experts.of_names(back.get(key)))
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
        """What is asked where nobody wrote a question down: which of the experts' names fits, but not those that answer questions themselves."""
        keys = {
            name: key
            for name, key in keys.items()
            if "question" not in self.experts.current[name].manifest and name != CLASSIFIER
        }
        if not keys:
            raise APIError(503, "model 'auto' has no expert to choose", "no_experts")
        if not self.tiny:
            return Question.about(keys, chat=bool(self.tokenizer.chat_template))
        if len(keys) < 2:
            raise APIError(503, "model 'auto' needs two experts to choose from", "no_experts")
        question = Question.tiny(list(keys))
        return replace(question, labels={label: keys[name] for label, name in question.labels.items()})
