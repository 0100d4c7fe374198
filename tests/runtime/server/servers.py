"""A real server of the null backend in a process of its own, and what it reports. A round takes 5 ms."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

REPO = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys, time
from blt_runtime.engine.batch import Batch
from blt_runtime.server import Settings, create_app, logs, run
from tests.runtime.server.clients import null_model
plain = Batch.round
def slow(self):
    time.sleep(0.005)
    return plain(self)
Batch.round = slow
logs.start("json")
sock = run.bind("127.0.0.1", 0)
app = create_app(null_model(), Settings(name="tiny", streams=2, max_queue=1, api_keys=tuple(sys.argv[2:])))
ready = lambda: print(run.url(sock), flush=True)
sys.exit(128 + run.serve(app, sock, drain=float(sys.argv[1]), ready=ready))
"""
Process = subprocess.Popen[str]


@contextlib.contextmanager
def served(drain: float = 60.0, *keys: str) -> Iterator[tuple[str, Process]]:
    path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
    command = [sys.executable, "-c", PROGRAM, str(drain), *keys]
    env = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def metric(url: str, name: str) -> float:
    values = [
        line.split()[-1] for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name}{{")
    ]
    return sum(map(float, values))


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def idle(url: str) -> bool:
    return metric(url, "vllm:num_requests_running") + metric(url, "vllm:num_requests_waiting") == 0
