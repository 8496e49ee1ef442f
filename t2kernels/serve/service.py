"""`Service`: the state of a server. Its settings, the patched model, and the parts that serve it."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from t2kernels.rollout.chat import end_tokens
from t2kernels.serve.engine.batching import BatchSettings
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.engine.grammar import Grammars
from t2kernels.serve.experts.folder import ExpertFolder, load
from t2kernels.serve.experts.registry import ExpertRegistry
from t2kernels.serve.http.metrics import Metrics
from t2kernels.serve.http.vocabulary import Vocabulary

from .auto import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    name: of the base model in the API
    experts: folder of experts; None: no file is read or written
    api_key: that clients must send; None: no key is needed
    route: how model="auto" chooses: "prompt", or the name of a classification expert; None: there is no such model
    margin: nats by which the route must prefer an expert; below it the base model answers
    tiny: whether the model is the built-in one
    batch: sizes of the batch and of the KV cache
    max_running: most requests that are generated at once; max_waiting: most requests that wait for that
    body: most bytes of a request; upload: most bytes of an uploaded expert
    search_seconds: most seconds of a few-shot search, in which nothing is generated
    hosts: names that a request may have in its Host header; (): any
    origins: other origins than the server's own whose web pages may send requests
    ui: whether there is a playground at /
    """

    name: str
    experts: Path | None = None
    api_key: str | None = None
    route: str | None = None
    margin: float = 0.0
    tiny: bool = False
    batch: BatchSettings = field(default_factory=BatchSettings)
    max_running: int = 64
    max_waiting: int = 512
    body: int = 4 << 20
    upload: int = 256 << 20
    search_seconds: float = 60.0
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    ui: bool = True


class Service:
    """A patched model, its tokenizer, and everything that serves them.

    model: patched; settings: of the server
    shipped: {name: file} of experts that are served besides those of the folder
    Raises EngineError if the engine cannot run the model, SettingsError or APIError if an expert or the route does not
    fit it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    started: int
    """Unix time of the start."""
    engine: Engine
    experts: ExpertRegistry
    folder: ExpertFolder
    metrics: Metrics
    router: Router | None
    """Chooses for model="auto"; None: there is no such model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        shipped: Mapping[str, Path] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.started = int(time.time())
        ends = sorted(end_tokens(model, tokenizer))
        self.engine = Engine(model, ends, settings.batch, settings.max_running, settings.max_waiting)
        self.experts = ExpertRegistry(model.t2_bank, (settings.name,))
        self.folder = ExpertFolder(settings.experts)
        for name, path in (shipped or {}).items():
            load(self.experts, name, path)
        if settings.experts is not None:
            self.folder.load_all(self.experts)
        self.metrics = Metrics(self.engine, self.experts)
        self.router = None
        if settings.route is not None:
            self.router = Router(self.engine, self.experts, tokenizer, settings.route, settings.tiny, settings.margin)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of the tokens."""
        return Vocabulary(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Makes the structures that texts must have."""
        return Grammars(self.vocabulary, self.engine.ends, self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the model knows."""
        return self.model.get_input_embeddings().num_embeddings

    @functools.cached_property
    def most_characters(self) -> int:
        """Characters of a text that may just fit the context: all its tokens the longest of the vocabulary."""
        longest = max((len(token) for token in self.tokenizer.get_vocab()), default=1)
        return self.context * longest

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion together."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.engine.longest, limit or self.engine.longest)
