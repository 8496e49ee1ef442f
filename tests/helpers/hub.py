"""A stand-in for the hub: its HTTP API for one kind of repository, in a thread of this process."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory, {"user/name": {commit: {file: bytes}}}, the newest commit last.

    url: of the server
    token: that a request must carry to write
    requests: [(method, path)] of all requests
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.token = token
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        """Add a commit; its id."""
        commits = self.repos.setdefault(repo, {})
        files = {**(list(commits.values())[-1] if commits else {}), **changes}
        sha = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits[sha] = files
        return sha

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return list(self.repos[repo].values())[-1]

    def close(self) -> None:
        """Stop the server; its port then refuses connections."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, body: bool) -> None:
        self.hub.requests.append((self.command, self.path))
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.path.partition("?")[0])
        if found is None:
            self._send(200, b"" if body else None)
            return
        repo, revision, file = found.groups()
        commits = self.hub.repos.get(repo)
        if not commits:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        sha = revision if revision in commits else list(commits)[-1] if revision == "main" else None
        if sha is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content, at = commits[sha].get(file), {"X-Repo-Commit": sha}
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", **at})
            return
        self._send(
            200, content if body else None, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **at}, len(content)
        )

    def do_POST(self) -> None:
        self.hub.requests.append((self.command, self.path))
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, b'{"error": "Invalid username or password."}')
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(text)
            repo = "/".join(p for p in (asked.get("organization"), asked["name"]) if p)
            taken = repo in self.hub.repos
            if not taken:
                self.hub.commit(repo, {".gitattributes": b""})
            self._json(409 if taken else 200, {"url": f"{self.hub.url}/{repo}", "error": "exists"})
            return
        if path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
            return
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path)
        if found is None or found[1] not in self.hub.repos:
            self._json(404, {"error": "not found"})
        elif found[2] == "preupload":
            names = [f["path"] for f in json.loads(text)["files"]]
            self._json(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            lines = [json.loads(line) for line in text.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.hub.commit(found[1], {v["path"]: base64.b64decode(v["content"]) for v in values})
            self._json(200, {"commitUrl": f"{self.hub.url}/{found[1]}/commit/{sha}", "commitOid": sha, "success": True})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes | None, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header(
            "Content-Length", str(length if content is None and length is not None else len(content or b""))
        )
        self.end_headers()
        self.wfile.write(content or b"")
