"""Checks before the API: the key, and the size of the body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError

OPEN: tuple[str, ...] = ("/health", "/metrics")
"""Paths that need no key: monitoring has none."""
LINGER_BYTES: int = 64 << 20
"""Bytes of a refused body that are still read, so that its sender receives the answer."""
LINGER_SECONDS: float = 5
"""Seconds during which they are read."""


class RequireKey:
    """ASGI middleware: answers 401 unless the request has the header `Authorization: Bearer KEY`.

    The comparison takes constant time.
    """

    app: ASGIApp
    key: bytes

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then pass the request on."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(key.strip(), self.key) or scheme.lower() != b"bearer":
                message = "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'"
                error = APIError(401, message, "invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class LimitBody:
    """ASGI middleware: answers 413 if the body is too long, by its announced length or while it arrives.

    most: bytes of a body; uploads: bytes of an uploaded expert, which is larger than a prompt
    """

    app: ASGIApp
    most: int
    uploads: int

    def __init__(self, app: ASGIApp, most: int, uploads: int) -> None:
        self.app, self.most, self.uploads = app, most, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the announced length, then pass the request on and count what arrives."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.uploads if scope["path"] == "/v1/experts" else self.most
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > most:
            await discard(receive)
            error = _too_large(most)
            await JSONResponse(error.body(), error.status_code, {"Connection": "close"})(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > most:
                    if message.get("more_body"):
                        await discard(receive)
                    raise _too_large(most)
            return message

        await self.app(scope, counted, send)


async def discard(receive: Receive) -> None:
    """Read the rest of a body and forget it, up to a limit.

    A connection that is closed with unread bytes is reset, and its client would not receive the answer.
    """
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while more and size < LINGER_BYTES:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
                size += len(message.get("body", b""))


def _too_large(most: int) -> APIError:
    return APIError(413, f"the body is larger than {most} bytes, the limit of this server", "body_too_large")
