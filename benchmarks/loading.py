"""How fast text becomes batches, and how long a training step waits for its batch.

    python benchmarks/loading.py                                  # MB/s of a rank, on 64 MB of documents of 4 kB
    python benchmarks/loading.py --data DATA                      # waits: rows of the demo's shape, steps of 20 ms
    python benchmarks/loading.py --data DATA --rows 64 --patches 1024 --longest 6144 --step-ms 50

Without --data: MB/s of text that one rank gets, with patches of the rule `space`, of 4 bytes, and of stored boundaries,
for 1 and 8 ranks (one of them runs) and for 0 and 1 workers. It is text of the rank's rows per second of processor
time of all threads, so another load of the machine changes it little. With 0 workers the plan and the batches are
timed apart, too.

With --data: the step is simulated by matrix products of about the given time. Like PyTorch's operations, they release
the interpreter's lock. Patches are those of the rule `space`. Blocks are small, so that several are planned during the
measurement. Printed are the mean and the longest wait for a batch, and the step's own time while the threads run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt.data import BatchShape, Dataset, Loader, PatchIndex, prepare
from blt.data.boundaries import Plan, StoredBoundaries, shards_of, write_shard
from blt_runtime.patching import PatchRule

SPACE = PatchRule("space", max_patch_length=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder made by `blt data prepare`: measures waits instead of rates")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--patches", type=int, default=224)
    parser.add_argument("--longest", type=int, default=1280, help="bytes of the longest row")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--block-tokens", type=int, default=2 << 20)
    parser.add_argument("--megabytes", type=int, default=64, help="of text, without --data")
    options = parser.parse_args()
    shape = BatchShape(options.rows, (options.longest,), options.patches)
    if options.data is None:
        with tempfile.TemporaryDirectory() as folder:
            rates(make_text(Path(folder), options.megabytes), shape)
    else:
        waits(options, shape)


def make_text(folder: Path, megabytes: int) -> Dataset:
    """Documents of 4 kB of random words of 2 to 9 letters."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, n, np.uint8)) for n in random.integers(2, 10, 5000)]
    text = b" ".join(words[i] for i in random.integers(0, len(words), megabytes * 170_000))
    (folder / "a.txt").write_bytes(b"\0".join(text[at : at + 4096] for at in range(0, megabytes * 10**6, 4096)))
    prepare([folder / "a.txt"], folder / "data", split=(1, 0, 0))
    return Dataset(folder / "data")


def stored(dataset: Dataset, folder: Path) -> StoredBoundaries:
    """The boundaries of the rule `space`, as if an entropy model had placed them."""
    documents, index = dataset.split("train"), PatchIndex(dataset, "train").with_rule(SPACE)
    plan = Plan("", "float32", SPACE, None, None, {"train": shards_of(documents)})
    for number, shard in enumerate(plan.shards["train"]):
        members = range(*documents.shard_offsets[number : number + 2])
        write_shard(folder, shard, (index.starts(document) for document in members))
    return StoredBoundaries(folder, plan, dataset, "train")


def rates(dataset: Dataset, shape: BatchShape) -> None:
    """Prints the table of rates."""
    kinds: dict[str, Any] = {
        "space": PatchIndex(dataset, "train").with_rule(SPACE),
        "static 4": PatchIndex(dataset, "train").with_rule(PatchRule("static", patch_size=4)),
        "stored": stored(dataset, dataset.folder / "boundaries"),
    }
    print("patches   ranks  workers  MB/s of a rank  ns/byte of the plan")
    for name, starts in kinds.items():
        for ranks in (1, 8):
            for workers in (0, 1):
                loader = Loader(dataset.split("train"), shape, starts, workers=workers)
                if ranks > 1:
                    loader = as_rank(loader, ranks)
                began, n_bytes = time.process_time(), sum(batch.n_bytes for batch in loader.one_pass())
                seconds = time.process_time() - began
                plan = f"{1e9 * plan_seconds(loader) / n_bytes:6.2f}" if workers == 0 and ranks == 1 else ""
                print(f"{name:8}  {ranks:5}  {workers:7}  {n_bytes / ranks / seconds / 1e6:14.1f}  {plan}", flush=True)


def as_rank(loader: Loader, ranks: int) -> Loader:
    """The loader of the first of so many ranks, each with one micro-batch of a row at a time."""
    from blt.data.batches import Share

    return loader.shared(Share(0, ranks, 1))


def plan_seconds(loader: Loader) -> float:
    """Seconds of processor time that the plans of an epoch take."""
    began = time.process_time()
    for block in range(loader.n_blocks(0)):
        loader.plan(0, block)
    return time.process_time() - began


def waits(options: argparse.Namespace, shape: BatchShape) -> None:
    """Prints the table of waits."""
    dataset = Dataset(options.data)
    starts = PatchIndex(dataset, "train").with_rule(SPACE)
    products = products_in(options.step_ms)
    print("workers  mean wait ms  longest wait ms  step ms")
    for workers in (0, 1, 2, 4):
        loader = Loader(dataset.split("train"), shape, starts, block_tokens=options.block_tokens, workers=workers)
        next(loader)  # the first batch always waits for the first plan
        waited, steps = measure(loader, options.steps, products)
        mean, longest, step = (1e3 * value for value in (statistics.mean(waited), max(waited), statistics.mean(steps)))
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
