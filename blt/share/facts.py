"""What a model card says, collected from a run, its data folder, a checkpoint, a bundle and a measurement.

Nothing is computed again, and no path of this machine is among the facts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt.data import dataset
from blt.figures import metrics
from blt_runtime import reading
from blt_runtime.errors import UsageError
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from blt.checkpoint.source import Source
    from blt.model import BLTConfig, EntropyConfig
    from blt_runtime.bundle.manifest import Manifest

PATCH_SIZE, CONTEXT = 4.5, 2048
"""Of the FLOPs per byte, where the mean patch size is not known; bytes of a row."""
BENCH_SCHEMA = "blt.bench/1"
log = logging.getLogger("blt.share")


@dataclass(frozen=True)
class Score:
    """Bits per byte on a text of `bytes` bytes (None: not recorded). subject: which form of the model was scored."""

    subject: str
    text: str
    bits_per_byte: float
    bytes: int | None


@dataclass(frozen=True)
class Speed:
    """A measurement of `blt bench latency --json`."""

    bytes_per_s: float
    first_byte_s: float
    prompt_bytes: int
    backend: str
    precision: str
    threads: int
    cpu: str
    patch_size: float | None


@dataclass(frozen=True)
class Costs:
    """Parameters by part; FLOPs per byte at a mean patch of `patch_size` bytes, in rows of CONTEXT bytes."""

    parameters: Mapping[str, int]
    flops_per_byte: float
    patch_size: float


@dataclass(frozen=True)
class Facts:
    """All that is known about a model; None where nothing is recorded.

    patch_size: measured mean bytes per patch.  trained_bytes: bytes that the run was trained on.  data: the manifest of
    a data folder.  checkpoint: "hf" or "native".  lost: settings that the Hugging Face format does not keep.
    longest_text: bytes that the model was trained or exported for.
    """

    rule: PatchRule
    patch_size: float | None
    costs: Costs | None
    scores: tuple[Score, ...]
    speed: Speed | None
    trained_bytes: int | None
    data: Mapping[str, Any] | None
    checkpoint: str | None
    lost: tuple[str, ...]
    bundle: Manifest | None
    longest_text: int | None


def collect(
    folder: Path,
    source: Source | None,
    bundle: Manifest | None,
    *,
    checkpoint: str | None,
    lost: tuple[str, ...] = (),
    bench: Path | None = None,
    data: Path | None = None,
) -> Facts:
    """The facts of a run or checkpoint in `folder` and of a bundle; at least one of `source` and `bundle` is given.

    bench: output of `blt bench latency --json`.  data: the data folder (default: the one in the run's configuration, if
    it is there). Raises UsageError and InputError for a file that is not of its kind.
    """
    rule = source.patch_rule if source is not None else bundle.spec.patch_rule if bundle is not None else None
    assert rule is not None
    run = metrics.read_run(folder, "") if (folder / metrics.FILE).is_file() else None
    speed = None if bench is None else read_speed(bench)
    patch_size = _patch_size(rule, speed, bundle, run)
    return Facts(
        rule=rule,
        patch_size=patch_size,
        costs=_costs(source, bundle, patch_size or PATCH_SIZE),
        scores=tuple(_scores(run, bundle)),
        speed=speed,
        trained_bytes=None if run is None else run.summary()["bytes"],
        data=_data(folder, data),
        checkpoint=checkpoint,
        lost=lost,
        bundle=bundle,
        longest_text=_longest(source, bundle),
    )


def read_speed(path: Path) -> Speed:
    """The measurement in a file that `blt bench latency --json` wrote. Raises UsageError for any other file."""
    try:
        found = reading.read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--bench {path}: {reading.reason(error)}; give the output of blt bench latency --json"
        ) from None
    try:
        if (found["schema"], found["kind"]) != (BENCH_SCHEMA, "latency"):
            raise ValueError("kind")
        mean = found.get("mean_patch_bytes")
        return Speed(
            bytes_per_s=_positive(found["bytes_per_s"]),
            first_byte_s=_positive(found["time_to_first_byte_s"]),
            prompt_bytes=int(found["prompt_bytes"]),
            backend=str(found["backend"]),
            precision=str(found["precision"]),
            threads=int(found["threads"]),
            cpu=str(found.get("cpu") or "a processor that the record does not name"),
            patch_size=None if mean is None else _positive(mean),
        )
    except (LookupError, TypeError, ValueError):
        raise UsageError(f"--bench {path}: this is not the output of blt bench latency --json") from None


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(value)
    return number


def _patch_size(rule: PatchRule, speed: Speed | None, bundle: Manifest | None, run: metrics.Run | None) -> float | None:
    """Mean bytes per patch: fixed by the rule, or of the text that was evaluated, trained on or generated."""
    if rule.scheme in ("static", "byte"):
        return float(rule.patch_size or 1)
    if bundle is not None and bundle.judged is not None and bundle.judged.boundaries:
        return bundle.judged.bytes / bundle.judged.boundaries
    if run is not None and (sizes := [y for _, y in run.points("patch_size", "step")]):
        return sizes[-1]
    return None if speed is None else speed.patch_size


def _scores(run: metrics.Run | None, bundle: Manifest | None) -> list[Score]:
    found = []
    if run is not None and (valid := run.points("valid_bpb", "step")):
        size = run.valid[-1].get("valid_bytes")
        found.append(Score("checkpoint", "validation split of the training data", valid[-1][1], size))
    if bundle is not None and (judged := bundle.judged) is not None:
        text = "text given to the export"
        found += [Score("checkpoint", text, judged.float_bits_per_byte, judged.bytes)]
        found += [Score(f"bundle, {bundle.precision}", text, judged.bits_per_byte, judged.bytes)]
    return found


def _longest(source: Source | None, bundle: Manifest | None) -> int | None:
    if source is not None and source.blt_config is not None:
        return source.blt_config.encoder.max_seqlen
    return None if bundle is None else bundle.spec.capacity_bytes


def _costs(source: Source | None, bundle: Manifest | None, patch_size: float) -> Costs | None:
    blt, entropy = (source.blt_config, source.entropy_config) if source is not None else _configs(bundle)
    if blt is None:
        return None
    parameters, flops = dict(blt.params()), blt.flops_per_byte(patch_size, CONTEXT)
    if entropy is not None:
        parameters = {"entropy model": entropy.n_params(), **parameters}
        flops += entropy.flops_per_byte(CONTEXT)
    return Costs(parameters, flops, patch_size)


def _configs(bundle: Manifest | None) -> tuple[BLTConfig | None, EntropyConfig | None]:
    """The configurations that a bundle's manifest quotes, if they are complete and PyTorch is installed."""
    if bundle is None:
        return None, None
    try:
        from blt.model import BLTConfig, EntropyConfig

        blt, entropy = bundle.config.get("blt"), bundle.config.get("entropy")
        return BLTConfig.model_validate(blt), None if entropy is None else EntropyConfig.model_validate(entropy)
    except (ImportError, ValueError):
        log.info("parameters and FLOPs are not stated: they need PyTorch and a manifest with whole configurations")
        return None, None


def _data(folder: Path, given: Path | None) -> Mapping[str, Any] | None:
    if given is not None:
        return dataset.read_manifest(given)
    try:
        path = Path(reading.read_json(folder / "config.json")["data"]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return dataset.read_manifest(path) if dataset.is_data_folder(path) else None
