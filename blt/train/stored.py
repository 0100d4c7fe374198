"""The stored boundaries of a run: those that were named, or those in the data folder that fit it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from blt.data import boundaries
from blt.data.boundaries import Plan, StoredBoundaries
from blt.data.dataset import Dataset
from blt.data.entropy_cache import entropy_key
from blt.model import EntropyModel
from blt.train.config import BLTRun
from blt_runtime.errors import ConfigError, InputError

log = logging.getLogger("blt.train")


def find_boundaries(
    config: BLTRun, dataset: Dataset, splits: Iterable[str], entropy: EntropyModel, path: str | Path | None = None
) -> dict[str, StoredBoundaries] | None:
    """The boundaries of each split in the folder `path`, or in one of `DATA/boundaries`; None if none there fits.

    Boundaries that are found are complete and were computed in float32, so they are those that the run would compute.
    Named ones may be of bfloat16. Raises ConfigError and InputError if named ones do not fit the run.
    """
    splits, key = tuple(splits), entropy_key(entropy, config.patching.reset_newlines)
    if path is not None:
        folder = Path(path)
        plan = boundaries.read_plan(folder)
        _check(config, plan, folder, key=key, dataset=dataset, splits=splits)
    else:
        found = _search(config, dataset, splits, key)
        if found is None:
            return None
        folder, plan = found
    log.info("boundaries: read from %s (threshold %.6f nats)", folder, plan.rule.threshold)
    return {split: StoredBoundaries(folder, plan, dataset, split) for split in splits}


def _search(config: BLTRun, dataset: Dataset, splits: tuple[str, ...], key: str) -> tuple[Path, Plan] | None:
    for path in sorted((dataset.folder / boundaries.FOLDER).glob(f"*/{boundaries.PLAN}")):
        folder = path.parent
        try:
            plan = boundaries.read_plan(folder)
            if plan.dtype != "float32":
                raise ConfigError(f"{folder} has boundaries in {plan.dtype}, which --boundaries must name")
            _check(config, plan, folder, key=key, dataset=dataset, splits=splits)
        except (ConfigError, InputError) as error:
            log.info("not used: %s", error)
        else:
            return folder, plan
    return None


def _check(config: BLTRun, plan: Plan, folder: Path, *, key: str, dataset: Dataset, splits: tuple[str, ...]) -> None:
    """Raises ConfigError unless the plan has the run's rule and entropy model, InputError unless it has its text."""
    if plan.entropy != key:
        raise ConfigError(f"{folder} has boundaries of another entropy model; make them with this one")
    patching = config.patching
    if different := boundaries.difference(patching.rule(plan.rule.threshold), plan.rule):
        raise ConfigError(f"patching of the run differs from the boundaries in {folder}: {different}")
    if patching.needs_threshold:
        chosen, groups = plan.target_patch_size, config.data.groups
        as_it_is = f"set patching.threshold={plan.rule.threshold} to use them"
        if chosen != patching.target_patch_size:
            how = "was given" if chosen is None else f"was chosen for patches of {chosen:g} bytes"
            raise ConfigError(
                f"the threshold of {folder} {how}, the run wants patches of {patching.target_patch_size:g}; {as_it_is}"
            )
        if plan.groups != (None if groups is None else tuple(groups)):
            raise ConfigError(f"the threshold of {folder} was chosen on other data.groups; {as_it_is}")
    boundaries.check_text(folder, plan, dataset, splits)
    if missing := boundaries.missing(folder, plan, splits):
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(plan.names())} shards, first {missing[0][1].name}; run "
            "`blt data boundaries` again"
        )
