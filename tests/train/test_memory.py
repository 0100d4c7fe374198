"""The memory that `--dry-run` estimates is that of a step: measured by other means than it is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from blt.model import BLT
from blt.model.layers import Block
from blt.train import Trainer
from blt.train.config import BLTRun, RunConfig, load_config
from blt.train.memory import memory
from blt.train.setup import prepare_run
from blt_runtime.errors import ConfigError

BLT_SETTINGS = ("patching.scheme=space", "batch.byte_buckets=[128]", "model.hash.rows=503")


def config_of(repo: Path, name: str, *settings: str) -> RunConfig:
    return load_config(repo / "configs" / f"{name}.yaml", settings)


def micro_batch(trainer: Trainer) -> Any:
    """The loss of the next micro-batch, as a step computes it."""
    batch = replace(next(trainer.state.loader), micro_rows=trainer.micro_rows)
    row, part = trainer._micro_batches(batch)[0]
    assert part.ids.shape[1] == trainer.config.batch.byte_buckets[-1]
    return trainer._losses(row, part)[0]


def saved_by_autograd(trainer: Trainer) -> int:
    """Bytes of the different storages that autograd saves in one forward pass, without those of the parameters."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage  # alive, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = micro_batch(trainer)
    own = {tensor.untyped_storage()._cdata for tensor in trainer.objective.model.state_dict().values()}
    buffers = {tensor.untyped_storage()._cdata for tensor in trainer.objective.model.buffers()}
    loss.backward()
    return sum(storage.nbytes() for key, storage in found.items() if key not in own | buffers)


def tracked(trainer: Trainer) -> tuple[int, int]:
    """Bytes after the forward pass and at the peak of both passes, by torch's MemTracker; without the weights."""
    tracker = MemTracker()
    tracker.track_external(trainer.objective.model)
    with tracker:
        loss = micro_batch(trainer)
        kept = tracker.get_tracker_snapshot("current")
        loss.backward()
        peak = tracker.get_tracker_snapshot("peak")
    return without_weights(kept), without_weights(peak)


def without_weights(snapshot: dict[torch.device, dict[Any, int]]) -> int:
    (of_device,) = snapshot.values()
    kinds = {str(getattr(kind, "value", kind)): size for kind, size in of_device.items()}
    return kinds["Total"] - kinds["Parameter"] - kinds["Buffer"]


KINDS = {
    "micro rows": ("tiny", (*BLT_SETTINGS, "batch.micro_rows=1")),
    "bfloat16": ("tiny", (*BLT_SETTINGS, "run.dtype=bf16")),
    "frozen": ("tiny", (*BLT_SETTINGS, "optimizer.freeze=['latent.*', 'hash_embedding.*']")),
    "sparse": ("tiny", (*BLT_SETTINGS, "optimizer.tables=sparse")),
}
TRACKED = {
    "blt": ("tiny", BLT_SETTINGS),
    "recomputed": ("tiny", (*BLT_SETTINGS, "run.activation_checkpointing=full")),
    "selective": ("tiny", (*BLT_SETTINGS, "run.activation_checkpointing=selective")),
    "entropy": ("tiny-entropy", ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_pass_keeps(repo: Path, data: Path, tmp_path: Path, kind: str) -> None:
    name, settings = KINDS[kind]
    config = config_of(repo, name, *settings)
    trainer = prepare_run(config, tmp_path, data)[0]
    saved = saved_by_autograd(trainer)
    assert memory(config)["activations"] == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("kind", TRACKED)
def test_the_peak_of_a_micro_batch(repo: Path, data: Path, tmp_path: Path, kind: str) -> None:
    name, settings = TRACKED[kind]
    config = config_of(repo, name, *settings)
    kept, peak = tracked(prepare_run(config, tmp_path, data)[0])
    estimate = memory(config)
    assert estimate["activations"] == pytest.approx(kept, rel=0.01)
    assert estimate["activations"] + estimate["temporary"] == pytest.approx(peak, rel=0.01)


def test_recomputation_keeps_little(repo: Path) -> None:
    """The inputs of parts, the patches' keys and values, and what no part holds: embeddings and logits."""
    kept, products, again = (
        memory(config_of(repo, "tiny", *BLT_SETTINGS, f"run.activation_checkpointing={what}"))
        for what in ("none", "selective", "full")
    )
    assert again["activations"] < 0.25 * kept["activations"]
    assert again["activations"] < 0.7 * products["activations"] < 0.6 * kept["activations"]
    assert again["weights_and_optimizer"] == kept["weights_and_optimizer"]


def matrices_of(config: BLTRun) -> list[int]:
    """The numbers of each block's matrices."""
    with torch.device("meta"):
        model = BLT(config.model)
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    return [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in blocks]


def test_muon_keeps_one_moment_of_a_matrix(repo: Path, data: Path, tmp_path: Path) -> None:
    adamw, muon = (config_of(repo, "tiny", *BLT_SETTINGS, f"optimizer.name={name}") for name in ("adamw", "muon"))
    trainer = prepare_run(muon, tmp_path, data)[0]
    tensors = trainer.state.state_dict().tensors
    kept = sum(t.numel() for name, t in tensors.items() if name.endswith(("_avg", "_avg_sq", "momentum_buffer")))
    weights = sum(p.numel() for p in trainer.objective.model.parameters())
    assert memory(muon)["weights_and_optimizer"] == 4 * (weights + kept)
    assert memory(muon)["weights_and_optimizer"] < memory(adamw)["weights_and_optimizer"] == 12 * weights


@pytest.mark.parametrize("tables", ["dense", "sparse"])
def test_memory_of_several_ranks(repo: Path, tables: str) -> None:
    """Everything is sharded, sparse tables by row; a rank computes its share of the rows in micro-batches."""
    settings = (*BLT_SETTINGS, f"optimizer.tables={tables}", "batch.micro_rows=1")
    one, two = (memory(config_of(repo, "tiny", *settings), ranks) for ranks in (1, 2))
    config = config_of(repo, "tiny", *settings)
    assert isinstance(config, BLTRun)
    table = config.model.params()["hash tables"] if tables == "sparse" else 0
    others = config.model.n_params() - table
    assert one["weights_and_optimizer"] == 16 * others + 12 * table
    assert two["weights_and_optimizer"] == 8 * others + 6 * table
    assert one["activations"] == two["activations"]
    blocks = matrices_of(config)
    outside = others - sum(blocks)
    assert (one["gathered"], two["gathered"]) == (0, 4 * (outside + 2 * max(blocks)))
    assert two["activations"] + two["temporary"] >= 8 * outside
    touched = min(503, 1 << 20) * 2  # two tables of 503 rows: 4 rows of 128 bytes may touch all of them
    assert one["touched"] == (4 * 16 * (3 * touched + 2 * touched) if table else 0)
    # A rank updates half of them. It fetches 512 at most, for which the leaf has room for 1,024, or all.
    assert two["touched"] == (4 * 16 * (3 * touched // 2 + 2 * touched) if table else 0)
    with pytest.raises(ConfigError, match="cannot be divided evenly among 3 ranks"):
        memory(config, ranks=3)
    four, grouped = (memory(config_of(repo, "tiny", *settings, f"run.shard_ranks={n}"), 4) for n in (4, 2))
    rows = 12 * 16 * 252 if table else 0  # of 1,006 the first rank has a quarter, rounded up
    assert four["weights_and_optimizer"] == 4 * others + rows
    assert grouped["weights_and_optimizer"] == 8 * others + rows
    assert {key: four[key] - grouped[key] for key in ("gathered", "activations")} == {"gathered": 0, "activations": 0}


def test_ranks_gather_bfloat16_and_keep_no_casted_matrices(repo: Path) -> None:
    settings = (*BLT_SETTINGS, "batch.micro_rows=1")
    config = config_of(repo, "tiny", *settings)
    assert isinstance(config, BLTRun)
    wide, half = (memory(config_of(repo, "tiny", *settings, f"run.dtype={dtype}"), 2) for dtype in ("fp32", "bf16"))
    alone = memory(config_of(repo, "tiny", *settings, "run.dtype=bf16"))
    blocks = matrices_of(config)
    assert wide["gathered"] - half["gathered"] == 2 * 2 * max(blocks)
    assert alone["activations"] - half["activations"] == 2 * sum(blocks)
    assert half["weights_and_optimizer"] == wide["weights_and_optimizer"]
