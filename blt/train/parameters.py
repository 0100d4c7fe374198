"""Which parameters train, and how fast: patterns over parameter names, as in `blt inspect MODEL --tensors`.

Patterns are shell patterns (`fnmatch`): `latent.*` is the latent transformer, `*norm.weight` every norm. Names are
those of the checkpoint, such as `decoder.layers.0.attention.wq.weight`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from blt.train.config import OptimizerConfig
from blt_runtime.errors import ConfigError


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Freezes the parameters whose name matches a pattern; returns their names.

    Raises ConfigError for a pattern that matches nothing, and if nothing is left to train.
    """
    patterns = list(patterns)
    parameters = dict(model.named_parameters())
    _check_used("optimizer.freeze", patterns, parameters)
    frozen = [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise ConfigError("optimizer.freeze leaves no parameter to train; remove a pattern")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters that train, one group per factor: {"params": [...], "scale": factor}, factor 1 first.

    The learning rate of a group is the schedule's times its factor. If several patterns of `optimizer.lr_scale` match,
    the last one counts. Frozen parameters are in no group, so neither steps nor weight decay change them.
    Raises ConfigError for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    _check_used("optimizer.lr_scale", config.lr_scale, names)
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scale_of(name, config.lr_scale), []).append(parameter)
    return [{"params": members, "scale": scale} for scale, members in groups.items() if members]


def scale_of(name: str, scales: Mapping[str, float]) -> float:
    """The factor of one parameter's learning rate: that of the last matching pattern, 1 if none matches."""
    found = [scale for pattern, scale in scales.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else 1.0


def _check_used(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(f"{key}: {pattern!r} matches no parameter; the nearest name is {near[0]!r}")
