"""Serves a bundle over HTTP, as OpenAI's and vLLM's clients expect it (extra `serve`).

    from blt_runtime import Model
    from blt_runtime.server import Settings, create_app

    app = create_app(Model.open("bundle", batched=True), Settings(name="demo"))  # an ASGI application

`blt serve BUNDLE` runs it in uvicorn (`run`), in one process or in several (`workers`).
"""

from __future__ import annotations

from ..errors import MissingExtra

try:
    from . import logs, run, workers
    from .app import Service, create_app
    from .settings import Settings
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("blt_runtime"):
        raise
    raise MissingExtra(error.name.partition(".")[0], "serve") from error

__all__ = ["Service", "Settings", "create_app", "logs", "run", "workers"]
