"""runtime/examples/ray_serve.py, with a stand-in for Ray: what it deploys, and the application of a replica."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the serve extra is not installed")

from blt_runtime import Model
from tests.runtime.server.clients import Client, null_model

EXAMPLE = Path(__file__).resolve().parents[2] / "runtime/examples/ray_serve.py"


class Deployment:
    def __init__(self, build: Any, **options: Any) -> None:
        self.build, self.options = build, options

    def bind(self) -> Deployment:
        return self


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each `Model.open`, which opens the null model."""
    found: list[dict[str, Any]] = []

    def open(path: str, **options: Any) -> Model:
        found.append({"path": path, **options})
        return null_model()

    monkeypatch.setattr(Model, "open", open)
    return found


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    ray = ModuleType("ray")
    serve = ModuleType("ray.serve")
    serve.__dict__.update(deployment=Deployment, ingress=lambda build: lambda: build)
    ray.__dict__["serve"] = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    return runpy.run_path(str(EXAMPLE))["app"]


def test_a_replica_answers_as_blt_serve_does(app: Any, opened: list[dict[str, Any]]) -> None:
    deployed = app({"bundle": "/models/demo", "name": "demo", "threads": "2"})
    assert opened == []  # the bundle is opened on the replica
    client = Client(deployed.build())
    answer = client.ok("/v1/completions", prompt="abc", max_tokens=5, model="demo", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5
    assert opened == [{"path": "/models/demo", "batched": True, "threads": 2, "provider": "cpu"}]
    client.app.state.service.scheduler.close()


def test_a_replica_gets_as_many_requests_as_it_runs_and_queues(app: Any) -> None:
    options = app({"bundle": "b", "replicas": "3", "streams": "8", "max_queue": "4", "threads": "2"}).options
    assert options == {
        "name": "blt",
        "num_replicas": 3,
        "max_ongoing_requests": 12,
        "ray_actor_options": {"num_cpus": 2, "num_gpus": 0},
    }


def test_a_replica_on_a_gpu_has_one(app: Any) -> None:
    assert app({"bundle": "b", "provider": "cuda"}).options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
