"""A request for a completion, text or chat: its prompts, its expert, and the response."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from t2kernels.experts.names import AUTO
from t2kernels.rollout.chat import encode, has_template
from t2kernels.serve.http.errors import APIError, bad
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest

from .answer import Answer
from .auto import AutoPrompt
from .registry import Chosen
from .service import Service

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")


async def answer(service: Service, http: Request, request: ChatRequest | CompletionRequest) -> Response:
    """The response to a request: JSON, or server-sent events if it asks for a stream. Raises APIError."""
    chat = isinstance(request, ChatRequest)
    try:
        service.engine.check_open()
        # A long text takes seconds; meanwhile the event loop must answer others.
        prompts, about = await asyncio.to_thread(_chat if chat else _text, service, request)
        limits = [_limit(service, prompt, request.limit) for prompt in prompts]
        chosen = await _choose(service, request.model, about)
    except APIError as error:
        service.metrics.requests.labels("none", str(error.status_code)).inc()
        raise
    model = request.model
    if model == AUTO:  # the answer says which expert was chosen
        model = chosen.label if chosen.held else service.settings.name
    made = Answer(service, prompts, limits, request, chosen, model)
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


def _chat(service: Service, request: ChatRequest) -> tuple[list[list[int]], AutoPrompt]:
    """Token ids of the prompt, and the prompt as the router reads it."""
    messages = request.chat()
    _check_length(service, sum(len(message["content"]) for message in messages))
    about = messages if service.tokenizer.chat_template else messages[-1]["content"]
    return [_encode_chat(service, messages)], about


def _text(service: Service, request: CompletionRequest) -> tuple[list[list[int]], AutoPrompt]:
    """Token ids of the prompts, and the first prompt as the router reads it."""
    prompts = request.prompts()
    for prompt in prompts:  # all of them, before the work on the first
        _check_length(service, len(prompt) if isinstance(prompt, str) else 0)
    encoded = [_encode_text(service, prompt) for prompt in prompts]
    if request.model == AUTO and len(prompts) > 1:
        raise bad("model 'auto' chooses for one prompt: send one request per prompt", "prompt")
    first = prompts[0]
    return encoded, first if isinstance(first, str) else service.tokenizer.decode(first, skip_special_tokens=True)


def _encode_chat(service: Service, messages: list[dict[str, Any]]) -> list[int]:
    """Apply the chat template. Without one, a single message of the user is the prompt."""
    tokenizer = service.tokenizer
    if has_template(tokenizer):
        try:
            return encode(tokenizer, [messages])[0]
        except Exception as error:  # a template may raise anything
            logger.warning("the chat template refused %d messages", len(messages), exc_info=True)
            raise bad(f"the model's chat template refuses these messages: {error}", "messages") from None
    if len(messages) == 1 and messages[0]["role"] == "user":
        return tokenizer(messages[0]["content"])["input_ids"]
    raise bad(
        f"this model has no chat template, so it cannot read {len(messages)} messages: send one message of the user, "
        "use /v1/completions, or start the server with --chat-template FILE",
        "messages",
        "no_chat_template",
    )


def _encode_text(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return service.tokenizer(prompt)["input_ids"]
    size = service.model.get_input_embeddings().num_embeddings
    if not all(0 <= token < size for token in prompt):
        raise bad(f"prompt: token ids go from 0 to {size - 1}", "prompt")
    return prompt


def _check_length(service: Service, characters: int) -> None:
    """Raise APIError 400 for a text that cannot fit the context, whatever its tokens are."""
    if characters > service.most_characters:
        raise bad(
            f"the maximum context length is {service.context} tokens; the request has {characters} characters",
            code="context_length_exceeded",
        )


def _limit(service: Service, prompt: Sequence[int], requested: int | None) -> int:
    """How many tokens may follow a prompt. Raises APIError 400 if that is none, or fewer than requested."""
    room = service.context - len(prompt)
    if not prompt:
        raise bad("the prompt is empty: it needs at least one token", "prompt")
    if room < 1 or (requested is not None and requested > room):
        tokens = f"{len(prompt)} tokens of prompt" + (f" and {requested} more" if requested is not None else "")
        message = f"the maximum context length is {service.context} tokens; the request asks for {tokens}"
        raise bad(message, code="context_length_exceeded")
    return room if requested is None else requested


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
