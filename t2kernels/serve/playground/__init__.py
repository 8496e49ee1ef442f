"""The playground at `/`: one page, page.html, that asks several experts the same thing.

The page is all that a browser loads: its style and script stand in it, and its policy allows these two by their hash
and nothing else. It asks the server that it came from, with relative addresses, so that it works behind a proxy.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

PAGE: Path = Path(__file__).parent / "page.html"
INLINE: re.Pattern[bytes] = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def add_page(app: FastAPI) -> None:
    """Add the route of the page."""
    page = PAGE.read_bytes()
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": policy(page),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def policy(page: bytes) -> str:
    """The Content-Security-Policy of a page (w3.org/TR/CSP3): its own style and script, and requests to its server."""
    hashes: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for kind, text in INLINE.findall(page):
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{kind.decode()}-src {' '.join(found)}" for kind, found in hashes.items()),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )
