"""The access log: a line for each request, and the id that names it in the answer and in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError
from .limits import OPEN

logger: logging.Logger = logging.getLogger(__name__)

HEADER: bytes = b"x-request-id"
GIVEN_ID: re.Pattern[str] = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
"""Ids of clients and proxies that are taken over. Others could write lines of their own into the log."""
FACTS: str = "t2.facts"
"""Key of the facts in a request's ASGI scope."""


@dataclass
class Facts:
    """What the log says of a request. It is filled in while the request is answered.

    id: of the request; begun: time of its arrival, of `time.perf_counter`
    """

    id: str
    begun: float = field(default_factory=time.perf_counter)
    said: dict[str, str | int | float | None] = field(default_factory=dict)
    """Further facts, in the order of the line: text, numbers, and seconds as float. None is left out."""
    error: str | None = None
    """Why the request was refused or failed."""
    counted: bool = False
    """Whether metrics have counted the request."""

    def line(self) -> str:
        """model=math prompt_tokens=12 total=0.310s error="..." """
        said = {**self.said, "total": time.perf_counter() - self.begun}
        words = [f"{k}={_word(v)}" for k, v in said.items() if v is not None]
        return " ".join([*words, *([f"error={_quoted(self.error, 300)}"] if self.error else [])])


def facts_of(scope: Scope) -> Facts:
    """The facts of a request. scope: of ASGI, or of a test that has no log"""
    return scope.setdefault(FACTS, Facts(f"req-{uuid.uuid4().hex}"))


def note_error(scope: Scope, error: APIError) -> None:
    """Let the log say why a request was refused."""
    facts_of(scope).error = error.message


class AccessLog:
    """ASGI middleware, the outermost: gives each request its id, logs it, and counts what nobody else counts.

    count: called with the status of each refusal that has not been counted
    """

    app: ASGIApp
    count: Callable[[str], Any]

    def __init__(self, app: ASGIApp, count: Callable[[str], Any]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log it when its answer has ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == HEADER), "")
        facts = scope[FACTS] = Facts(given if GIVEN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}")
        status = 499  # until the answer begins: the client has hung up

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, facts.id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, answered)
        except BaseException as error:
            status, facts.error = 500, f"{type(error).__name__}: {error}"
            raise
        finally:
            watched = scope["path"] in OPEN
            if status >= 400 and not facts.counted and not watched:
                self.count(str(status))
            client = ":".join(map(str, scope.get("client") or ("-",)))
            path = _quoted(scope["path"], 200)
            logger.log(
                logging.WARNING if status >= 500 and not watched else logging.DEBUG if watched else logging.INFO,
                "%s %s %s %s %d %s",
                *(facts.id, client, scope["method"], path, status, facts.line()),
            )


def _word(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}s"
    return str(value) if isinstance(value, int) else _quoted(value, 100)


def _quoted(text: str, most: int) -> str:
    """A text of a client in one line: quoted where it has anything but plain characters, and cut."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if re.fullmatch(r"[\w./:=,+@*-]+", text, re.ASCII) else ascii(text)
