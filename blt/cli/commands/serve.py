"""`blt serve`: answers HTTP requests with a bundle, as OpenAI's and vLLM's servers do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt.cli import console, inputs, models, options
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOG_FORMATS = ("text", "json")


def _api_keys(given: list[str]) -> tuple[str, ...]:
    """The keys, those of files (`@FILE`, one a line) in their place. Raises UsageError."""
    found: list[str] = []
    for key in given:
        found += inputs.text_file(Path(key[1:]), "--api-key").split() if key.startswith("@") else [key]
    if given and not found:
        raise UsageError("--api-key: the file holds no key; write one a line")
    return tuple(found)


@options.verbosity
@options.takes(options.ModelOptions, *options.BATCHED)
def serve(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE",
            callback=options.model_or_bundle,
            help="A bundle with batched graphs, a hub name, or engines with batched streams (blt build).",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, envvar="BLT_PORT", help="Port; 0 chooses a free one.")] = 8000,
    streams: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait before one is refused (429).")] = 256,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of one stream (default: the bundle's).")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY|@FILE",
            envvar="BLT_API_KEY",
            help="Key that requests must bring; @FILE holds one a line; repeatable (default: none needed).",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name in requests (default: the folder's or the hub's)."),
    ] = None,
    isolate_keys: Annotated[
        bool, typer.Option("--isolate-keys", help="Requests with different keys share no beginnings of prompts.")
    ] = False,
    prefix_cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for beginnings of prompts that requests share; 0 for none.")
    ] = "256M",
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time of a request.")] = 600.0,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="At SIGTERM, the longest wait for running requests.")
    ] = 25.0,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest body of a request (413).")] = "4M",
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web pages of this origin may call; * for all; repeatable (default: none)."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the address; --streams and --max-queue are of each.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each worker (default: the cores, divided by the workers).")
    ] = None,
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line.")] = "text",
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of chats (default: the bundle's, or `role: content` lines)."),
    ] = None,
    *,
    how: options.ModelOptions,
) -> None:
    """Serve BUNDLE over HTTP: completions and chat completions, as OpenAI's and vLLM's clients expect them."""
    if log_format not in LOG_FORMATS:
        raise UsageError(f"--log-format {log_format}: choose one of {', '.join(LOG_FORMATS)}")
    from blt.checkpoint import hub
    from blt_runtime.server import Settings, create_app, logs, run
    from blt_runtime.server import workers as processes

    settings = Settings(
        name=served_model_name or hub.model_name(model),
        streams=streams,
        max_queue=max_queue,
        capacity=None if capacity is None else options.parse_size(capacity, "--capacity", at_least=2),
        prefix_bytes=options.parse_size(prefix_cache, "--prefix-cache"),
        api_keys=_api_keys(api_key or []),
        isolate_keys=isolate_keys,
        deadline=deadline,
        max_body=options.parse_size(max_body, "--max-body", at_least=1),
        cors=tuple(cors or ()),
        chat_template=None if chat_template is None else inputs.text_file(chat_template, "--chat-template"),
    )
    if workers == 1:  # several open the bundle themselves: a process with a session has threads and must not fork
        models.check_batched(model, how, streams)
    sock = run.bind(host, port)
    logs.start("json" if log_format == "json" else "text")

    def made() -> Starlette:
        share = threads if threads or workers == 1 else max(1, len(os.sched_getaffinity(0)) // workers)
        return create_app(models.open_batched(model, replace(how, threads=share)), settings)

    def ready() -> None:
        among = "" if workers == 1 else f" with {workers} workers"
        console.to_stderr(f"{settings.name} is ready at {run.url(sock)}{among} (Ctrl-C ends it)")

    if workers == 1:
        number = run.serve(made(), sock, drain=drain, ready=ready)
    else:
        number = processes.serve(made, sock, workers=workers, drain=drain, ready=ready)
    raise typer.Exit(128 + number if number else 0)
