"""A refusal as OpenAI's clients read it: a status and an error object."""

from __future__ import annotations

from typing import Any

from ep_export.errors import UserError
from ep_export.serving import EngineClosed, EngineFull

__all__ = ["ApiError", "as_api_error"]

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: A sentence for the person who asked.
        code: A word for their program.
        param: Which field of the request is at fault.
        retry_after: Seconds after which the same request may be sent again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers: dict[str, str] = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What the engine, a picture or a prompt was refused with; anything else is the server's own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFull):
        return ApiError(429, str(error), code="engine_full", retry_after=1)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="shutting_down", retry_after=5)
    if isinstance(error, UserError):
        return ApiError(400, f"{error} ({error.hint})" if error.hint else str(error), code="refused")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
