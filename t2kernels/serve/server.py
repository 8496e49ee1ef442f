"""The process: uvicorn, its log, limits of connections, and a shutdown that finishes the running requests."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from t2kernels.serve.http.errors import AddressError, EngineError

from .app import make_app
from .service import Service

HEADER_SECONDS: float = 15
"""Seconds in which the head of a request must arrive after the connection, or after its first byte."""
READ_BYTES: int = 16 << 10
"""Bytes that are read from a connection at a time. A body in chunks of one byte takes 150 ms for 256 KiB, which asyncio
would read, and nobody else is answered meanwhile."""
WRITE_SECONDS: float = 60
"""Seconds after which a client that reads nothing of its answer is cut off. Its connection would stay for ever."""
LEVELS: tuple[str, ...] = ("debug", "info", "warning", "error")
"""Levels of the log."""


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if the head of a request does not arrive, or if nobody reads an answer.

    uvicorn would wait for ever. h11 takes heads of at most 64 KiB; httptools, which uvicorn prefers where it is
    installed, takes them of any size.
    """

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        transport.max_size = READ_BYTES
        self._waiting: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        before: Any = self.cycle
        super().data_received(data)
        if self.cycle is not before or (before is not None and not before.response_complete):
            self._stop_waiting()  # a request has begun; limits.py watches over its body
        elif self._waiting is None:
            self._wait()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._unread = asyncio.get_running_loop().call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting()
        self._read()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = asyncio.get_running_loop().call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class Server(uvicorn.Server):
    """Serves until a signal ends it.

    The first SIGTERM or SIGINT starts the drain: /health says so and new requests are refused; the sockets stay open.
    The process ends after the last request, or after `drain` seconds. The second signal ends it at once.

    keep_alive: seconds after which an unused connection is closed; connections: at once, further ones get 503
    """

    service: Service
    drain: float
    should_exit: bool
    force_exit: bool
    failed: EngineError | None
    """Why the engine did not start."""

    def __init__(self, service: Service, drain: float, keep_alive: int = 75, connections: int = 1000) -> None:
        config = uvicorn.Config(
            make_app(service),
            http=Connection,
            ws="none",
            loop="asyncio",  # `READ_BYTES` is a setting of its connections
            log_config=None,
            access_log=False,  # access.py writes it
            timeout_keep_alive=keep_alive,
            limit_concurrency=connections,
            timeout_graceful_shutdown=1,  # after the drain every request has been answered; this is for the last bytes
        )
        super().__init__(config)
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
        gc.collect()
        gc.freeze()  # a collection during a request does not look at torch's and the model's million objects
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


def log_to_stderr(level: str) -> None:
    """Write the log of this package and of uvicorn to stderr, from a level on (`LEVELS`)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, least in (("t2kernels", level.upper()), ("uvicorn", "INFO" if level == "debug" else "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


def run(
    service: Service,
    at: socket.socket,
    drain: float = 30.0,
    keep_alive: int = 75,
    connections: int = 1000,
    log_level: str = "info",
) -> None:
    """Serve until a signal ends it.

    at: the socket of `listen`; drain: seconds that running requests have to finish
    keep_alive, connections: as for `Server`; log_level: as for `log_to_stderr`
    Raises EngineError if the model does not run.
    """
    log_to_stderr(log_level)
    server = Server(service, drain, keep_alive, connections)
    server.run(sockets=[at])
    if server.failed is not None:
        raise server.failed
