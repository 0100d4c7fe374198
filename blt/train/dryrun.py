"""What a configuration costs, without allocating it: parameters, FLOPs, memory, bytes between ranks.

One formula per model gives the FLOPs (`flops` or `flops_per_byte` of its configuration, see `blt.model.config`), and
every report uses these functions. Matrix products are counted, and attention over the keys that a position may see;
norms, softmax, rotation and table lookups are not. A training step costs three forward passes: each product has two
gradients. Memory is counted by `blt.train.memory`, what ranks send
each other by `blt.train.traffic`.
"""

from __future__ import annotations

from typing import Any

from blt.model import EntropyConfig
from blt.train.config import BLTRun, BPERun, EntropyRun, RunConfig
from blt.train.memory import memory
from blt.train.traffic import traffic

FORWARD_PASSES_PER_STEP = 3
"""FLOPs of a training step in forward passes."""
BYTES_PER_TOKEN = 4.0
"""Of a BPE vocabulary on English text, used if it was not measured on the data; `blt train bpe` measures it."""


def flops_by_part(
    config: RunConfig,
    *,
    bytes_per_token: float | None = None,
    entropy: EntropyConfig | None = None,
    patch_size: float | None = None,
) -> dict[str, float]:
    """Forward FLOPs per byte of each part, in rows of the largest bucket.

    bytes_per_token: of a BPE vocabulary on the data.  entropy: the entropy model that cuts the patches of a BLT; it
    reads every byte, too.  patch_size: mean bytes per patch on the data (default: the configuration's target).
    """
    context = config.batch.byte_buckets[-1]
    if isinstance(config, EntropyRun):
        return {"entropy model": config.model.flops_per_byte(context)}
    if isinstance(config, BPERun):
        return {"token model": config.model.flops_per_byte(context, bytes_per_token or BYTES_PER_TOKEN)}
    parts = config.model.flops(patch_size or config.patching.mean_patch_size, context)
    if entropy is not None and config.patching.scheme == "entropy":
        parts = {"entropy model": entropy.flops_per_byte(context), **parts}
    return parts


def flops_per_byte(config: RunConfig, **measured: Any) -> float:
    """Forward FLOPs per byte; arguments as `flops_by_part`."""
    return sum(flops_by_part(config, **measured).values())


def costs(config: RunConfig, **measured: Any) -> dict[str, Any]:
    """Parameters (also by part), forward FLOPs per byte of the configured row, and bytes per step.

    Arguments as `flops_by_part`.
    """
    flops = flops_by_part(config, **measured)
    parts = config.model.params() if isinstance(config, BLTRun) else {next(iter(flops)): config.model.n_params()}
    bytes_per_position = measured.get("bytes_per_token") or BYTES_PER_TOKEN if isinstance(config, BPERun) else 1.0
    return {
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "flops_per_byte": sum(flops.values()),
        "flops_per_byte_by_part": flops,
        "bytes_per_step": round(config.batch.rows * config.batch.byte_buckets[-1] * bytes_per_position),
    }


def dry_run(config: RunConfig, *, ranks: int = 1, **measured: Any) -> dict[str, Any]:
    """`costs`, and of a training step on each of `ranks` processes the memory in bytes (`blt.train.memory.memory`) and
    what it receives from the others (`blt.train.traffic.traffic`).

    Raises ConfigError if the rows cannot be divided among the ranks.
    """
    report = {**costs(config, **measured), "memory_bytes": memory(config, ranks)}
    return report if ranks == 1 else {**report, "received_bytes": traffic(config, ranks)}
