"""A real server of the null backend in processes of its own, and what it reports. A round takes 5 ms by default."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

REPO = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, signal, sys, time
from pathlib import Path
from blt_runtime.engine.batch import Batch
from blt_runtime.errors import UsageError
from blt_runtime.server import Settings, create_app, logs, run, workers
from tests.runtime.server.clients import null_model
drain, count, fails, seconds, *keys = sys.argv[1:]
plain = Batch.round
def slow(self):
    time.sleep(float(seconds))
    return plain(self)
Batch.round = slow
def lost(number, frame):
    Batch.round = lambda self: sys.exit()
def made():
    if fails and Path(fails).exists():
        raise UsageError("no such\\nmodel")
    signal.signal(signal.SIGUSR1, lost)
    return create_app(null_model(), Settings(name="tiny", streams=2, max_queue=1, api_keys=tuple(keys)))
logs.start("json")
sock = run.bind("127.0.0.1", 0)
options = {"drain": float(drain), "ready": lambda: print(run.url(sock), flush=True)}
workers.FIRST_PAUSE = 0.01
try:
    if count == "1":
        number = run.serve(made(), sock, **options)
    else:
        logging.getLogger("blt_runtime").setLevel("INFO")
        number = workers.serve(made, sock, workers=int(count), **options)
except UsageError as error:
    sys.exit(f"error: {error}")
sys.exit(128 + number)
"""
"""Arguments: seconds of the drain, workers, a file whose presence lets a start fail, seconds of a round, and API
keys."""
Process = subprocess.Popen[str]


@contextlib.contextmanager
def served(
    drain: float = 60.0, *keys: str, workers: int = 1, fails: Path | str = "", seconds: float = 0.005
) -> Iterator[tuple[str, Process]]:
    """The address of a server whose rounds take so many seconds, and its process. SIGUSR1 makes the scheduler of a
    worker end at its next round."""
    with python("-c", PROGRAM, str(drain), str(workers), str(fails), str(seconds), *keys) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process


@contextlib.contextmanager
def python(*arguments: str) -> Iterator[Process]:
    """A Python process on this checkout. It is killed at the end."""
    path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(parent: int) -> set[int]:
    """The processes that it has started and that run."""
    pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
    return {pid for pid in pids if runs(pid) == str(parent)}


def runs(pid: int) -> str | None:
    """The parent of a process that runs; None for one that has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else parent


@contextlib.contextmanager
def answering(pid: int, parent: int) -> Iterator[None]:
    """Inside, this worker alone accepts connections: the others are stopped."""
    others = children(parent) - {pid}
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)


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
