"""The process: uvicorn, and a shutdown that finishes the running requests."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from t2kernels.serve.http.errors import AddressError, EngineError

from .app import make_app
from .service import Service


class Server(uvicorn.Server):
    """Serves until a signal ends it.

    The first SIGTERM or SIGINT starts the drain: /health says so and new requests are refused; the sockets stay open.
    The process ends after the last request, or after `drain` seconds. The second signal ends it at once.
    """

    service: Service
    drain: float
    should_exit: bool
    force_exit: bool
    failed: EngineError | None
    """Why the engine did not start."""

    def __init__(self, service: Service, drain: float) -> None:
        # After the drain every request has been answered. One second is for the last bytes.
        super().__init__(uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=1))
        self.service, self.drain = service, drain
        self.failed = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.serve`."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine first, so that a model that does not run is reported before the sockets open."""
        try:
            await self.service.engine.start()
        except EngineError as error:
            self.failed, self.should_exit = error, True
            return
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: drain, or end at once the second time."""
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
    """A bound socket. Call it before a model is loaded. Raises OSError, with what to do, if the port is taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        message = f"cannot listen on {host} port {port} ({error.strerror}); choose another with --host and --port"
        raise AddressError(error.errno, message) from None
    return made


def run(service: Service, at: socket.socket, drain: float = 30.0) -> None:
    """Serve until a signal ends it.

    at: the socket of `listen`; drain: seconds that running requests have to finish
    Raises EngineError if the model does not run.
    """
    server = Server(service, drain)
    server.run(sockets=[at])
    if server.failed is not None:
        raise server.failed
