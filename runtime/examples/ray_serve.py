"""Serve a bundle with Ray Serve: the HTTP interface of `blt serve`, in as many replicas as wanted.

    pip install 'ray[serve]' 'blt-runtime[cpu,serve]'
    cd runtime/examples
    serve run ray_serve:app bundle=/models/demo name=demo replicas=2 threads=4

Arguments: bundle (the folder, on every node), name (of the model), replicas (1), threads (of each replica: 1), streams
(requests that run at a time in each replica: 16), max_queue (requests that wait in each: 256) and provider (cpu, or
cuda for a bundle of the flavour cuda and a GPU for each replica, with blt-runtime[gpu]).
"""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.applications import Starlette

from blt_runtime import Model
from blt_runtime.server import Settings, create_app


def app(arguments: dict[str, str]) -> Any:
    """What `serve run` deploys. Each replica opens the bundle, and runs its requests in one batch."""
    bundle, threads, provider = arguments["bundle"], int(arguments.get("threads", 1)), arguments.get("provider", "cpu")
    settings = Settings(
        name=arguments.get("name", "blt"),
        streams=int(arguments.get("streams", 16)),
        max_queue=int(arguments.get("max_queue", 256)),
    )

    def build() -> Starlette:
        return create_app(Model.open(bundle, batched=True, threads=threads, provider=provider), settings)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name=settings.name,
        num_replicas=int(arguments.get("replicas", 1)),
        max_ongoing_requests=settings.streams + settings.max_queue,  # Ray's default of 5 would leave rows empty
        ray_actor_options={"num_cpus": threads, "num_gpus": int(provider != "cpu")},
    )
    return deployment.bind()
