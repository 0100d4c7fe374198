"""A real Triton server with a written repository, over HTTP and gRPC."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from blt.triton import repository
from blt_runtime import Model
from blt_runtime.ids import OFFSET
from tests.tiny import runs_rows, tiny
from tests.triton import servers
from tests.triton.fake import eventually
from tests.triton.servers import Installed, Server

CAPACITY = 4096


@pytest.fixture(scope="module")
def found() -> Installed:
    found = servers.installed()
    if isinstance(found, str):
        pytest.skip(found)
    if not runs_rows():
        pytest.skip("the installed onnxruntime does not run batched graphs")
    return found


@pytest.fixture(scope="module")
def models(found: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blt_export import export

    folder = tmp_path_factory.mktemp("models")
    export(tiny(), folder / "bundle", capacity=CAPACITY, check=False)
    repository.write(folder / "bundle", folder / "models", "small")
    return folder / "models"


@pytest.fixture(scope="module")
def server(found: Installed, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.served(found, models, tmp_path_factory.mktemp("server")) as server:
        yield server
    log = server.log.read_text(errors="replace")
    assert set(re.findall(r"Signal \((\d+)\)", log)) <= {str(signal.SIGTERM.value)}
    assert not re.findall(r"Traceback|not healthy", log)
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def model(models: Path) -> Model:
    return Model.open(models / "small/1/bundle")


def alone(model: Model, prompt: str, n: int, **options: Any) -> str:
    stream = model.stream()
    stream.append(prompt)
    return b"".join(stream.generate(n, **options)).decode(errors="replace")


def test_http_gives_the_text_of_a_stream_in_one_response(server: Server, model: Model) -> None:
    sent = {"PROMPT": "Once", "MAX_TOKENS": 40, "TEMPERATURE": 0.7, "SEED": 3, "IGNORE_EOS": True}
    answer = httpx.post(f"{server.http}/v2/models/small/generate", json=sent).json()
    assert answer["TEXT"] == alone(model, "Once", 40, temperature=0.7, seed=3, stop_at_eos=False)
    assert bytes(id - OFFSET for id in answer["OUTPUT_IDS"]).decode(errors="replace") == answer["TEXT"]
    assert (answer["FINISH_REASON"], answer["PROMPT_TOKENS"], answer["COMPLETION_TOKENS"]) == ("length", 4, 40)


def test_http_streams_events(server: Server, model: Model) -> None:
    sent = {"PROMPT": "Once", "MAX_TOKENS": 40, "SEED": 3, "STREAM": True, "IGNORE_EOS": True}
    response = httpx.post(f"{server.http}/v2/models/small/generate_stream", json=sent)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert len(events) > 1
    assert "".join(event["TEXT"] for event in events) == alone(model, "Once", 40, seed=3, stop_at_eos=False)
    assert [event["FINISH_REASON"] for event in events[-2:]] == ["", "length"]


def test_grpc_streams_many_requests_at_once(found: Installed, server: Server, model: Model) -> None:
    requests = [
        {"PROMPT": f"prompt {i}", "MAX_TOKENS": 60 + i, "SEED": i, "STREAM": i % 4 > 0, "IGNORE_EOS": True}
        for i in range(32)
    ]
    answers = servers.grpc_client(found, server, *requests)
    for i, answer in enumerate(answers):
        expected = alone(model, f"prompt {i}", 60 + i, seed=i, stop_at_eos=False)
        assert "".join(response["TEXT"] for response in answer) == expected
        assert [response["final"] for response in answer] == [False] * (len(answer) - 1) + [True]
        assert i % 4 > 0 or len(answer) == 1
    assert server.process.poll() is None


def test_an_error_is_of_its_request_alone(found: Installed, server: Server, model: Model) -> None:
    wrong = {"PROMPT": "a", "TEMPERATURE": -1.0}
    refused = httpx.post(f"{server.http}/v2/models/small/generate", json=wrong)
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]
    too_long = httpx.post(f"{server.http}/v2/models/small/generate", json={"PROMPT": "a", "MAX_TOKENS": 10**6})
    assert "exceed" in too_long.json()["error"]
    (bad,), (*good,) = servers.grpc_client(found, server, wrong, {"PROMPT": "b", "MAX_TOKENS": 9, "SEED": 1})
    assert "temperature" in bad["error"]
    assert "".join(response["TEXT"] for response in good) == alone(model, "b", 9, seed=1)


LONG = {"PROMPT": "Once", "MAX_TOKENS": CAPACITY - 10, "STREAM": True, "IGNORE_EOS": True}


def test_a_closed_event_stream_frees_its_row(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    with httpx.stream("POST", f"{server.http}/v2/models/small/generate_stream", json=LONG) as response:
        next(response.iter_lines())
    eventually(lambda: server.metric("vllm:generation_tokens_total") > before and server.idle())
    assert server.metric("vllm:generation_tokens_total") - before < CAPACITY - 10


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_cancelled_grpc_stream_frees_its_row(found: Installed, server: Server, stream: bool) -> None:
    before = server.metric("vllm:generation_tokens_total")
    requests = [LONG | {"cancel": 2}, LONG | {"STREAM": stream}]
    servers.grpc_client(found, server, *requests)
    eventually(lambda: server.metric("vllm:generation_tokens_total") > before and server.idle())
    assert server.metric("vllm:generation_tokens_total") - before < 2 * (CAPACITY - 10)


def test_metrics_are_triton_s(server: Server) -> None:
    before = {name: server.metric(name) for name in ("vllm:prompt_tokens_total", "vllm:request_success_total")}
    sent = {"PROMPT": "four", "MAX_TOKENS": 5, "IGNORE_EOS": True}
    httpx.post(f"{server.http}/v2/models/small/generate", json=sent).raise_for_status()
    eventually(lambda: server.metric("vllm:request_success_total") == before["vllm:request_success_total"] + 1)
    assert server.metric("vllm:prompt_tokens_total") == before["vllm:prompt_tokens_total"] + 4
    assert server.metric("blt:bytes_per_patch") >= 1


def test_stopping_waits_for_running_requests(found: Installed, models: Path, tmp_path: Path, model: Model) -> None:
    sent = LONG | {"MAX_TOKENS": 400, "SEED": 5}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(servers.served(found, models, tmp_path))
        url = f"{server.http}/v2/models/small/generate_stream"
        lines = stack.enter_context(httpx.stream("POST", url, json=sent, timeout=60)).iter_lines()
        first = next(lines)
        server.process.terminate()
        rest = [line for line in (first, *lines) if line.startswith("data: ")]
    assert "".join(json.loads(line[6:])["TEXT"] for line in rest) == alone(
        model, "Once", 400, seed=5, stop_at_eos=False
    )
    assert server.process.returncode == 0
