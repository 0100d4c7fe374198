"""What training steps of the large configurations cost on 1 to 256 H100s, predicted term by term.

    python benchmarks/scale.py [--set KEY=VALUE ...] [--config NAME,...] [--ranks N,...]

Memory, FLOPs and bytes between ranks are what `blt train --dry-run` prints. Times divide them by rates: PEAKS are from
data sheets, REACHED is the share of each that is assumed. Nothing here was measured on a GPU; docs/scale.md says what
was run.

A step has, on each rank:
    products      training FLOPs over the rate of products; recomputation adds a forward pass
    memory        CROSSINGS times the bytes that autograd keeps without recomputation, over the rate of the memory:
                  each is written and read, and so is its gradient. Recomputation writes and reads them once more
    optimizer     28 bytes for each parameter of the rank: weights, gradient and moments are read, all but the gradient
                  written
    gathers       parameters that FSDP fetches and gradients that it reduces, also over groups of ranks
                  (`run.shard_ranks`); they run beside products and memory, and what takes longer counts
    tables        rows of sparse hash tables and their gradients, which nothing runs beside
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blt.train import dry_run
from blt.train.config import RunConfig, load_config
from blt.train.dryrun import FORWARD_PASSES_PER_STEP
from blt.train.memory import FLOAT, MOMENTS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SETTINGS = ("batch.rows=1792", "schedule.min_ratio=0", "run.activation_checkpointing=full", "optimizer.tables=sparse")
"""The paper's batch of 16 MB (docs/training.md)."""
PEAKS = {"products": 989e12, "memory": 3.35e12, "link": 450e9, "network": 50e9}
"""H100 SXM: FLOP/s of dense bfloat16, bytes/s of HBM3, of NVLink and of a 400 Gb/s network card, in one direction."""
REACHED = {"latent": 0.65, "local": 0.45, "memory": 0.8, "link": 0.7, "network": 0.8}
"""Assumed shares. Products of the latent transformer are wide (2,048 and more); local ones are 1,024 or 1,280 wide, and
their attention has windows."""
CROSSINGS, RECOMPUTED = 4, 2
NODE = 8
"""GPUs that NVLink joins."""
SIZE = 80e9
UPDATE = FLOAT * (1 + 1 + MOMENTS + 1 + MOMENTS)


@dataclass(frozen=True)
class Step:
    """Seconds of a step by term, and its memory in bytes. ideal: seconds of the products at the peak."""

    memory: float
    ideal: float
    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        beside = max(self.terms["products"] + self.terms["memory"], self.terms["gathers"])
        return beside + self.terms["optimizer"] + self.terms["tables"]

    @property
    def mfu(self) -> float:
        return self.ideal / self.seconds


def predict(config: RunConfig, ranks: int) -> Step:
    """The step of a configuration on so many H100s."""
    report = dry_run(config, ranks=ranks)
    n_bytes = report["bytes_per_step"] / ranks
    recomputation = config.run.activation_checkpointing
    recomputes = recomputation != "none"
    passes = FORWARD_PASSES_PER_STEP + (recomputation == "full")
    flops = {
        name: n_bytes * sum(f for part, f in report["flops_per_byte_by_part"].items() if part.startswith(name))
        for name in ("latent", "local")
    }
    kept = _kept(config) * n_bytes
    received = report.get("received_bytes", dict.fromkeys(("gathers", "gradients", "replicas", "tables"), 0))
    within, between = _rate(config.run.shard_ranks or ranks), _rate(ranks)
    state = report["memory_bytes"]["weights_and_optimizer"] / (FLOAT * (1 + MOMENTS))  # parameters of a rank, about
    return Step(
        report["memory_bytes"]["total"],
        FORWARD_PASSES_PER_STEP * sum(flops.values()) / PEAKS["products"],
        {
            "products": sum(passes * n / (PEAKS["products"] * REACHED[name]) for name, n in flops.items()),
            "memory": (CROSSINGS + RECOMPUTED * recomputes) * kept / (PEAKS["memory"] * REACHED["memory"]),
            "optimizer": UPDATE * state / (PEAKS["memory"] * REACHED["memory"]),
            "gathers": (received["gathers"] + received["gradients"]) / within + received["replicas"] / between,
            "tables": received["tables"] / between,
        },
    )


def _rate(ranks: int) -> float:
    """Bytes/s between so many consecutive ranks."""
    place = "link" if ranks <= NODE else "network"
    return PEAKS[place] * REACHED[place]


def _kept(config: RunConfig) -> float:
    """Bytes that autograd keeps for each byte of text, without recomputation."""
    one_row = config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"rows": 1, "micro_rows": 1}),
            "run": config.run.model_copy(update={"activation_checkpointing": "none", "shard_ranks": None}),
        }
    )
    return float(dry_run(one_row)["memory_bytes"]["activations"]) / config.batch.byte_buckets[-1]


def lines(name: str, ranks: Sequence[int], settings: Sequence[str]) -> Iterator[str]:
    """The table of one configuration, as Markdown. A rank computes one row at a time."""
    yield f"| {name}, ranks | GB | products | memory | optimizer | gathers | tables | step, s | MFU | kB/s a rank |"
    yield "|---:" * 10 + "|"
    for n in ranks:
        config = load_config(CONFIGS / f"{name}.yaml", [*SETTINGS, "batch.micro_rows=1", *settings])
        step = predict(config, n)
        too_large = " (too large)" if step.memory > SIZE else ""
        n_bytes = config.batch.rows * config.batch.byte_buckets[-1]
        cells = [str(n), f"{step.memory / 1e9:.1f}{too_large}", *(f"{seconds:.2f}" for seconds in step.terms.values())]
        cells += [f"{step.seconds:.2f}", f"{step.mfu:.0%}", f"{n_bytes / n / step.seconds / 1e3:.0f}"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the configuration"
    )
    parser.add_argument("--config", default="blt-1b,blt-8b", metavar="NAME,...")
    parser.add_argument("--ranks", default="1,8,64,256", metavar="N,...")
    given = parser.parse_args()
    for name in given.config.split(","):
        print("\n".join(lines(name, [int(n) for n in given.ranks.split(",")], given.set)), end="\n\n")


if __name__ == "__main__":
    main()
