"""A real Triton server, if there is one: which interpreter and program, and a running server on free ports.

The package nvidia-pytriton carries a server. It is used from the interpreter that BLT_TRITON_PYTHON names, or from this
one. That interpreter also needs what `pip install 'blt-runtime[cpu]' tritonclient[grpc]` installs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

REPO = Path(__file__).resolve().parents[2]
FIND = """
import json, sys, sysconfig
import pytriton, tritonclient.grpc, numpy, onnxruntime
folder = pytriton.__path__[0] + "/tritonserver"
print(json.dumps([folder, f"{sys.version_info[0]}.{sys.version_info[1]}", sysconfig.get_path("purelib")]))
"""


@dataclass(frozen=True)
class Installed:
    """folder: of the server. version: of its interpreter. packages: the interpreter's site-packages."""

    python: str
    folder: Path
    version: str
    packages: Path


@cache
def installed() -> Installed | str:
    """The server, or why there is none."""
    python = os.environ.get("BLT_TRITON_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", FIND], capture_output=True, text=True)
    if done.returncode:
        return f"no Triton server in {python}: {done.stderr.strip().splitlines()[-1]} (see BLT_TRITON_PYTHON)"
    folder, version, packages = json.loads(done.stdout)
    return Installed(python, Path(folder), version, Path(packages))


@dataclass(frozen=True)
class Server:
    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        lines = [x for x in httpx.get(f"{self.metrics}/metrics").text.splitlines() if x.startswith(f"{name}{{")]
        return sum(float(line.split()[-1]) for line in lines)

    def idle(self) -> bool:
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0


def environment(found: Installed, folder: Path) -> Path:
    """A virtual environment with the interpreter's packages and this checkout's runtime."""
    subprocess.run([found.python, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{found.version}" / "site-packages"
    (site / "added.pth").write_text(f"{REPO / 'runtime'}\n{found.packages}\n")
    return folder


def backends(found: Installed, folder: Path) -> Path:
    """The backends' folder, with the stub of the interpreter's version in its place."""
    shutil.copytree(found.folder / "backends", folder)
    stub = found.folder / "python_backend_stubs" / found.version / "triton_python_backend_stub"
    shutil.copy(stub, folder / "python" / stub.name)
    return folder


@contextlib.contextmanager
def served(found: Installed, models: Path, work: Path) -> Iterator[Server]:
    """Runs the server until the block ends, then asks it to stop. work: an empty folder."""
    log = work / "log"
    command = [
        str(found.folder / "bin/tritonserver"),
        f"--model-repository={models}",
        f"--backend-directory={backends(found, work / 'backends')}",
    ]
    ports = free_ports()
    for name, port in ports.items():
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    env = os.environ | {
        "PATH": f"{environment(found, work / 'env')}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{found.packages}/nvidia_pytriton.libs:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    with log.open("wb") as out, subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) as process:
        url = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        server = Server(f"http://{url['http']}", url["grpc"], f"http://{url['metrics']}", process, log)
        try:
            ready(server)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports() -> dict[str, int]:
    import socket

    with contextlib.ExitStack() as stack:
        found = {}
        for name in ("http", "grpc", "metrics"):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found[name] = sock.getsockname()[1]
        return found


def ready(server: Server) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text(errors="replace")[-3000:]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.http}/v2/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server was not ready after two minutes")


def grpc_client(found: Installed, server: Server, *requests: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The responses to requests that one gRPC stream sends at once (`grpc_client.py`)."""
    program = Path(__file__).parent / "grpc_client.py"
    command = [found.python, str(program), server.grpc, json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return answer
