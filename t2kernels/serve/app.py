"""The routes of the HTTP API: completions, models, health and metrics. `make_app` builds the application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from t2kernels.experts.names import AUTO
from t2kernels.serve.http.access import AccessLog, facts_of, note_error
from t2kernels.serve.http.errors import APIError, bad
from t2kernels.serve.http.limits import CheckOrigin, LimitBody, RequireKey
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest
from t2kernels.serve.http.refusals import refusal
from t2kernels.serve.http.responses import ResponsesRequest

from .admin import add_routes
from .completions import answer, respond
from .playground import add_page
from .service import Service
from .tokenizing import add_tokenizing


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service. It starts the engine when it starts, and stops it when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        yield
        await service.engine.drain(0)

    app = FastAPI(title="t2kernels", lifespan=lifespan)
    settings = service.settings
    app.state.service = service
    app.add_middleware(LimitBody, most=settings.body, uploads=settings.upload)
    app.add_middleware(CheckOrigin, hosts=settings.hosts, origins=settings.origins)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, key=settings.api_key)
    app.add_middleware(AccessLog, count=lambda status: service.metrics.requests.labels("none", status).inc())
    _add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await answer(service, http, request)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await answer(service, http, request)

    @app.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: Request) -> Response:
        return await respond(service, http, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list_models(service)}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        found = next((m for m in list_models(service) if m["id"] == name), None)
        if found is None:
            raise APIError(404, f"the model {name!r} does not exist", "model_not_found", "model")
        return found

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        engine = service.engine
        state = "dead" if engine.failure and not engine.draining else "draining" if engine.draining else "ready"
        body = {"status": state, "running": len(engine.running), "waiting": len(engine.waiting)}
        body |= {"rows": engine.bank.rows, "rows_in_use": engine.bank.rows_in_use, "generated": engine.generated}
        reason = {"reason": engine.failure} if engine.failure else {}
        return JSONResponse({**body, **reason}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await asyncio.to_thread(service.metrics.text)  # 50 lines an expert
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    add_routes(app, service)
    add_tokenizing(app, service)
    if settings.ui:
        add_page(app)
    return app


def list_models(service: Service) -> list[dict[str, Any]]:
    """The model objects of the API: the base model, every expert, and "auto" if there is a route."""
    common = {"object": "model", "owned_by": "t2kernels", "max_model_len": service.context}
    base = {"id": service.settings.name, "created": service.started, **common}
    child = {**common, "parent": service.settings.name}
    experts = [
        {"id": name, "created": v.created, "root": v.digest, "numbers": v.numbers, **child}
        for name, v in service.experts.current.items()
    ]
    auto = [{"id": AUTO, "created": service.started, **child}] if service.router else []
    return [base, *experts, *auto]


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API."""

    @app.exception_handler(HTTPException)
    async def _http_error(http: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and not isinstance(error, APIError):
            reason = "it is not text in UTF-8"
            if isinstance(error.__cause__, RecursionError):
                reason = "its parts lie too deep within each other"
            error = bad(f"the body cannot be read as JSON: {reason}", code="bad_json")
        elif not isinstance(error, APIError):
            message = f"{http.method} {http.url.path}: {error.detail}; this server has no such path, or not this method"
            error = APIError(error.status_code, message, headers=error.headers)
        return _answer(http, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid_body(http: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(http, refusal(error.errors(), http.headers.get("content-type")))

    @app.exception_handler(Exception)
    async def _fault(http: Request, error: Exception) -> JSONResponse:
        # Not logged here: starlette raises the error again after this answer, and uvicorn logs it with its traceback.
        made = APIError(500, f"{type(error).__name__}: {error}", "internal_error")
        return _answer(http, made, {"x-request-id": facts_of(http.scope).id})


def _answer(http: Request, error: APIError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    note_error(http.scope, error)
    return JSONResponse(error.body(), error.status_code, {**(error.headers or {}), **(headers or {})})
