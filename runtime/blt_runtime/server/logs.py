"""Logs of the server on stderr, as text or as one JSON object a line. Prompts and answers are never logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

from ..errors import printable

log = logging.getLogger("blt_runtime.server")
LOGGERS = ("blt_runtime", "uvicorn")

Format = Literal["text", "json"]


def start(format: Format) -> None:
    """Sends the logs of the runtime and of uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text("%(asctime)s %(levelname)s %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def request(facts: dict[str, Any]) -> None:
    """Logs one answered request."""
    log.info(
        "%s",
        " ".join(f"{name}={value}" for name, value in facts.items() if value is not None),
        extra={"facts": facts},
    )


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "pid": record.process}
        facts = getattr(record, "facts", None)
        found |= {"event": "request", **facts} if facts else {"event": "log", "message": record.getMessage()}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)
