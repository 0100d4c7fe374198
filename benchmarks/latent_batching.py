"""When should a batch run the latent transformer? Times the calls, then simulates each policy on these times.

    python benchmarks/latent_batching.py BUNDLE                  # 16 streams
    python benchmarks/latent_batching.py BUNDLE --streams 8 --patch 6

The latent transformer holds most of the weights, and a call reads them once for any number of patches. The policy of
`engine.batch.gather` runs it when a share of the streams wait for it. First the calls are timed: bytes of n streams,
and n patches, for n up to the number of streams, medians of a few runs. Then rounds of streams are simulated under each
policy. Their patches have random lengths (geometric, as an entropy threshold gives, with the wanted mean), and the
simulated time advances by the cost of each call. `blt bench throughput --share` measures the same.
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
    """Seconds of a round's byte calls, and of a latent call, for 0..streams tokens and patches.

    Positions are those after a text of CONTEXT bytes. The caches are empty: the time does not depend on their content.
    """
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
    byte: np.ndarray, latent: np.ndarray, *, share: float | None, patch: float, rounds: int = 4000
) -> tuple[float, float, float, float]:
    """Bytes per second, patches per latent call, p50 and p95 gap (seconds) between the bytes of one stream.

    share None: each patch runs in a separate call.
    """
    streams, random, ready = len(byte) - 1, np.random.default_rng(0), gather(share or 0.0)
    waiting = np.zeros(streams, dtype=bool)
    last = np.zeros(streams)
    clock, calls, patches, gaps = 0.0, 0, 0, []
    for _ in range(rounds):
        running = ~waiting
        clock += byte[int(running.sum())]
        waiting |= running & (random.random(streams) < 1 / patch)
        finished = running & ~waiting
        if waiting.any() and ready(int(waiting.sum()), int(finished.sum())):
            several = int(waiting.sum())
            clock += several * latent[1] if share is None else latent[several]
            calls, patches = calls + (several if share is None else 1), patches + several
            finished |= waiting
            waiting[:] = False
        gaps.extend(clock - last[finished])
        last[finished] = clock
    return len(gaps) / clock, patches / max(1, calls), *np.percentile(gaps[streams:], (50, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--patch", type=float, default=4.5, help="mean patch size")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    byte, latent = costs(options.bundle, options.streams, options.threads)
    print("calls, ms:", *(f"{n}: {1e3 * byte[n]:.1f} + {1e3 * latent[n]:.1f}" for n in (1, 2, 4, 8, options.streams)))
    print("share | bytes/s | patches per call | gap p50, p95 ms")
    for share in SHARES:
        speed, gathered, p50, p95 = simulate(byte, latent, share=share, patch=options.patch)
        print(
            f"{'each' if share is None else share} | {speed:,.0f} | {gathered:.1f} | {1e3 * p50:.0f}, {1e3 * p95:.0f}"
        )


if __name__ == "__main__":
    main()
