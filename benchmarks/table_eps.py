"""Adam's eps and the hash tables: how much of its update a table row gets that one position of a batch reads.

    python benchmarks/table_eps.py DATA                     # a table on stderr, one JSON object on stdout

A row that one position reads has the gradient d / T in a batch of T targets, where d is the derivative of that
position's summed nats. The script measures |d| of such rows (root of the mean square over their numbers) in a tiny BLT
with space patches, at random weights and after `--steps` steps. From it follows the share f of the first update at a
late step that is left at a batch size and an eps (`blt.train.config.OptimizerConfig` has the formula).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from blt.train import Trainer
from blt.train.config import load_config
from blt.train.setup import prepare_run

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
SETTINGS = (
    "patching.scheme=space", "model.hash={sizes: [3, 4, 5, 6], rows: 100003}", "optimizer.tables=sparse",
    "batch={rows: 4, patches: 128, byte_buckets: [512, 768]}", "run.dtype=fp32", "run.compile=false",
    "schedule={steps: 100000, warmup: 20}",
)  # fmt: skip
BATCHES, EPS = (74_000, 1_000_000, 16_000_000, 64_000_000), (1e-8, 1e-15)


def derivative(trainer: Trainer) -> float:
    """|d| of the rows that one position of the next batch reads; the weights do not change."""
    tables = trainer.state.tables
    assert tables is not None
    batch = replace(next(trainer.state.loader), micro_rows=trainer.micro_rows)
    for first, part in trainer._micro_batches(batch):
        trainer._losses(first, part)[0].backward()
    once = torch.bincount(tables.places_BNT.flatten(), minlength=len(tables.rows_U)) == 1
    gradient = tables.reduce()[once]
    read = gradient[(gradient != 0).any(1)]  # the others are read in prompts and padding
    trainer.state.optimizer.zero_grad(set_to_none=True)
    return float(read.square().mean().sqrt())


def share(d: float, batch: int, eps: float, beta2: float = 0.95) -> float:
    return 1 / (1 + eps * batch / (math.sqrt(1 - beta2) * d))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = prepare_run(load_config(CONFIG, SETTINGS), options.data / "unused", options.data)[0]
    found = {}
    for steps in (0, options.steps):
        while trainer.state.step < steps:
            trainer.train_step()
        d = derivative(trainer)
        shares = {f"{eps:g}": {batch: share(d, batch, eps) for batch in BATCHES} for eps in EPS}
        found[steps] = {"derivative": d, "share": shares}
        print(f"after {steps} steps: |d| = {d:.3g}", file=sys.stderr)
        for eps, row in shares.items():
            print(f"  eps {eps}: " + ", ".join(f"{b:,} -> {f:.4f}" for b, f in row.items()), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
