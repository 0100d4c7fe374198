"""Dense against sparse hash tables: seconds and memory of a training step by table size, and bits per byte of both.

    python benchmarks/tables.py                             # a table on stderr, one JSON object on stdout
    python benchmarks/tables.py --rows 8000 500000          # other sizes
    python benchmarks/tables.py --data DIR --steps 300      # also trains both on prepared data, with the same batches

The step is the whole step of `blt train blt` (forward, backward, norm, AdamW), with random bytes as the batch unless
`--data` is given. Each measurement runs in a separate process, because memory is the kernel's peak of the resident set
during the steps (Linux) minus the resident set before the trainer was built. Dense and sparse runs are interleaved.
Random bytes touch as many rows as a batch can. Text touches fewer, so its savings are larger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "kind": "blt",
    "patching": {"scheme": "space", "max_patch_length": 16},
    "batch": {"rows": 4, "patches": 96, "byte_buckets": [384, 512]},
    "optimizer": {"lr": 2e-3},
    "schedule": {"steps": 100000, "warmup": 20},
    "run": {"compile": False, "log_every": 100000, "valid_every": 100000, "checkpoint_every": 100000},
}
WIDTH, SIZES = 64, [3, 4, 5, 6, 7, 8]


def config_of(tables: str, rows: int) -> Any:
    from blt.train.config import parse_config

    block = {"dim": WIDTH, "n_heads": 4, "ffn_dim": 176, "window": 128, "max_seqlen": 1024}
    model = {
        "encoder": {**block, "n_layers": 1}, "decoder": {**block, "n_layers": 3},
        "latent": {"dim": 128, "n_layers": 4, "n_heads": 4, "ffn_dim": 352, "max_seqlen": 256},
        "hash": {"sizes": SIZES, "rows": rows},
    }  # fmt: skip
    return parse_config({**CONFIG, "model": model, "optimizer": {**CONFIG["optimizer"], "tables": tables}})


def random_data(folder: Path) -> Path:
    """Random bytes, so that n-grams do not repeat, with spaces for the patches."""
    from blt.data import prepare

    random = np.random.default_rng(0)
    text = random.integers(128, 256, 1 << 19, dtype=np.uint8)
    text[random.random(len(text)) < 0.18] = 32
    (folder / "random.txt").write_bytes(text.tobytes())
    prepare([folder / "random.txt"], folder / "data", split=(1, 0, 0))
    return folder / "data"


def measure(tables: str, rows: int, data: Path, *, repeats: int) -> dict[str, Any]:
    """Measures in this process: milliseconds of a step (median of `repeats` after three), peak memory, rows touched."""
    import torch

    from blt.train.setup import prepare_run

    torch.set_num_threads(1)
    before = resident("VmRSS")
    trainer = prepare_run(config_of(tables, rows), data / "unused", data)[0]
    times = []
    for i in range(3 + repeats):
        if i == 1:  # the optimizer's state exists; this resets the peak of the initialisation
            Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - began)
    touched = None if trainer.state.tables is None else len(trainer.state.tables.rows_U)
    table_bytes = 4 * len(SIZES) * rows * WIDTH
    return {
        "tables": tables, "rows_per_table": rows, "table_bytes": table_bytes, "rows_touched": touched,
        "step_ms": 1e3 * statistics.median(times[3:]), "peak_bytes": resident("VmHWM") - before,
    }  # fmt: skip


def learn(tables: str, rows: int, data: Path, *, steps: int) -> dict[str, Any]:
    """Bits per byte on the validation text after a short training."""
    import torch

    from blt.train.setup import prepare_run

    torch.set_num_threads(1)
    trainer = prepare_run(config_of(tables, rows), data / "unused", data)[0]
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    seconds = time.perf_counter() - began
    return {"tables": tables, "rows_per_table": rows, "steps": steps, "seconds": seconds, **trainer.validate()}


def resident(which: str) -> int:
    """Bytes of resident memory (VmRSS) or of its peak since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def run_child(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def dense_and_sparse(arguments: list[str]) -> list[dict[str, Any]]:
    return [run_child(["--only", tables, *arguments]) for tables in ("dense", "sparse")]


def report(steps: list[dict[str, Any]], learned: list[dict[str, Any]]) -> None:
    print(f"{'rows/table':>11} {'tables':>9} {'dense ms':>9} {'sparse ms':>10} {'dense MB':>9} {'sparse MB':>10} "
          f"{'touched':>8}", file=sys.stderr)  # fmt: skip
    for dense, sparse in zip(steps[::2], steps[1::2], strict=True):
        print(f"{dense['rows_per_table']:>11} {dense['table_bytes'] / 1e6:>6.0f} MB {dense['step_ms']:>9.1f} "
              f"{sparse['step_ms']:>10.1f} {dense['peak_bytes'] / 1e6:>9.0f} {sparse['peak_bytes'] / 1e6:>10.0f} "
              f"{sparse['rows_touched']:>8}", file=sys.stderr)  # fmt: skip
    for run in learned:
        took = f"{run['steps']} steps in {run['seconds']:.0f} s"
        print(f"{run['tables']}: {run['valid_bpb']:.4f} bits per byte after {took}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4000, 32000, 250000, 500000], help="per table")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--data", type=Path, help="made by `blt data prepare`")
    parser.add_argument(
        "--steps", type=int, default=0, help="also train both for this many steps, with the second --rows"
    )
    parser.add_argument("--only", choices=("dense", "sparse"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only and args.steps:
        print(json.dumps(learn(args.only, args.rows[0], args.data, steps=args.steps)))
    elif args.only:
        print(json.dumps(measure(args.only, args.rows[0], args.data, repeats=args.repeats)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            data = ["--data", str(args.data or random_data(Path(folder)))]
            repeats = ["--repeats", str(args.repeats)]
            steps = [run for rows in args.rows for run in dense_and_sparse(["--rows", str(rows), *data, *repeats])]
            rows = ["--rows", str(args.rows[min(1, len(args.rows) - 1)])]
            learned = dense_and_sparse([*rows, *data, "--steps", str(args.steps)]) if args.data and args.steps else []
        report(steps, learned)
        print(json.dumps({"schema": "blt.benchmark-tables/1", "steps": steps, "learned": learned}))


if __name__ == "__main__":
    main()
