"""A request for a completion, text or chat: its expert, and the response."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from t2kernels.experts.names import AUTO
from t2kernels.serve.experts.registry import Chosen
from t2kernels.serve.http.access import facts_of
from t2kernels.serve.http.choices import usage
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest
from t2kernels.serve.http.responses import ResponsesRequest, Written

from .answer import Answer, Part
from .auto import AutoPrompt
from .large_answers import respond_json
from .prompts import limit_of, prepare
from .service import Service

T = TypeVar("T")


async def respond(service: Service, http: Request, request: ResponsesRequest) -> Response:
    """The answer to a request of the API of responses. Raises APIError."""
    return await answer(service, http, request.chat(), functools.partial(Written, request))


async def answer(
    service: Service,
    http: Request,
    request: ChatRequest | CompletionRequest,
    form: Callable[[str], Written] | None = None,
) -> Response:
    """The response to a request: JSON, or server-sent events if it asks for a stream. Raises APIError.

    form: makes the form of the answer, from the name of the model; None: that of the request
    """
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
    written = None if form is None else form(model)
    if not request.stream:
        try:
            whole = await _while_connected(http, asyncio.ensure_future(made.whole(chat)))
        finally:
            made.close()
        if written is not None:
            choice = whole["choices"][0]
            whole = written.whole(choice["message"]["content"], choice["finish_reason"], whole["usage"])
        shown = made.generated + (made.prompt_tokens * request.n if request.echoes else 0)
        return await respond_json(whole, made.entries(shown))
    # The status line waits for the first token, so that an error before it has a status of its own.
    parts = aiter(made)
    try:
        first = await _while_connected(http, asyncio.ensure_future(anext(parts)))
    except BaseException:
        made.close()
        raise
    events = made.events(chat, first, parts) if written is None else _written(made, written, first, parts)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _written(
    made: Answer, written: Written, parts: list[Part], rest: AsyncIterator[list[Part]]
) -> AsyncIterator[bytes]:
    """The events of a response. parts: those that have been read already; rest: the iterator that they came from"""
    finish = None
    try:
        for event in written.begin():
            yield event
        while finish is None:
            for part in parts:
                for event in written.add(part.text):
                    yield event
                finish = part.finish or finish
            if finish is None:
                parts = await anext(rest)
        await anext(rest, None)  # so that the request ends as done
        for event in written.end(finish, usage(made.prompt_tokens, made.generated)):
            yield event
    except APIError as error:
        for event in written.fail(error):
            yield event
    finally:
        made.close()


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
