"""Routes beside OpenAI's: tokens of a text, text of tokens, and the version. Their form is vLLM's."""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field, model_validator
from starlette.responses import Response

from t2kernels import InputError
from t2kernels.serve.http.errors import bad
from t2kernels.serve.http.protocol import chat_of

from .large_answers import respond_json
from .prompts import check_length, check_text, check_tokens, encode_chat
from .service import Service


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InputError("prompt: expected either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)


def add_tokenizing(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""

    def tokens_of(request: TokenizeRequest) -> list[int]:
        if request.messages is not None:
            messages = chat_of(model="", messages=request.messages).chat()
            check_length(service, sum(len(message["content"]) for message in messages))
            return encode_chat(service, messages, add_generation_prompt=request.add_generation_prompt)
        check_length(service, len(request.prompt or ""))
        text = check_text("prompt", request.prompt or "")
        return service.tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"]

    def named(request: TokenizeRequest) -> tuple[list[int], list[str] | None]:
        tokens = tokens_of(request)
        return tokens, [service.vocabulary.name(token) for token in tokens] if request.return_token_strs else None

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Response:
        tokens, words = await asyncio.to_thread(named, request)
        body = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens, "token_strs": words}
        return await respond_json(body, len(tokens))

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        if len(request.tokens) > service.context:
            given = f"this model's maximum context length is {service.context} tokens; the request has"
            raise bad(f"{given} {len(request.tokens)}", "tokens", "context_length_exceeded")
        check_tokens(service, "tokens", request.tokens)
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, request.tokens)}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": metadata.version("t2kernels")}
