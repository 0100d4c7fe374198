"""A FastAPI application that batches its requests: uvicorn fastapi_app:app

Needs `pip install 'blt-runtime[cpu]' fastapi uvicorn`, and a bundle with batched graphs in BLT_BUNDLE (with [gpu] and
BLT_PROVIDER=cuda one of the flavour cuda). Then:

    curl -N http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'

writes the text as it is generated. A client that disconnects ends its request.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from blt_runtime import BltError, Model, Scheduler
from blt_runtime.errors import QueueFull


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    bundle, provider = os.environ.get("BLT_BUNDLE", "bundle"), os.environ.get("BLT_PROVIDER", "cpu")
    model = Model.open(bundle, provider=provider, batched=True)
    with Scheduler(model, streams=16) as app.state.scheduler:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/generate")
async def generate(
    http: Request,
    prompt: Annotated[str, Body()],
    n: Annotated[int, Body()] = 200,
    temperature: Annotated[float, Body()] = 0.8,
    seed: Annotated[int | None, Body()] = None,
) -> StreamingResponse:
    scheduler: Scheduler = http.app.state.scheduler
    request = scheduler.submit(prompt, n, temperature=temperature, seed=seed)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in request:  # cancelled if the client disconnects
            yield piece

    return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")


@app.exception_handler(BltError)
async def refused(_: Request, error: BltError) -> JSONResponse:
    """Wrong values and full queues, before any byte is sent."""
    return JSONResponse({"detail": str(error)}, 503 if isinstance(error, QueueFull) else 400)
