"""Checks before the API: the key, and the size of the body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError, bad

OPEN: tuple[str, ...] = ("/health", "/metrics")
"""Paths that need no key: monitoring has none."""
PAGE: str = "/"
"""The playground needs none either: a browser cannot send one for a page. The page asks for it."""
LINGER_BYTES: int = 64 << 20
"""Bytes of a refused body that are still read, so that its sender receives the answer."""
BODY_SECONDS: float = 30
"""Seconds in which a body must arrive, and one more for each `BODY_RATE` bytes of it."""
BODY_RATE: int = 16 << 10
LINGER_SECONDS: float = 5
"""Seconds during which they are read."""
UPLOADS: str = "/v1/experts"
"""Path that takes files, unless the body is JSON."""
MOST_PARTS: int = 100_000
"""Lists, objects and named fields of a JSON body. More would keep the event loop, and so every client, waiting."""
MOST_VALUES: int = 500_000
"""Values of a JSON body, such as token ids."""


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
        if scope["type"] == "http" and scope["path"] not in (*OPEN, PAGE):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(key.strip(), self.key) or scheme.lower() != b"bearer":
                message = "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'"
                error = APIError(401, message, "invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class CheckOrigin:
    """ASGI middleware: answers 403 to requests that a web page of another site made a browser send.

    Without it any page could replace an expert of a server on the same machine: a browser sends simple requests to
    other sites without asking them. hosts, origins: as in `Settings`
    """

    app: ASGIApp
    hosts: tuple[str, ...]
    origins: tuple[str, ...]

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = ()) -> None:
        self.app, self.hosts, self.origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the headers Host and Origin, then pass the request on."""
        if scope["type"] == "http":
            given = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
            host, origin = given.get(b"host", ""), given.get(b"origin")
            message = None
            if self.hosts and _name(host) not in self.hosts:
                message = f"the host {host!r} is not served here: start the server with --allow-host, or with --api-key"
            elif origin is not None and origin not in self.origins and origin.partition("://")[2] != host:
                message = f"web pages of {origin!r} may not use this server: start it with --allow-origin {origin}"
            if message is not None:
                error = APIError(403, message, "forbidden_origin")
                await JSONResponse(error.body(), 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


class LimitBody:
    """ASGI middleware: answers 413 if the body is too long, by its announced length or while it arrives.

    It answers 408 if the body arrives too slowly, and 400 if it has more parts than JSON is read with.

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
        uploading = scope["path"] == UPLOADS and not _is_json(scope)
        most = self.uploads if uploading else self.most
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > most:
            await discard(receive)
            error = _too_large(most)
            await JSONResponse(error.body(), error.status_code, {"Connection": "close"})(scope, receive, send)
            return
        size, whole, joined, begun = 0, False, False, time.monotonic()

        async def counted() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the end of the connection, at any time
                return await receive()
            try:
                async with asyncio.timeout(begun + BODY_SECONDS + size / BODY_RATE - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                reason = f"the body did not arrive: {size} bytes in {time.monotonic() - begun:.0f} s"
                raise APIError(408, reason, "body_too_slow", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
                size += len(message.get("body", b""))
                if size > most:
                    if message.get("more_body"):
                        await discard(receive)
                    raise _too_large(most)
            return message

        async def in_one() -> Message:
            nonlocal joined
            if joined:
                return await counted()
            joined, pieces = True, []
            while not whole:
                message = await counted()
                if message["type"] != "http.request":
                    return message
                pieces.append(message.get("body", b""))
            body = b"".join(pieces)
            if _too_many(body):  # perhaps only in its texts
                await asyncio.to_thread(check_parts, body)
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, counted if uploading else in_one, send)


def _is_json(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower() == b"application/json"


def check_parts(body: bytes) -> None:
    """Raise APIError 400 if a JSON body has too many parts to be read at once. It is not parsed for that."""
    outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]  # of texts
    if found := _too_many(b"".join(outside)):
        raise bad(f"the body has more than {found}, the limit of this server", code="body_too_large")


def _too_many(text: bytes) -> str | None:
    if sum(map(text.count, (b"[", b"{", b":"))) > MOST_PARTS:
        return f"{MOST_PARTS} lists, objects and fields"
    return f"{MOST_VALUES} values" if text.count(b",") > MOST_VALUES else None


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
