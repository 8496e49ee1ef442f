"""JSON answers that are too large to be made on the event loop: it would answer nobody else meanwhile.

A million numbers take json half a second, and it lets no other thread run before it is done. `encode` writes the same
text in pieces, on a thread, between which the event loop goes on.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import JSONResponse, Response

MANY: int = 2000
"""Entries (numbers, texts, log-probabilities) of an answer above which it is made on a thread: about 2 ms of work."""


def encode(body: Any) -> bytes:
    """The JSON of a body, as `JSONResponse` writes it. Other threads run meanwhile. Raises ValueError for NaN."""
    pieces = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(pieces.iterencode(body)).encode()


async def respond_json(body: Any, entries: int) -> Response:
    """The response with a body of so many entries."""
    if entries <= MANY:
        return JSONResponse(body)
    return Response(await asyncio.to_thread(encode, body), media_type="application/json")
