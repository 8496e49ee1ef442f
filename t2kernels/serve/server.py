"""The process: uvicorn, and an end that finishes what is running."""

from __future__ import annotations

import asyncio
import signal

import uvicorn

from .app import Service, make_app


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT starts the drain: /health says so and new requests are refused, while the sockets stay open; the
    process ends when the last request has, or after `drain` seconds. The second ends it at once.
    """

    def __init__(self, service: Service, host: str, port: int, drain: float, log_level: str = "warning"):
        # What is still connected after the drain has been answered: a second is for the last bytes.
        super().__init__(uvicorn.Config(make_app(service), host=host, port=port, log_level=log_level, timeout_graceful_shutdown=1))
        self.service, self.drain = service, drain
        self._ending: asyncio.Task | None = None

    async def serve(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame) -> None:
        if self.service.engine.draining or not self.started:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
        else:
            self.service.engine.draining = True
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._ending = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self.service.engine.drain(self.drain)
        self.should_exit = True


def run(service: Service, host: str, port: int, drain: float = 30.0) -> None:
    """Serve until a signal ends it. Raises RuntimeError if generation cannot start, OSError if the port is taken."""
    server = Server(service, host, port, drain)
    server.run()
    if not server.started:
        raise RuntimeError(service.engine.failure or f"the server did not start: is port {port} of {host} free?")
