"""`Uploads`: experts that clients send to a running server as bytes. They stay in memory, and leave when nothing uses
them."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import NameRefused, check_name
from t2kernels.integrations.vllm.rollouts import memory

from .served import Refused, ServedExperts

MOST = 256
"""Experts in memory at a time."""


class Uploads:
    """served: the server's experts, where the uploaded ones are served beside those of files"""

    def __init__(self, served: ServedExperts) -> None:
        self.served: ServedExperts = served
        self._lock = asyncio.Lock()
        self._there: dict[str, Expert] = {}  # address -> expert, of all that are in the workers

    async def take(self, name: str, data: bytes, wanted: str | None) -> str:
        """Serve the expert that `memory.pack` made. wanted: its digest; None: not checked. Returns its digest.

        Each worker takes it and compares the digest, before the first request can ask for it. A name that is served
        gets the new one. Raises Refused, and then nothing has changed.
        """
        try:
            check_name(name, version=True)
            expert = await asyncio.to_thread(memory.unpack, data)
        except (ExpertError, NameRefused) as e:
            raise Refused(HTTPStatus.BAD_REQUEST, str(e)) from None
        found = expert.digest()
        if wanted is not None and found != wanted:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name!r} arrived with digest {found}, not {wanted}; send it again")
        where = memory.address_of(name, expert)
        async with self._lock:  # a sweep in between would take it for one that is not served any more
            await self._sweep()
            if where not in self._there and len(self._there) >= MOST:
                raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, f"{MOST} uploaded experts are in use; unload some")
            self._there[where] = expert
            memory.keep(where, expert)
            try:
                await self.served.call("t2_take_row", where, data)
                await self.served.serve(name, where)
            except BaseException:
                await self._sweep()
                raise
        return found

    async def sweep(self) -> None:
        """Forget those that are not served any more, and that no request waits for or runs with."""
        async with self._lock:
            await self._sweep()

    async def _sweep(self) -> None:
        used = self.served.used()
        for where in [w for w in self._there if not any(w in path for path in used)]:
            del self._there[where]
            memory.drop(where)  # before the workers: a request that comes now is refused, and never reaches them
            await self.served.call("t2_drop_row", where)
