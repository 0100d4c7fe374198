"""Reads the body of a request, within limits of type, size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from .errors import RequestError

SECONDS = 30.0
"""Within which a body must arrive."""


async def read_body(request: Request, most: int) -> bytes:
    """Up to `most` bytes. Raises RequestError: 415 for another type than JSON, 413 for more bytes, 408 for a slow
    client.

    A page of another origin can send `text/plain` without the browser's asking the server, but not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("send the body as Content-Type: application/json", status=415)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {SECONDS:g} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client closed the connection", status=499) from None
    return bytes(body)


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body is larger than {most:,} bytes", status=413, code="body_too_large")
