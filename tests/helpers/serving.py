"""Servers for tests: `t2 serve` as a process, and the application in this one."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx2")  # a test file that imports this one is skipped without it

KEY = "a-key-for-tests"
PATIENCE = 60
"""Seconds after which a wait has failed; far more than any of them takes."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. what: the condition in words, for the error if it stays false."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"after {PATIENCE} s it is still not so that {what}"
        time.sleep(0.01)


class Process:
    """`t2 serve ARGS` as a process of its own. client: of httpx, with the key; url: without /v1"""

    def __init__(self, args: list, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "t2kernels", "serve", *map(str, args), "--port", str(self.port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "T2_API_KEY": KEY}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        try:
            wait_until(lambda: self.health() is not None or self.process.poll() is not None, "the server answers")
            assert self.process.poll() is None, "the server has ended"
        except AssertionError as error:
            self.kill()
            raise RuntimeError(f"{error}: {log.read_text()}") from None

    def health(self) -> str | None:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/health").json()["status"]
        return None

    def metrics(self) -> dict[str, float]:
        """{series: value}"""
        lines = self.client.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (re.fullmatch(r"(.*) (\S+)", line).groups() for line in lines if line[0] != "#")
        }

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self.process.kill()
        self.process.wait()
        self.client.close()


@contextlib.contextmanager
def served(change=lambda model, tokenizer: None, process=False, connections=1000, **settings):
    """(client, service) of the built-in model; change(model, tokenizer) before it is served.

    process: as `t2 serve` runs it, with its limits of connections
    """
    import uvicorn

    import t2kernels as t2
    from t2kernels import tiny
    from t2kernels.serve.app import make_app
    from t2kernels.serve.engine.batching import BatchSettings
    from t2kernels.serve.server import Server
    from t2kernels.serve.service import Service, Settings

    model, tokenizer = tiny.load()
    t2.patch_model(model, rows=5)
    change(model, tokenizer)
    batch = BatchSettings(page_size=8, kv_tokens=1024, batch_tokens=32, batch_requests=16)
    service = Service(model, tokenizer, Settings("tiny", tiny=True, batch=batch, **settings), tiny.experts())
    if process:
        server = Server(service, drain=0, connections=connections)
        server.config.port = 0
    else:
        server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server has started")
        assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client, service
    finally:
        server.should_exit = True
        thread.join()
