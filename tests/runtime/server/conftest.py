"""One application on the null backend for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blt_runtime.server import Settings, create_app
from tests.runtime.server.clients import Client, null_model


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    app = create_app(null_model(), Settings(name="tiny", streams=4, max_queue=64))
    yield Client(app)
    app.state.service.scheduler.close()
