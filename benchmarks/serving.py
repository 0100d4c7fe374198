"""A server under load, cancelled requests, slow readers and half-open connections; and how fast it reacts.

    python benchmarks/serving.py BUNDLE                                    # all stages, five minutes of load
    python benchmarks/serving.py BUNDLE --stages cancel,gap --rounds 100
    python benchmarks/serving.py BUNDLE --stages load --connections 200 --seconds 300
    python benchmarks/serving.py --stages load BUNDLE -- --workers 2       # options of blt serve are last

The script starts `blt serve BUNDLE` on a free port of the loopback device and measures from outside, with plain
sockets. Stages:

equal        greedy and seeded texts over HTTP are those of `Stream`
cancel       a client disconnects while its text streams: milliseconds until the server runs no request
gap          gaps between the chunks of one stream, alone and while other requests' prompts are read
load         connections that send requests one after another: bytes/s, statuses, and seeded texts that must not differ
storm        connections that leave at random moments
slow         clients that read almost nothing, beside one that reads
half-open    connections that send half a request, beside one that sends whole ones

After each stage the server must run no request, hold no more files than before, and answer. Exit code 1 if not, and
for any status but 200 and 429.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blt_runtime import Model

Stage = Callable[["Bench"], Awaitable[str]]
PROMPTS = ("Once upon a time", "def main(", "Größe ", "日本語の", "a" * 300, "The quick brown fox. " * 20)
READY = re.compile(r"http://127\.0\.0\.1:(\d+)")


class Wrong(Exception):
    """The server did something that it must not do."""


@dataclass
class Bench:
    """One running server, and what is asked of it."""

    bundle: Path
    process: asyncio.subprocess.Process
    port: int
    connections: int
    seconds: float
    rounds: int
    statuses: Counter[int] = field(default_factory=Counter)

    # --- one request -------------------------------------------------------------------------------------------

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, writer: asyncio.StreamWriter, body: dict[str, Any] | None, path: str) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        verb = "GET" if body is None else "POST"
        head = f"{verb} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()

    async def ask(self, body: dict[str, Any] | None, path: str = "/v1/completions") -> tuple[int, str]:
        """The status and the body of one answer."""
        reader, writer = await self.open()
        try:
            await self.send(writer, body, path)
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if not head:
            raise Wrong("the server closed a connection without an answer")
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head.lower():
            answer = b"".join(answer.split(b"\r\n")[1::2])
        return status, answer.decode()

    async def text(self, prompt: str, n: int, **options: Any) -> str | None:
        """The text of a completion; None if the server had no room (429)."""
        status, answer = await self.ask({"prompt": prompt, "max_tokens": n, **options})
        self.statuses[status] += 1
        if status == 429:
            return None
        if status != 200:
            raise Wrong(f"status {status}: {answer[:300]}")
        text: str = json.loads(answer)["choices"][0]["text"]
        return text

    @asynccontextmanager
    async def streaming(self, prompt: str, n: int, **options: Any) -> AsyncIterator[asyncio.StreamReader]:
        """A streaming completion whose head was read. The connection is closed at the end."""
        reader, writer = await self.open()
        try:
            await self.send(writer, {"prompt": prompt, "max_tokens": n, "stream": True, **options}, "/v1/completions")
            head = await reader.readuntil(b"\r\n\r\n")
            self.statuses[int(head.split(b" ", 2)[1])] += 1
            yield reader
        finally:
            writer.transport.abort()

    # --- the server's state ------------------------------------------------------------------------------------

    async def gauge(self, name: str) -> float:
        _, metrics = await self.ask(None, "/metrics")
        lines = [line for line in metrics.splitlines() if re.match(rf"{re.escape(name)}(\{{|\s)", line)]
        if not lines:
            raise Wrong(f"/metrics has no {name}")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    async def idle(self) -> None:
        """Waits until the server runs no request and none waits; a minute at most."""
        for _ in range(60_000):
            running = await self.gauge("vllm:num_requests_running")
            if not running and not await self.gauge("vllm:num_requests_waiting"):
                return
            await asyncio.sleep(0.001)
        raise Wrong("requests were still running after a minute: a row was lost")

    def files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) << 10


# --- stages ----------------------------------------------------------------------------------------------------


async def equal(bench: Bench) -> str:
    model = Model.open(bench.bundle, threads=1)
    for seed, prompt in enumerate(PROMPTS):
        for temperature in (0.0, 0.8):
            stream = model.stream()
            stream.append(prompt)
            n = min(60, model.spec.capacity_bytes - stream.position)
            own = b"".join(stream.generate(n, temperature=temperature, seed=seed)).decode(errors="replace")
            if await bench.text(prompt, n, temperature=temperature, seed=seed) != own:
                raise Wrong(f"{prompt[:20]!r} at temperature {temperature}: the text differs from Stream's")
    return f"{2 * len(PROMPTS)} texts, all as from Stream"


async def cancel(bench: Bench) -> str:
    found = []
    for i in range(bench.rounds):
        async with bench.streaming(PROMPTS[i % len(PROMPTS)], 400, ignore_eos=True) as reader:
            for _ in range(random.Random(i).randrange(1, 9)):
                await reader.readline()
        began = time.perf_counter()
        while await bench.gauge("vllm:num_requests_running"):
            await asyncio.sleep(0.001)
        found.append(1e3 * (time.perf_counter() - began))
    figures = f"p50 {statistics.median(found):.1f} ms, p95 {p95(found):.1f} ms of {len(found)}"
    return f"{figures} (one reading of /metrics included)"


async def gap(bench: Bench) -> str:
    prompt = "A long text of another request. " * 12
    alone, during = [], []
    for i in range(max(4, bench.rounds // 10)):
        for gaps, others in ((alone, 0), (during, 1)):
            tasks = []
            async with bench.streaming("Once", 200, ignore_eos=True, seed=i) as reader:
                await reader.readuntil(b"data: ")
                if others:
                    tasks = [asyncio.create_task(bench.text(f"{i}{k} {prompt}", 1)) for k in range(8)]
                last = time.perf_counter()
                while not all(task.done() for task in tasks) or (not tasks and len(gaps) < 100 * (i + 1)):
                    if not (line := await reader.readline()):
                        break
                    if line.startswith(b"data: "):
                        now = time.perf_counter()
                        gaps.append(now - last)
                        last = now
            await asyncio.gather(*tasks)
            await bench.idle()
    a, d = 1e3 * p95(alone), 1e3 * p95(during)
    return f"p95 {a:.2f} ms alone ({len(alone)} gaps), {d:.2f} ms during prefills ({len(during)}): {d / a:.2f} times"


async def load(bench: Bench) -> str:
    texts: dict[tuple[int, int], str] = {}
    written, until = 0, time.monotonic() + bench.seconds

    async def client(number: int) -> None:
        nonlocal written
        draw = random.Random(number)
        while time.monotonic() < until:
            which, seed = draw.randrange(len(PROMPTS)), draw.randrange(5)
            text = await bench.text(PROMPTS[which], 30 + 10 * seed, seed=seed)
            if text is None:
                await asyncio.sleep(draw.random())
            elif texts.setdefault((which, seed), text) != text:
                raise Wrong(f"two texts for prompt {which} with seed {seed}")
            else:
                written += 30 + 10 * seed

    await together(client(i) for i in range(bench.connections))
    return f"{bench.connections} connections, {bench.seconds:.0f} s: {written / bench.seconds:,.0f} bytes/s"


async def storm(bench: Bench) -> str:
    until, left = time.monotonic() + bench.seconds / 10, 0

    async def client(number: int) -> None:
        nonlocal left
        draw = random.Random(number)
        while time.monotonic() < until:
            reader, writer = await bench.open()
            body = {
                "prompt": draw.choice(PROMPTS),
                "max_tokens": 400,
                "stream": draw.random() < 0.5,
                "ignore_eos": True,
            }
            await bench.send(writer, body, "/v1/completions")
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(draw.choice((0, 1, 4000))), draw.random())
            writer.transport.abort()
            left += 1

    await together(client(i) for i in range(bench.connections))
    await bench.idle()
    return f"{left} requests left"


async def slow(bench: Bench) -> str:
    async def client(number: int) -> None:
        async with bench.streaming(PROMPTS[number % len(PROMPTS)], 400, ignore_eos=True) as reader:
            for _ in range(10):
                await reader.read(1)
                await asyncio.sleep(0.3)

    async def reader() -> None:
        for i in range(10):
            await bench.text("Once", 20, seed=i)

    await together([*(client(i) for i in range(8)), reader()])
    return "8 slow readers beside 10 requests"


async def half_open(bench: Bench) -> str:
    held = []
    for i in range(bench.connections):
        reader, writer = await bench.open()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n"[: 5 + i % 60])
        held.append((reader, writer))
    for i in range(10):
        await bench.text("Once", 20, seed=i)
    for _, writer in held:
        writer.transport.abort()
    return f"{len(held)} half requests beside 10 whole ones"


async def together(clients: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client)


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


STAGES: dict[str, Stage] = {
    "equal": equal,
    "cancel": cancel,
    "gap": gap,
    "load": load,
    "storm": storm,
    "slow": slow,
    "half-open": half_open,
}


# --- the server ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(options: argparse.Namespace) -> AsyncIterator[Bench]:
    arguments = [sys.executable, "-m", "blt.cli", "serve", str(options.bundle), "--port", "0", *options.serve]
    process = await asyncio.create_subprocess_exec(*arguments, stderr=subprocess.PIPE)
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if found := READY.search(line):
            break
        print(line, end="", file=sys.stderr)
    else:
        raise Wrong("the server did not start")
    drained = asyncio.create_task(process.stderr.read())
    try:
        yield Bench(options.bundle, process, int(found[1]), options.connections, options.seconds, options.rounds)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if errors := [line for line in (await drained).decode().splitlines() if "Traceback" in line or "ERROR" in line]:
            raise Wrong(f"the server logged {errors[:3]}")


async def run(options: argparse.Namespace) -> None:
    async with serving(options) as bench:
        await bench.text("warm", 20)
        for name in options.stages.split(","):
            files = bench.files()
            print(f"{name:10} ", end="", flush=True)
            result = await STAGES[name](bench)
            await bench.idle()
            await bench.text("Once", 5)
            if bench.files() > files + 2:
                raise Wrong(f"{bench.files()} files are open, before {name} there were {files}")
            print(f"{result}; {bench.resident() / 1e6:.0f} MB resident", flush=True)
        print("statuses  ", dict(bench.statuses))
        if set(bench.statuses) - {200, 429}:
            raise Wrong("a status that is neither 200 nor 429")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, separated by commas")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the stage load; storm takes a tenth")
    parser.add_argument("--rounds", type=int, default=100, help="requests of the stages cancel and gap")
    parser.add_argument("serve", nargs="*", help="after --: further options of blt serve")
    options = parser.parse_args()
    try:
        asyncio.run(run(options))
    except (Wrong, ExceptionGroup) as error:
        print(f"\n{error.exceptions[0] if isinstance(error, ExceptionGroup) else error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
