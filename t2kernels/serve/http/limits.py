"""What stands before the API: the key, and how large a body may be."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError

OPEN = ("/health", "/metrics")
"""Paths that need no key: whoever watches a server has none."""
LINGER_BYTES, LINGER_SECONDS = 64 << 20, 5
"""How much of a body that is too long is still read, so that its sender gets to see why it was refused."""


class RequireKey:
    """Answers 401 where the header `Authorization: Bearer KEY` does not hold the key; compared in constant time."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(key.strip(), self.key) or scheme.lower() != b"bearer":
                error = APIError(
                    401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", "invalid_api_key"
                )
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class LimitBody:
    """Answers 413 for a longer body, by its announced length or as it comes.

    most: bytes; uploads: bytes where experts are sent, which are larger than prompts
    """

    def __init__(self, app: ASGIApp, most: int, uploads: int):
        self.app, self.most, self.uploads = app, most, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.uploads if scope["path"] == "/v1/experts" else self.most
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > most:
            await discard(receive)
            error = too_large(most)
            await JSONResponse(error.body(), error.status_code, {"Connection": "close"})(scope, receive, send)
            return
        come = 0

        async def counted() -> Message:
            nonlocal come
            message = await receive()
            if message["type"] == "http.request":
                come += len(message.get("body", b""))
                if come > most:
                    if message.get("more_body"):
                        await discard(receive)
                    raise too_large(most)
            return message

        await self.app(scope, counted, send)


async def discard(receive: Receive) -> None:
    """Read what is still sent and forget it, up to a limit: a connection that is closed on unread bytes is reset, and the answer with it."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while more and size < LINGER_BYTES:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
                size += len(message.get("body", b""))


def too_large(most: int) -> APIError:
    return APIError(
        413, f"the body is larger than {most} bytes, which is the most that this server takes", "body_too_large"
    )
