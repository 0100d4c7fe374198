"""API keys: compared in constant time, as digests, so that neither content nor length shows in the time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import HTTPConnection

from .errors import RequestError


class Keys:
    """The keys of a server; none lets everybody in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def holder(self, connection: HTTPConnection) -> int | None:
        """Which key a request brings in `Authorization: Bearer KEY`; None if the server has none. Raises
        RequestError."""
        if not self._digests:
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        found = [at for at, known in enumerate(self._digests) if hmac.compare_digest(digest, known)]
        if not found or scheme.lower() != "bearer":
            raise RequestError(
                "a valid API key is needed: send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
        return found[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
