"""The mixture of a run: the weights and the temperature of its configuration, and how often it reads each group."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from blt.data.batches import Int
from blt.data.dataset import Documents
from blt.data.mixture import Group, Mixture, shares
from blt.data.quantities import amount
from blt.train.config import DataConfig
from blt.train.patterns import check_used, factor_of

log = logging.getLogger("blt.train")
MANY_EPOCHS = 4
"""A group that is read more often is worth a warning. Up to four epochs are nearly as good as new text, many more are
worth little (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""
NAMED_GROUPS = 8


def mixture_of(config: DataConfig, documents: Documents, members: Int) -> Mixture | None:
    """The mixture of these training documents; None without any, and if neither weights nor a temperature
    are given.

    Raises ConfigError for a pattern of `data.mix` that matches no group of them.
    """
    if not len(members) or (not config.mix and config.temperature == 1):
        return None
    found = {}
    for number in np.unique(documents.group_ids[members]).tolist():
        own = members[documents.group_ids[members] == number]
        found[documents.names[number]] = number, own, documents.lengths[own]
    what = "group of the training text" if config.groups is None else "group that data.groups leaves"
    check_used("data.mix", config.mix, found, what=what)
    share_of = shares(
        {name: int(lengths.sum()) for name, (_, _, lengths) in found.items()},
        _weights(config, found),
        temperature=config.temperature,
        by=config.temperature_by,
    )
    return Mixture({name: Group(*group, share=share_of[name]) for name, group in found.items()})


def _weights(config: DataConfig, groups: Iterable[str]) -> dict[str, float]:
    return {name: factor_of(name, config.mix) for name in groups}


def settings(config: DataConfig, mixture: Mixture) -> dict[str, Any]:
    """What a resumed run must share, as plain values."""
    return {
        "weights": _weights(config, mixture.groups), "temperature": config.temperature, "by": config.temperature_by
    }  # fmt: skip


def report(mixture: Mixture, n_bytes: float) -> dict[str, Any]:
    """The shares of the groups, and how often a run that reads `n_bytes` reads each."""
    share = {name: group.share for name, group in mixture.groups.items()}
    return {"run_bytes": round(n_bytes), "share": share, "epochs": mixture.epochs(n_bytes)}


def log_epochs(mixture: Mixture, n_bytes: float) -> None:
    """Logs the groups that a run of `n_bytes` reads most often, and warns of many repetitions."""
    epochs = dict(sorted(mixture.epochs(n_bytes).items(), key=lambda item: -item[1]))
    named = [f"{name} {times:,.2f} times" for name, times in list(epochs.items())[:NAMED_GROUPS]]
    others = len(epochs) - len(named)
    log.info(
        "the run reads about %s of a mixture of %d groups: %s%s",
        amount(round(n_bytes)), len(epochs), ", ".join(named), f", {others} others less often" if others else "",
    )  # fmt: skip
    if often := [name for name, times in epochs.items() if times > MANY_EPOCHS]:
        log.warning(
            "%d of %d groups are read more than %d times, %s most often (%.1f times); text repeated so often teaches "
            "little: lower data.mix of such groups, raise data.temperature, or train for fewer steps",
            len(often), len(epochs), MANY_EPOCHS, often[0], epochs[often[0]],
        )  # fmt: skip
