"""How long a training step waits for its batch, with and without threads that prepare batches ahead.

    python benchmarks/loading.py --data DATA                      # rows of the demo's shape, steps of 20 ms
    python benchmarks/loading.py --data DATA --rows 64 --patches 1024 --longest 6144 --step-ms 50

The step is simulated by matrix products of about the given time. Like PyTorch's operations, they release the
interpreter's lock. Patches are those of the rule `space`. Blocks are small, so that several are planned during the
measurement. Printed are the mean and the longest wait for a batch, and the step's own time while the threads run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from blt.data import BatchShape, Dataset, Loader, PatchIndex
from blt_runtime.patching import PatchRule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by `blt data prepare`")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--patches", type=int, default=224)
    parser.add_argument("--longest", type=int, default=1280, help="bytes of the longest row")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--block-tokens", type=int, default=2 << 20)
    options = parser.parse_args()
    dataset = Dataset(options.data)
    starts = PatchIndex(dataset, "train").with_rule(PatchRule("space", max_patch_length=16))
    shape = BatchShape(options.rows, (options.longest,), options.patches)
    products = products_in(options.step_ms)
    print("workers  mean wait ms  longest wait ms  step ms")
    for workers in (0, 1, 2, 4):
        loader = Loader(dataset.split("train"), shape, starts, block_tokens=options.block_tokens, workers=workers)
        next(loader)  # the first batch always waits for the first plan
        waits, steps = measure(loader, options.steps, products)
        mean, longest, step = (1e3 * value for value in (statistics.mean(waits), max(waits), statistics.mean(steps)))
        print(f"{workers:7}  {mean:12.2f}  {longest:15.1f}  {step:7.2f}")


def products_in(step_ms: float) -> int:
    """The number of matrix products that take `step_ms`."""
    a = torch.randn(384, 384)
    began = time.perf_counter()
    for _ in range(200):
        a @ a
    return max(1, round(step_ms / 5 / (time.perf_counter() - began)))


def measure(loader: Loader, count: int, products: int) -> tuple[list[float], list[float]]:
    """Seconds waited for each of `count` batches, and seconds of each step."""
    a, waits, steps = torch.randn(384, 384), [], []
    for _ in range(count):
        began = time.perf_counter()
        next(loader)
        ready = time.perf_counter()
        for _ in range(products):
            a @ a
        waits.append(ready - began)
        steps.append(time.perf_counter() - ready)
    return waits, steps


if __name__ == "__main__":
    main()
