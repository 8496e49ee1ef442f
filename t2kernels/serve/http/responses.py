"""OpenAI's API of responses: its requests as chats, and its answers as objects and events. Text in, text out."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from t2kernels import InputError

from .errors import APIError
from .protocol import MAX_MODEL, ChatRequest, chat_of
from .refusals import shown, without_neutral

JSON = dict[str, Any]
"""A JSON object."""
UNUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that are not supported: the values that ask for nothing, besides null."""
TEXTS: tuple[str, ...] = ("input_text", "output_text", "text")
"""Kinds of parts of a message that are text."""


class ResponsesRequest(BaseModel):
    """The body of POST /v1/responses."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str = Field(max_length=MAX_MODEL)
    input: str | list[JSON]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    text: JSON = {}
    stream: bool = False
    stream_options: JSON | None = None  # accepted and ignored: usage always comes

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        return without_neutral(cls.model_fields, body, UNUSED)

    def chat(self) -> ChatRequest:
        """The same request as a chat. Raises APIError 400 for what is no text."""
        said = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        fields = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream}
        try:
            messages = said + [_message(i, item) for i, item in enumerate(items)]
            if len(messages) == len(said):
                raise InputError("input: expected text or at least one message, not []")
            return chat_of(
                messages=messages,
                max_completion_tokens=self.max_output_tokens,
                response_format=_format(self.text),
                **fields,
            )
        except InputError as error:
            raise APIError(400, str(error), param=str(error).partition(":")[0].partition("[")[0]) from None


def _message(i: int, item: JSON) -> JSON:
    kind, content = item.get("type", "message"), item.get("content")
    if isinstance(content, list):
        if wrong := [p for p in content if not isinstance(p, dict) or p.get("type") not in TEXTS]:
            raise InputError(f"input[{i}]: expected parts of text, not {shown(wrong[0])}")
        content = [{"type": "text", "text": part.get("text", "")} for part in content]
    if kind != "message" or not isinstance(content, (str, list)):
        raise InputError(f"input[{i}]: expected a message of text with a role and a content, not {shown(item)}")
    return {"role": item.get("role"), "content": content}


def _format(text: JSON) -> JSON | None:
    """The `response_format` of a chat for the `text` of a response."""
    for name in text:
        if name not in ("format", "verbosity") or (name == "verbosity" and text[name] not in (None, "medium")):
            raise InputError(f"text: {name} {shown(text[name])} is not supported; there is format")
    asked = text.get("format")
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {"schema": asked.get("schema")}}


class Written:
    """A response while it is written: the object, and the events that tell of it.

    request: what was asked; model: the name that the answer gives
    """

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self.request: ResponsesRequest = request
        self.model: str = model
        self.created: int = int(time.time())
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number, self._text = 0, ""

    def whole(self, text: str, finish: str, used: JSON) -> JSON:
        """The response. finish, used: `finish_reason` and `usage` of the chat"""
        self._text = text
        return self._response("completed" if finish == "stop" else "incomplete", used)

    def begin(self) -> Iterator[bytes]:
        """The events before the first text."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", None))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def add(self, text: str) -> Iterator[bytes]:
        """The event of a piece of text."""
        self._text += text
        if text:
            yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self, finish: str, used: JSON) -> Iterator[bytes]:
        """The events after the last text. finish, used: as for `whole`"""
        state: Literal["completed", "incomplete"] = "completed" if finish == "stop" else "incomplete"
        yield self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=self._part(self._text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(state))
        yield self._event(f"response.{state}", response=self._response(state, used))

    def fail(self, error: APIError) -> Iterator[bytes]:
        """The event of an error within a stream."""
        said = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response={**self._response("failed", None), "error": said})

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n".encode()

    def _place(self) -> JSON:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> JSON:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, state: str) -> JSON:
        content = [] if state == "in_progress" else [self._part(self._text)]
        return {"id": self._item, "type": "message", "status": state, "role": "assistant", "content": content}

    def _response(self, state: str, used: JSON | None) -> JSON:
        asked, over = self.request, state in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.created,
            "status": state,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if state == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": [self._message(state)] if over else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": asked.text.get("format") or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if used is None else _usage(used),
        }


def _usage(used: JSON) -> JSON:
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }
