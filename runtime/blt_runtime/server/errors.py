"""Errors of requests: each is one JSON object with a status, as OpenAI's clients expect it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ..errors import BltError, CapacityError, InputError, OutOfMemory, QueueFull, UsageError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(BltError):
    """A request that gets no answer.

    status: of HTTP. param: the field that is wrong. code: a word for programs. retry_after: seconds after which the
    client may try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def shutting_down() -> RequestError:
    """The error of a request that a server which ends does not answer."""
    return RequestError("the server is shutting down", status=503, code="shutting_down", retry_after=5)


def refusal(error: BltError) -> RequestError:
    """The error of a request for an error of the runtime."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CapacityError):
        return RequestError(str(error), code="context_length_exceeded")
    if isinstance(error, UsageError | InputError):
        return RequestError(str(error))
    if isinstance(error, QueueFull):
        return RequestError(str(error), status=429, code="queue_full", retry_after=1)
    if isinstance(error, OutOfMemory):
        return RequestError(str(error), status=503, code="out_of_memory", retry_after=1)
    return RequestError(str(error), status=500)


@contextlib.contextmanager
def about(param: str) -> Any:
    """Errors of the runtime inside the block are about the field `param`."""
    try:
        yield
    except RequestError:
        raise
    except (UsageError, InputError) as error:
        raise RequestError(str(error), param=param) from error
