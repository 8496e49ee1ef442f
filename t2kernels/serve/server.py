"""The process: uvicorn, and an end that finishes what is running."""

from __future__ import annotations

import asyncio
import signal
import socket

import uvicorn

from .app import Service, make_app


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT starts the drain: /health says so and new requests are refused, while the sockets stay open; the
    process ends when the last request has, or after `drain` seconds. The second ends it at once.
    """

    def __init__(self, service: Service, drain: float):
        # What is still connected after the drain has been answered: a second is for the last bytes.
        super().__init__(uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=1))
        self.service, self.drain = service, drain
        self.failed: RuntimeError | None = None
        self._ending: asyncio.Task | None = None

    async def serve(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets=None) -> None:
        try:
            await self.service.engine.start()
        except RuntimeError as error:
            self.failed, self.should_exit = error, True
            return
        await super().startup(sockets)

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


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; before a model is loaded for nothing. Raises OSError, with what to do, if the port is taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(
            error.errno,
            f"cannot listen on {host} port {port} ({error.strerror}); choose another with --host and --port",
        ) from None
    return made


def run(service: Service, at: socket.socket, drain: float = 30.0) -> None:
    """Serve until a signal ends it. at: of `listen`. Raises RuntimeError if the model does not run."""
    server = Server(service, drain)
    server.run(sockets=[at])
    if server.failed is not None:
        raise server.failed
