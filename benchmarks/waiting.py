"""How long should a patch wait for others? What calls cost here, then every policy simulated on those costs.

    python benchmarks/waiting.py BUNDLE                  # 16 streams
    python benchmarks/waiting.py BUNDLE --streams 8 --patch 6

The latent transformer reads most of the weights, once per call however many patches are in it. The policy of
`engine.batch.gather` runs it when a share of the streams wait. First the calls are timed: bytes of n streams, and
n patches, for n up to the number of streams, at the median of a few runs. Then streams with patches of random lengths
(geometric, as an entropy threshold gives, with the wanted mean) go through rounds under each policy, and the clock
advances by what the calls cost. `blt bench throughput --share` measures the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from blt_runtime import Model
from blt_runtime.engine.batch import Batch, fitted, gather
from blt_runtime.engine.rows import Segment

SHARES = (None, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
CONTEXT = 128


def costs(path: Path, streams: int, threads: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a round's byte calls, and of a latent call, for 0..streams tokens and patches; positions of a text of
    CONTEXT bytes, of which the rows hold nothing: the time does not depend on it."""
    model = Model.open(path, threads=threads, batched=True)
    batch = Batch(fitted(model.spec, 2 * CONTEXT), model.backend, model.hash_tables, streams)
    byte, latent = np.zeros(streams + 1), np.zeros(streams + 1)
    batch._staging["latent"].states(8 * streams)
    batch._staging["latent"].longest(8)[:] = 0
    batch._staging["latent"]["patch_length"][:] = 5
    batch._staging["decoder"]["patch_row"][:] = 0
    groups = [name for name in batch.spec.graphs if name != "latent"]
    for n in range(1, streams + 1):
        bytes_n = [Segment(row, CONTEXT, CONTEXT + 1, 0) for row in range(n)]
        patches_n = [Segment(row, CONTEXT // 5, CONTEXT // 5 + 1, 0) for row in range(n)]
        byte[n] = median_s(lambda s=bytes_n: [batch._calls.run(group, s) for group in groups])
        latent[n] = median_s(lambda s=patches_n: batch._calls.run("latent", s))
    return byte, latent


def median_s(call: Callable[[], object], repeat: int = 7) -> float:
    call()
    took = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def simulate(
    byte: np.ndarray, latent: np.ndarray, share: float | None, patch: float, rounds: int = 4000
) -> tuple[float, float, float, float]:
    """Bytes per second, patches per latent call, p50 and p95 gap (seconds) of one stream's bytes. share None: every
    patch in a call of its own."""
    streams, random, ready = len(byte) - 1, np.random.default_rng(0), gather(share or 0.0)
    waits = np.zeros(streams, dtype=bool)
    last = np.zeros(streams)
    clock, calls, patches, gaps = 0.0, 0, 0, []
    for _ in range(rounds):
        going = ~waits
        clock += byte[int(going.sum())]
        waits |= going & (random.random(streams) < 1 / patch)
        finished = going & ~waits
        if waits.any() and ready(int(waits.sum()), int(finished.sum())):
            several = int(waits.sum())
            clock += several * latent[1] if share is None else latent[several]
            calls, patches = calls + (several if share is None else 1), patches + several
            finished |= waits
            waits[:] = False
        gaps.extend(clock - last[finished])
        last[finished] = clock
    return len(gaps) / clock, patches / max(1, calls), *np.percentile(gaps[streams:], (50, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--patch", type=float, default=4.5, help="mean patch size")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    byte, latent = costs(asked.bundle, asked.streams, asked.threads)
    print("calls, ms:", *(f"{n}: {1e3 * byte[n]:.1f} + {1e3 * latent[n]:.1f}" for n in (1, 2, 4, 8, asked.streams)))
    print("share | bytes/s | patches per call | gap p50, p95 ms")
    for share in SHARES:
        speed, gathered, p50, p95 = simulate(byte, latent, share, asked.patch)
        print(
            f"{'each' if share is None else share} | {speed:,.0f} | {gathered:.1f} | {1e3 * p50:.0f}, {1e3 * p95:.0f}"
        )


if __name__ == "__main__":
    main()
