"""Bytes per second of the same requests through a server, and through `Scheduler` in this process.

    python benchmarks/servers.py --bundle BUNDLE                        # Scheduler, no server
    python benchmarks/servers.py --http http://127.0.0.1:8000           # blt serve, or Ray Serve around its application
    python benchmarks/servers.py --triton 127.0.0.1:8001 --model demo   # gRPC; needs tritonclient[grpc]

Each client sends requests one after another, each from its own thread, over one connection. A request continues a
prompt of 16 bytes by --bytes bytes, as a stream or, with --whole, in one response. A round without measurement comes
first. Printed are the bytes of all clients per second, and the median time to the first piece of a stream.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"
Ask = Callable[[int], Iterator[int]]
"""Sends the request of a seed; yields the bytes of each piece."""


def scheduler(options: argparse.Namespace) -> Callable[[], Ask]:
    from blt_runtime import Model, Scheduler

    made = Scheduler(Model.open(options.bundle, batched=True), streams=16)

    def ask(seed: int) -> Iterator[int]:
        request = made.submit(PROMPT, options.bytes, seed=seed, stop_at_eos=False)
        if options.whole:
            yield len(request.result())
        else:
            yield from map(len, request)

    return lambda: ask


def http(options: argparse.Namespace) -> Callable[[], Ask]:
    import httpx

    body = {"prompt": PROMPT, "max_tokens": options.bytes, "temperature": 0.8, "ignore_eos": True}

    def client() -> Ask:
        connection = httpx.Client(base_url=options.http, timeout=600)

        def ask(seed: int) -> Iterator[int]:
            sent = {**body, "seed": seed, "stream": not options.whole}
            with connection.stream("POST", "/v1/completions", json=sent) as response:
                response.raise_for_status()
                if options.whole:
                    yield json.loads(response.read())["usage"]["completion_tokens"]
                    return
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text = json.loads(line[6:])["choices"][0]["text"]
                        yield len(text.encode())

        return ask

    return client


def triton(options: argparse.Namespace) -> Callable[[], Ask]:
    import numpy as np
    import tritonclient.grpc as grpc

    def tensor(name: str, kind: str, value: Any, dtype: Any) -> Any:
        made = grpc.InferInput(name, [1], kind)
        made.set_data_from_numpy(np.array([value], dtype))
        return made

    def client() -> Ask:
        connection, answers = grpc.InferenceServerClient(options.triton), queue.SimpleQueue[Any]()
        connection.start_stream(lambda result, error: answers.put(error or result))
        fixed = [
            tensor("PROMPT", "BYTES", PROMPT.encode(), np.object_),
            tensor("MAX_TOKENS", "INT32", options.bytes, np.int32),
            tensor("IGNORE_EOS", "BOOL", True, np.bool_),
            tensor("STREAM", "BOOL", not options.whole, np.bool_),
        ]

        def ask(seed: int) -> Iterator[int]:
            connection.async_stream_infer(options.model, [*fixed, tensor("SEED", "INT64", seed, np.int64)])
            while True:
                if isinstance(answer := answers.get(), Exception):
                    raise answer
                yield len(answer.as_numpy("OUTPUT_IDS"))
                if answer.as_numpy("FINISH_REASON")[0]:
                    return

        return ask

    return client


def measure(ask: Ask, seeds: range) -> tuple[int, list[float]]:
    """Bytes of these requests, and the seconds to the first piece of each."""
    written, first = 0, []
    for seed in seeds:
        began, pieces = time.perf_counter(), ask(seed)
        written += next(pieces)
        first.append(time.perf_counter() - began)
        written += sum(pieces)
    return written, first


def run(asks: list[Ask], requests: int) -> tuple[float, float]:
    """Bytes per second, and the median seconds to the first piece."""
    with ThreadPoolExecutor(len(asks)) as pool:
        began = time.perf_counter()
        results = list(pool.map(measure, asks, [range(i * requests, (i + 1) * requests) for i in range(len(asks))]))
        took = time.perf_counter() - began
    first = [seconds for _, some in results for seconds in some]
    return sum(written for written, _ in results) / took, statistics.median(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--bundle", type=Path, help="run Scheduler in this process")
    target.add_argument("--http", metavar="URL", help="a server with OpenAI's interface")
    target.add_argument("--triton", metavar="HOST:PORT", help="the gRPC address of a Triton server")
    parser.add_argument("--model", default="demo", help="the model's name in Triton")
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--bytes", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3, help="the fastest run is printed")
    parser.add_argument("--whole", action="store_true", help="answers in one response")
    options = parser.parse_args()
    client = (scheduler if options.bundle else http if options.http else triton)(options)
    for clients in map(int, options.clients.split(",")):
        asks = [client() for _ in range(clients)]
        run(asks, 1)
        speed, first = max(run(asks, options.requests) for _ in range(options.repeat))
        print(f"{clients:3} clients: {speed:8,.0f} bytes/s; first piece after {1e3 * first:7.1f} ms", flush=True)


if __name__ == "__main__":
    main()
