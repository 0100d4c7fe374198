"""The ASGI application: routes, and what surrounds every request. One `Scheduler` runs the requests of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.batch import fitted
from ..errors import BltError
from ..grammar import Grammar
from ..ids import decode
from ..model import Model
from ..scheduler import Scheduler
from . import logs, openapi, page
from .admission import Admission, Deadline
from .answers import Answer, ChatAnswer, CompletionAnswer, Json
from .bodies import read_body
from .chat import Template
from .errors import RequestError, refusal
from .grammars import Grammars
from .keys import Keys
from .metrics import CONTENT_TYPE, Metrics
from .plan import Plan, plan_chat, plan_completion
from .prompts import SPECIALS, Prompt, ids_of, token_text
from .running import EventResponse, Run
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, Generation, TokenizeRequest, parse
from .settings import Settings

log = logging.getLogger("blt_runtime.server")
Handler = Callable[[Request], Awaitable[Response]]
QUIET = ("/health", "/ready", "/metrics")
"""Addresses that are asked every few seconds: they are not logged."""


class Service:
    """What the handlers share: the scheduler, and the state of the server.

    ready: False until the first byte could be generated, and while the server drains.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.settings, self.model = settings, model
        self.capacity = fitted(model.spec, settings.capacity).capacity_bytes
        stored = None if model.manifest is None else model.manifest.chat_template
        self.template = Template(stored if settings.chat_template is None else settings.chat_template)
        self.grammars = Grammars()
        self.keys = Keys(settings.api_keys)
        self.admission = Admission(settings.streams)
        self.metrics = Metrics(settings.name, self.capacity, settings.streams)
        self.created = int(time.time())
        self.scheduler = Scheduler(
            model,
            streams=settings.streams,
            capacity=settings.capacity,
            waiting=settings.max_queue,
            prefix_bytes=settings.prefix_bytes,
        )

    # --- generation --------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = parse(CompletionRequest, await read_body(request, self.settings.max_body))
        self._check_model(body.model)
        plan = plan_completion(body, await self._matched(request, body))
        answer = CompletionAnswer(self.settings.name, logprobs=plan.logprobs, patches=plan.patches)
        return await self._answered(request, body, plan, answer)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = parse(ChatRequest, await read_body(request, self.settings.max_body))
        self._check_model(body.model)
        prompt = await self._rendered(request, body)
        plan = plan_chat(body, prompt, self.template.stop, await self._matched(request, body))
        answer = ChatAnswer(self.settings.name, logprobs=plan.logprobs, patches=plan.patches)
        return await self._answered(request, body, plan, answer)

    async def _matched(self, request: Request, body: Generation) -> Grammar | None:
        """What the answer must match."""
        async with self._deadline(request).around():
            return await self.grammars.of(body)

    async def _rendered(self, request: Request, body: ChatRequest | TokenizeRequest) -> bytes:
        """The messages of a chat as a prompt."""
        async with self._deadline(request).around():
            return await self.template.render(body.messages or [], body.add_generation_prompt is not False)

    def _deadline(self, request: Request) -> Deadline:
        return Deadline(self.settings.deadline, request.state.arrived)

    async def _answered(self, request: Request, body: Generation, plan: Plan, answer: Answer) -> Response:
        facts, deadline = request.state.facts, self._deadline(request)
        run = Run(self.admission, self.metrics, self.scheduler, answer, deadline=deadline, facts=facts)
        holder = self.keys.holder(request) if self.settings.isolate_keys else None
        run.submit(plan, self.capacity, holder)
        if body.stream:
            return EventResponse(run, body.stream_options is not None and bool(body.stream_options.include_usage))
        return await run.whole(request.receive)

    # --- everything else ---------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{id}"""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> Json:
        facts = {"id": self.settings.name, "object": "model", "created": self.created, "owned_by": "blt"}
        return {**facts, "max_model_len": self.capacity, "patch_rule": self.model.spec.patch_rule.to_dict()}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"the model {name!r} does not exist; this server has {self.settings.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        body = parse(TokenizeRequest, await read_body(request, self.settings.max_body))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give prompt or messages, and not both", param="prompt")
        if body.messages is not None:
            text = await self._rendered(request, body)
        else:
            text = (body.prompt or "").encode()
        prompt = Prompt.of(text)
        tokens = (prompt.ids if body.add_special_tokens else prompt.sent).tolist()
        if body.prompt in SPECIALS:  # lm-eval asks for the ids of bos_token and eos_token
            tokens = [SPECIALS.index(body.prompt)]
        found = {"count": len(tokens), "max_model_len": self.capacity, "tokens": tokens}
        names = {"token_strs": [token_text(id) for id in tokens]} if body.return_token_strs else {}
        return JSONResponse(found | names)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        body = parse(DetokenizeRequest, await read_body(request, self.settings.max_body))
        self._check_model(body.model)
        return JSONResponse({"prompt": decode(ids_of(body.tokens, "tokens")).decode(errors="replace")})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info"""
        return JSONResponse(
            {
                "tokenizer_class": "ByteTokenizer",
                "bos_token": "<|bos|>",
                "eos_token": "<|eos|>",
                "pad_token": "<|boe|>",
                "add_bos_token": True,
                "vocab_size": self.model.spec.vocab_size,
                "model_max_length": self.capacity,
                "chat_template": self.template.source,
            }
        )

    async def health(self, request: Request) -> Response:
        """GET /health: the process answers, and its scheduler runs."""
        return Response() if self.scheduler.alive else Response(status_code=503)

    async def ready(self, request: Request) -> Response:
        """GET /ready: new requests are accepted."""
        if self.admission.draining or not self.scheduler.alive:
            return Response(status_code=503)
        return Response()

    async def version(self, request: Request) -> Response:
        """GET /version"""
        return JSONResponse({"version": _version()})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json"""
        return JSONResponse(self._document)

    @functools.cached_property
    def _document(self) -> Json:
        return openapi.document(_version(), keys=bool(self.settings.api_keys))

    async def metrics_text(self, request: Request) -> Response:
        """GET /metrics"""
        return PlainTextResponse(self.metrics.text(self.scheduler), headers={"content-type": CONTENT_TYPE})


class Surroundings:
    """Around every request: its id, one line in the log, and errors as JSON."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status, begun = time.perf_counter(), 500, False
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(facts=facts, arrived=asyncio.get_running_loop().time())
        number = _request_id(Headers(scope=scope).get("x-request-id"))

        async def sent(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            log.error("an unexpected error in %s %s", scope["method"], scope["path"], exc_info=error)
            if begun:
                raise
            failed = RequestError("the server failed with an unexpected error: see its log", status=500)
            await _json_error(failed)(scope, receive, sent)
        finally:
            if scope["path"] not in QUIET:
                seconds = round(time.perf_counter() - started, 4)
                about = {"request_id": number, "method": scope["method"], "path": scope["path"][:200]}
                logs.request({**about, "status": status, "seconds": seconds, **facts})


def _version() -> str:
    for name in ("blt-runtime", "blt-lm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def _request_id(given: str | None) -> str:
    return given if given and len(given) <= 64 and given.isascii() and given.isprintable() else uuid.uuid4().hex


def _json_error(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=dict(error.headers()))


async def _refused(request: Request, error: Exception) -> Response:
    """The response for an error of a handler."""
    if isinstance(error, HTTPException):
        method = f"{request.method} {request.url.path[:200]}"
        message = f"{method}: no such address" if error.status_code == 404 else f"{method}: {error.detail}"
        made = _json_error(RequestError(message, status=error.status_code))
        made.headers.update(error.headers or {})
        return made
    assert isinstance(error, BltError)
    failed = refusal(error)
    request.state.facts["error"] = str(failed)
    return _json_error(failed)


def create_app(model: Model, settings: Settings | None = None) -> Starlette:
    """The ASGI application that serves a model opened with `batched=True`. `app.state.service` is the `Service`; its
    scheduler is closed when the application shuts down.

    Example:
        app = create_app(Model.open("bundle", batched=True), Settings(name="demo"))
        uvicorn.run(app)

    Raises UsageError for settings that do not fit the model, and OutOfMemory.
    """
    settings = settings or Settings()
    service = Service(model, settings)

    def guarded(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            service.keys.holder(request)
            return await handler(request)

        return checked

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.metrics.refreshed(service.scheduler):
            yield
        service.grammars.close()
        service.template.close()
        await asyncio.to_thread(service.scheduler.close)

    post, get = ["POST"], ["GET"]
    routes = [
        Route("/v1/completions", guarded(service.completions), methods=post),
        Route("/v1/chat/completions", guarded(service.chat), methods=post),
        Route("/v1/models", guarded(service.models), methods=get),
        Route("/v1/models/{name:path}", guarded(service.one_model), methods=get),
        Route("/tokenize", guarded(service.tokenize), methods=post),
        Route("/detokenize", guarded(service.detokenize), methods=post),
        Route("/tokenizer_info", guarded(service.tokenizer_info), methods=get),
        Route("/health", service.health, methods=get),
        Route("/ready", service.ready, methods=get),
        Route("/version", service.version, methods=get),
        Route("/metrics", service.metrics_text, methods=get),
        Route("/openapi.json", service.openapi, methods=get),
    ]
    routes += page.routes()
    middleware = [Middleware(Surroundings)]
    if settings.cors:
        origins, methods = list(settings.cors), ["GET", "POST"]
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"]))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _refused, BltError: _refused},
    )
    app.state.service = service
    return app
