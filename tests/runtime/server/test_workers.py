"""Several workers on one address: their answers, their metrics, and how each of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from blt_runtime.server import run
from blt_runtime.server.workers import LEAVE_TIMES, Listener
from tests.runtime.bundles import write_bundle
from tests.runtime.server.clients import error_of, events_of, null_model, text_of
from tests.runtime.server.servers import Process, answering, children, eventually, metric, python, runs, served

Server = tuple[str, Process]
RUNNING, PROMPTS = "vllm:num_requests_running", "vllm:prompt_tokens_total"
COUNTERS = (PROMPTS, "vllm:generation_tokens_total", "vllm:request_prompt_tokens_count")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(workers=2) as found:
        yield found


def asked(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "abc", "max_tokens": n, "ignore_eos": True} | more


def streamed(url: str, n: int = 250, **more: Any) -> contextlib.AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{url}/v1/completions", json=asked(n, stream=True, **more), timeout=60)


@contextlib.contextmanager
def one_stream(server: Server, worker: int, n: int = 250) -> Iterator[httpx.Response]:
    """A streaming answer of this worker."""
    url, process = server
    with contextlib.ExitStack() as stack:
        with answering(worker, process.pid):
            response = stack.enter_context(streamed(url, n))
        yield response


@contextlib.contextmanager
def one_stream_each(server: Server, n: int = 250) -> Iterator[dict[int, httpx.Response]]:
    """A streaming answer of each worker, by its process id."""
    with contextlib.ExitStack() as stack:
        workers = sorted(children(server[1].pid))
        yield {worker: stack.enter_context(one_stream(server, worker, n)) for worker in workers}


def test_every_worker_answers_as_a_stream_does(server: Server) -> None:
    url, process = server
    stream = null_model().stream()
    stream.append("abc")
    expected = b"".join(stream.generate(12, seed=3, temperature=0.7, stop_at_eos=False)).decode(errors="replace")
    assert len(children(process.pid)) == 2
    for pid in children(process.pid):
        with answering(pid, process.pid):
            body = asked(12, seed=3, temperature=0.7)
            answer = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert answer == expected


def test_metrics_of_any_worker_are_of_all(server: Server) -> None:
    url, process = server
    before = {name: metric(url, name) for name in COUNTERS}
    workers = children(process.pid)
    for pid in workers:
        with one_stream(server, pid, 150) as response:
            eventually(lambda: metric(url, RUNNING) == 1)
            (other,) = workers - {pid}
            with answering(other, process.pid):
                assert metric(url, RUNNING) == 1
                assert metric(url, "vllm:kv_cache_usage_perc") == 1 / 4
            response.read()
    for pid in workers:
        with answering(pid, process.pid):
            added = [metric(url, name) - before[name] for name in COUNTERS]
            assert added == [2 * 3, 2 * 150, 2]
            assert metric(url, "blt:patches_per_latent_call") >= 1


def test_a_killed_worker_is_replaced_and_the_other_serves_on(server: Server) -> None:
    url, process = server
    before, prompts = children(process.pid), metric(url, PROMPTS)
    with one_stream_each(server, 120) as streams:
        killed, kept = streams
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            streams[killed].read()
        assert httpx.post(f"{url}/v1/completions", json=asked(2)).status_code == 200
        events = events_of(streams[kept].read().decode())
        assert len(text_of(events).encode()) >= 1
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    eventually(lambda: len(children(process.pid)) == 2)
    assert children(process.pid) & before == {kept}
    eventually(lambda: metric(url, RUNNING) == 0)
    assert metric(url, PROMPTS) - prompts == 3 * 3  # what the killed worker counted is kept
    (new,) = children(process.pid) - before
    with answering(new, process.pid):
        assert httpx.post(f"{url}/v1/completions", json=asked(2), timeout=60).status_code == 200
        assert metric(url, PROMPTS) - prompts == 4 * 3


def test_a_worker_without_its_scheduler_is_replaced(server: Server) -> None:
    url, process = server
    failed, kept = sorted(children(process.pid))
    os.kill(failed, signal.SIGUSR1)
    with answering(failed, process.pid):
        assert httpx.post(f"{url}/v1/completions", json=asked(2)).status_code == 503
    eventually(lambda: len(children(process.pid) - {failed}) == 2)
    assert kept in children(process.pid)


def test_a_connection_is_left_to_the_worker_with_fewer() -> None:
    sock = run.bind("127.0.0.1", 0)
    open_W = memoryview(bytearray(8)).cast("i")
    more, fewer = (Listener(sock.dup().detach(), open_W, number) for number in (0, 1))
    open_W[0] = 1
    with contextlib.ExitStack() as stack:
        for opened in (sock, more, fewer):
            stack.enter_context(opened)
        more.listen(1)  # of any socket: they are one file
        for _ in range(2):
            stack.enter_context(socket.create_connection(sock.getsockname()))
        with pytest.raises(BlockingIOError):
            more.accept()
        with fewer.accept()[0]:
            assert list(open_W) == [1, 1]
        assert list(open_W) == [1, 0]
        for _ in range(LEAVE_TIMES - 1):
            with pytest.raises(BlockingIOError):
                more.accept()
        with more.accept()[0]:  # the other one does not take it
            assert list(open_W) == [2, 0]
        assert list(open_W) == [1, 0]


def test_sigterm_drains_all_workers_and_frees_the_port() -> None:
    with served(workers=2) as (url, process), one_stream_each((url, process), 100) as streams:
        for pid in streams:  # systemd signals every process of a service
            os.kill(pid, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        for pid in streams:
            with answering(pid, process.pid):
                eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
                assert error_of(httpx.post(f"{url}/v1/completions", json=asked(2)), 503)["code"] == "shutting_down"
        for response in streams.values():
            assert events_of(response.read().decode())[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 143
        with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.1", urlsplit(url).port))
        logged = [json.loads(line) for line in process.communicate()[1].splitlines()]
    assert {line["pid"] for line in logged if line["event"] == "request" and line["status"] == 200} == set(streams)


def test_a_second_signal_ends_all_workers_at_once() -> None:
    with served(workers=2) as (url, process), one_stream_each((url, process)) as streams:
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        for response in streams.values():
            assert events_of(response.read().decode())[-1]["error"]["code"] == "shutting_down"
        assert process.wait(60) == 143


def test_ctrl_c_ends_all_workers_at_once() -> None:
    with served(workers=2) as (url, process), one_stream_each((url, process)) as streams:
        for pid in (*streams, process.pid):  # a terminal signals them all
            os.kill(pid, signal.SIGINT)
        for response in streams.values():
            assert events_of(response.read().decode())[-1]["error"]["code"] == "shutting_down"
        assert process.wait(60) == 130


def test_workers_end_with_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(workers=2) as (url, process):
        assert httpx.get(f"{url}/health").status_code == 200
        workers = children(process.pid)
        assert len(workers) == 2
        assert len(list(tmp_path.iterdir())) == 1  # the metrics
        process.kill()
        eventually(lambda: not any(map(runs, workers)))
    assert not list(tmp_path.iterdir())


def test_replacements_that_fail_at_their_start_end_the_server(tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    with served(workers=2, fails=fails) as (url, process), one_stream_each((url, process), 100) as streams:
        killed, kept = streams
        fails.touch()
        os.kill(killed, signal.SIGKILL)
        assert events_of(streams[kept].read().decode())[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 1
        *lines, error = process.communicate()[1].splitlines()
    assert error == "error: no such model"
    logged = [line["message"] for line in map(json.loads, lines) if line["event"] == "log"]
    assert f"worker {killed} was ended by signal 9; another one starts in 0.01 s" in logged
    assert logged[-1].endswith("ended with exit code 0 (no such model); another one starts in 0.16 s")


def test_a_bundle_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with python("-m", "blt.cli", "serve", str(tmp_path / "bundle"), "--workers", "3", "--port", "0") as process:
        errors = process.communicate()[1]
        assert process.returncode == 4
    assert len(errors.splitlines()) == 1
    assert "no batched graphs" in errors
