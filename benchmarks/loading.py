"""How fast text becomes batches, and how long a training step waits for its batch.

    python benchmarks/loading.py                                  # MB/s of a rank, on 64 MB of documents of 4 kB
    python benchmarks/loading.py --rows 8 --longest 1280          # of other batches
    python benchmarks/loading.py --data DATA                      # waits: rows of the demo's shape, steps of 20 ms
    python benchmarks/loading.py --data DATA --rows 64 --patches 1024 --longest 6144 --step-ms 50

Without --data: MB/s of text that one rank gets, without patches, with patches of the rule `space`, of 4 bytes, and of
stored boundaries, in batches of 64 and 256 rows of 8,192 bytes, for 1 and 8 ranks (one of them runs). It is text of the
rank's rows per second of processor time, the best of five passes, so another load of the machine changes it little. A
rank plans all rows (`plan`, per byte of all text) and makes its own (`batches`, per byte of its text). `copies` is the
time of one copy of the text and of the finished arrays: less is not possible.

With --data: the step is simulated by matrix products of about the given time. Like PyTorch's operations, they release
the interpreter's lock. Patches are those of the rule `space`. Blocks are small, so that several are planned during the
measurement. Printed are the mean and the longest wait for a batch, and the step's own time while the threads run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt.data import BatchShape, Dataset, Loader, PatchIndex, prepare
from blt.data.batches import Share, never
from blt.data.boundaries import Plan, StoredBoundaries, shards_of, write_shard
from blt.data.packing import Block
from blt_runtime.patching import PatchRule

PASSES = 5
SPACE = PatchRule("space", max_patch_length=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder made by `blt data prepare`: measures waits instead of rates")
    parser.add_argument("--rows", type=int, help="of a batch (default: 64 and 256; with --data 8)")
    parser.add_argument("--patches", type=int, default=224, help="of a row, with --data; else as many as fill it")
    parser.add_argument("--longest", type=int, help="bytes of the longest row (default: 8192; with --data 1280)")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--block-tokens", type=int, default=2 << 20)
    parser.add_argument("--megabytes", type=int, default=64, help="of text, without --data")
    options = parser.parse_args()
    if options.data is None:
        with tempfile.TemporaryDirectory() as folder:
            rows = (64, 256) if options.rows is None else (options.rows,)
            rates(make_text(Path(folder), options.megabytes), rows, options.longest or 8192)
    else:
        waits(options, BatchShape(options.rows or 8, (options.longest or 1280,), options.patches))


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


def rates(dataset: Dataset, batches: tuple[int, ...], longest: int) -> None:
    """Prints the table of rates, for batches of these numbers of rows."""
    kinds: dict[str, tuple[Any, float]] = {  # with bytes per patch
        "none": (None, 1),
        "space": (PatchIndex(dataset, "train").with_rule(SPACE), 6.5),
        "static 4": (PatchIndex(dataset, "train").with_rule(PatchRule("static", patch_size=4)), 4),
        "stored": (stored(dataset, dataset.folder / "boundaries"), 6.5),
    }
    print("patches   rows  ranks  MB/s of a rank  plan ns/byte  batches ns/byte  copies ns/byte")
    for name, (starts, patch_size) in kinds.items():
        for rows in batches:
            shape = BatchShape(rows, (longest,), None if starts is None else round(longest / patch_size))
            for ranks in (1, 8):
                loader = Planned(dataset.split("train"), shape, starts)
                loader.shared(Share(0, ranks, 1 if ranks > 1 else None))
                plan, made, copied = ns_per_byte(loader)
                rate = f"{1e3 / (ranks * plan + made):14.0f}"
                print(f"{name:8}  {rows:4}  {ranks:5}  {rate}  {plan:12.2f}  {made:15.2f}  {copied:14.2f}", flush=True)


class Planned(Loader):
    """A loader that plans each block once, so that a second pass makes batches only."""

    def __init__(self, *arguments: Any):
        self.plans: dict[int, Block] = {}
        super().__init__(*arguments)

    def plan(self, epoch: int, block: int, stopped: Callable[[], bool] = never) -> Block:
        if block not in self.plans:
            self.plans[block] = super().plan(epoch, block, stopped)
        return self.plans[block]


def ns_per_byte(loader: Planned) -> tuple[float, float, float]:
    """Nanoseconds of processor time: of plans, for a byte of all text; of batches, and of copies of their arrays, for a
    byte of the rank's text."""
    plan = least_ns(lambda: [Loader.plan(loader, 0, number) for number in range(loader.n_blocks(0))])
    n_bytes, own = passed(loader)
    batches = least_ns(lambda: passed(loader))
    batch = next(loader.one_pass())
    arrays = [batch.ids.astype(np.uint8), batch.ids, batch.targets, batch.mask, batch.patch_lengths]
    pairs = [(np.empty_like(array), array) for array in arrays if array is not None]
    copies = least_ns(lambda: [np.copyto(*pair) for pair in pairs])
    return plan / n_bytes, batches / own, copies / np.count_nonzero(batch.mask)


def passed(loader: Loader) -> tuple[int, int]:
    """Makes all batches; returns the bytes of the text, and the rank's targets."""
    loader.restore({"epoch": 0, "block": 0, "batch": 0})
    counts = [(batch.n_bytes, np.count_nonzero(batch.mask)) for batch in loader.one_pass()]
    n_bytes, own = np.sum(counts, 0).tolist()
    return n_bytes, own


def least_ns(work: Callable[[], object]) -> float:
    """Nanoseconds of processor time, the least of a few calls."""
    found = []
    for _ in range(PASSES):
        began = time.process_time_ns()
        work()
        found.append(time.process_time_ns() - began)
    return min(found)


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
