"""Errors of a server: `APIError` answers one request; the others stop the server before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from t2kernels import T2Error

KINDS: dict[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""HTTP status -> `type` of the error in OpenAI's API. Any other is an "invalid_request_error" below 500, else a
"server_error"."""


class EngineError(T2Error, RuntimeError):
    """The model cannot be served by this engine."""


class SettingsError(T2Error, ValueError):
    """The settings of the server do not fit the model or the experts."""


class AddressError(T2Error, OSError):
    """The server cannot listen on its address."""


class APIError(HTTPException):
    """An error that answers a request, with the body that clients of OpenAI's API expect.

    status: HTTP status
    message: what was given, what was expected, what to do
    code: short name for programs
    param: name of the field that is wrong
    headers: of the response
    """

    message: str
    code: str | None
    param: str | None

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.code, self.param = message, code, param

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}"""
        kind = KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """An `APIError` of status 400."""
    return APIError(400, message, code, param)
