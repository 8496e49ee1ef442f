"""The HTTP API: OpenAI's chat and text completions, the models, health and metrics. `make_app` puts a server together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from t2kernels.rollout.chat import encode, end_tokens, has_template
from t2kernels.serve.engine.batching import BatchSettings
from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.http.errors import APIError, bad
from t2kernels.serve.http.limits import LimitBody, RequireKey
from t2kernels.serve.http.metrics import Metrics
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest

from .admin import add_routes
from .auto import Router
from .completions import Answer, while_connected
from .registry import AUTO, Chosen, Experts


@dataclass(frozen=True)
class Settings:
    """name: of the base model in the API; experts: the folder, None: no files are read or written; api_key: None: anybody may ask
    route: how model="auto" chooses: "prompt", the name of a classification expert, or None: there is no such model
    tiny: whether this is the built-in model; body, upload: bytes that a request, and an expert, may have
    search_seconds: that a few-shot search may take, in which nothing is generated
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


class Service:
    """A patched model, its tokenizer, and everything that serves it."""

    def __init__(self, model, tokenizer, settings: Settings, shipped: dict[str, Path] | None = None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.started = int(time.time())
        self.engine = Engine(
            model, sorted(end_tokens(model, tokenizer)), settings.batch, settings.max_running, settings.max_waiting
        )
        self.experts = Experts(model.t2_bank, settings.experts, (settings.name,))
        for name, path in (shipped or {}).items():
            self.experts.load_file(name, path)
        if settings.experts is not None:
            self.experts.load_folder()
        self.metrics = Metrics(self.engine, self.experts)
        self.router = None
        if settings.route is not None:
            self.router = Router(self.engine, self.experts, tokenizer, settings.route, settings.tiny, settings.margin)

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion together."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.engine.longest, limit or self.engine.longest)

    # --- from a request to token ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Through the chat template; without one a single message of the user is the prompt as it stands."""
        if has_template(self.tokenizer):
            try:
                return encode(self.tokenizer, [messages])[0]
            except Exception as error:  # templates raise what they like
                raise bad(f"the model's chat template refuses these messages: {error}", "messages") from None
        if len(messages) == 1 and messages[0]["role"] == "user":
            return self.tokenizer(messages[0]["content"])["input_ids"]
        raise bad(
            f"this model has no chat template, so {len(messages)} messages have no form: send one message of the user, ask "
            "/v1/completions, or start the server with --chat-template FILE",
            "messages",
            "no_chat_template",
        )

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        size = self.model.get_input_embeddings().num_embeddings
        if not all(0 <= token < size for token in prompt):
            raise bad(f"prompt: token ids go from 0 to {size - 1}", "prompt")
        return prompt

    def limit(self, prompt: list[int], asked: int | None) -> int:
        """How many tokens may follow a prompt. Raises APIError if that is none, or fewer than were asked for."""
        room = self.context - len(prompt)
        if not prompt:
            raise bad("the prompt is empty: it has no token to begin with", "prompt")
        if room < 1 or (asked is not None and asked > room):
            wanted = f"{len(prompt)} tokens of prompt" + (f" and {asked} more" if asked is not None else "")
            raise bad(
                f"this server's context is {self.context} tokens; the request asks for {wanted}",
                code="context_length_exceeded",
            )
        return room if asked is None else asked

    async def choose(self, model: str, prompt: Any) -> Chosen:
        if model == AUTO:
            if self.router is None:
                raise APIError(
                    404,
                    "the model 'auto' needs a way to choose: start the server with --route prompt, or --route EXPERT",
                    "model_not_found",
                    "model",
                )
            return await self.router.choose(prompt)
        return self.experts.choose(model)

    async def answer(self, http: Request, request: ChatRequest | CompletionRequest) -> Response:
        chat = isinstance(request, ChatRequest)
        try:
            self.engine.check_open()
            if chat:
                said = request.chat()
                prompts, about = [self.encode_chat(said)], said if self.tokenizer.chat_template else said[-1]["content"]
            else:
                prompts = [self.encode_text(p) for p in request.prompts()]
                if request.model == AUTO and len(prompts) > 1:
                    raise bad("model 'auto' chooses for one prompt: send a request for each", "prompt")
                about = request.prompts()[0]
                about = about if isinstance(about, str) else self.tokenizer.decode(about, skip_special_tokens=True)
            limits = [self.limit(prompt, request.limit) for prompt in prompts]
            chosen = await self.choose(request.model, about)
        except APIError as error:
            self.metrics.requests.labels("none", str(error.status_code)).inc()
            raise
        said_by = request.model if request.model != AUTO else chosen.label if chosen.held else self.settings.name
        answer = Answer(self, prompts, limits, request, chosen, said_by)
        if request.stream:
            # The status line waits for the first token, so that what fails before it fails with a status of its own.
            parts = aiter(answer)
            try:
                first = await while_connected(http, asyncio.ensure_future(anext(parts)))
            except BaseException:
                answer.close()
                raise
            return StreamingResponse(
                answer.events(chat, first, parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            return JSONResponse(await while_connected(http, asyncio.ensure_future(answer.whole(chat))))
        finally:
            answer.close()

    def models(self) -> list[dict]:
        base = {
            "id": self.settings.name,
            "object": "model",
            "created": self.started,
            "owned_by": "t2kernels",
            "max_model_len": self.context,
        }
        of = {"object": "model", "owned_by": "t2kernels", "parent": self.settings.name, "max_model_len": self.context}
        experts = [
            {"id": name, "created": v.created, "root": v.digest, "numbers": v.numbers, **of}
            for name, v in self.experts.current.items()
        ]
        auto = [{"id": AUTO, "created": self.started, **of}] if self.router else []
        return [base, *experts, *auto]


def make_app(service: Service) -> FastAPI:
    """The ASGI application; its start starts the engine, its end stops it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        yield
        await service.engine.drain(0)

    app = FastAPI(title="t2kernels", lifespan=lifespan)
    settings = service.settings
    app.state.service = service
    app.add_middleware(LimitBody, most=settings.body, uploads=settings.upload)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, key=settings.api_key)

    @app.exception_handler(HTTPException)
    async def _failed(_: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, APIError):
            error = APIError(error.status_code, str(error.detail), headers=error.headers)
        return JSONResponse(error.body(), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(x) for x in first["loc"] if x != "body")
        unknown = first["type"] == "extra_forbidden"
        message = f"{field or 'the body'}: {'this field is not supported' if unknown else first['msg']}"
        return JSONResponse(bad(message, field or None).body(), 400)

    @app.exception_handler(Exception)
    async def _broken(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(APIError(500, f"{type(error).__name__}: {error}", "internal_error").body(), 500)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await service.answer(http, request)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await service.answer(http, request)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        found = next((m for m in service.models() if m["id"] == name), None)
        if found is None:
            raise APIError(404, f"the model {name!r} does not exist", "model_not_found", "model")
        return found

    @app.get("/health")
    async def health() -> JSONResponse:
        engine = service.engine
        state = "dead" if engine.failure and not engine.draining else "draining" if engine.draining else "ready"
        body = {"status": state, "running": len(engine.running), "waiting": len(engine.waiting)}
        return JSONResponse(
            {**body, **({"reason": engine.failure} if engine.failure else {})}, 200 if state == "ready" else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_routes(app, service)
    return app
