"""A request for a completion, text or chat: its expert, and the response."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from t2kernels.experts.names import AUTO
from t2kernels.serve.experts.registry import Chosen
from t2kernels.serve.http.access import facts_of
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest

from .answer import Answer
from .auto import AutoPrompt
from .prompts import limit_of, prepare
from .service import Service

T = TypeVar("T")


async def answer(service: Service, http: Request, request: ChatRequest | CompletionRequest) -> Response:
    """The response to a request: JSON, or server-sent events if it asks for a stream. Raises APIError."""
    chat = isinstance(request, ChatRequest)
    facts = facts_of(http.scope)
    facts.said["model"] = request.model
    service.engine.check_open()
    # A long text takes seconds; meanwhile the event loop must answer others.
    prepared = await asyncio.to_thread(prepare, service, request)
    limits = [limit_of(service, prompt, request.limit) for prompt in prepared.prompts]
    chosen = await _choose(service, request.model, prepared.about)
    model = request.model
    if model == AUTO:  # the answer says which expert was chosen
        model = chosen.label if chosen.held else service.settings.name
    made = Answer(service, prepared, limits, request, chosen, model, facts)
    if not request.stream:
        try:
            return JSONResponse(await _while_connected(http, asyncio.ensure_future(made.whole(chat))))
        finally:
            made.close()
    # The status line waits for the first token, so that an error before it has a status of its own.
    parts = aiter(made)
    try:
        first = await _while_connected(http, asyncio.ensure_future(anext(parts)))
    except BaseException:
        made.close()
        raise
    return StreamingResponse(
        made.events(chat, first, parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _choose(service: Service, model: str, prompt: AutoPrompt) -> Chosen:
    """The expert of a request, held. Raises APIError."""
    if model != AUTO:
        return service.experts.choose(model)
    if service.router is None:
        raise APIError(
            404,
            "the model 'auto' needs a way to choose: start the server with --route prompt, or --route EXPERT",
            "model_not_found",
            "model",
        )
    return await service.router.choose(prompt)


async def _while_connected(http: Request, work: asyncio.Task[T]) -> T:
    """The result of `work`. It is cancelled if the client hangs up; APIError 499 is raised then, which nobody reads."""
    gone = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise APIError(499, "the client has hung up")
        return work.result()
    finally:
        for task in (gone, work):
            task.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
