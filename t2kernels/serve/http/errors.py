"""What a request can fail with: a status, and the body that clients of OpenAI's API expect."""

from __future__ import annotations

from starlette.exceptions import HTTPException

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
}


class APIError(HTTPException):
    """status: of HTTP; message: what was given, what was wanted, what to do; code: a short name for programs; param: the field at fault"""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, headers: dict | None = None
    ):
        super().__init__(status, message, headers)
        self.message, self.code, self.param = message, code, param

    def body(self) -> dict:
        """{"error": {message, type, param, code}}"""
        kind = "rate_limit_error" if self.status_code == 429 else KINDS.get(self.status_code, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A 400."""
    return APIError(400, message, code, param)
