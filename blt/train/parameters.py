"""Which parameters train, by which optimizer and by which settings: patterns over parameter names.

Patterns are shell patterns (`fnmatch`): `latent.*` is the latent transformer, `*norm.weight` every norm. Names are
those that `blt inspect MODEL --tensors` prints, such as `decoder.layers.0.attention.wq.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from blt.train.config import OptimizerConfig
from blt.train.patterns import check_used, factor_of
from blt_runtime.errors import ConfigError

TABLES = "hash_embedding.tables.weight"
"""The hash tables of a BLT or an entropy model."""


EMBEDDINGS = (TABLES, "*byte_embedding.weight", "*output.weight")
"""Matrices that are read by row: tables, embeddings of ids, and the output, whose rows are ids too."""


class Settings(NamedTuple):
    """AdamW's settings for one parameter. Its learning rate is the schedule's times `scale`."""

    scale: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Freezes the parameters whose name matches a pattern; returns their names.

    Raises ConfigError for a pattern that matches nothing, and if nothing is left to train.
    """
    patterns = list(patterns)
    parameters = dict(model.named_parameters())
    check_used("optimizer.freeze", patterns, parameters, what="parameter")
    frozen = [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise ConfigError("optimizer.freeze leaves no parameter to train; remove a pattern")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, chosen: Callable[[str, nn.Parameter], bool] = lambda name, _: True
) -> list[dict[str, Any]]:
    """The `chosen` parameters that train, in one group for each `Settings`: {"params": [...], "scale": ..., ...}.

    The run's own settings come first. Frozen parameters are in no group, so neither steps nor weight decay change them.
    Raises ConfigError for a pattern that matches nothing, and for a group whose parameters all belong to earlier ones.
    """
    check_patterns(config, [name for name, _ in model.named_parameters()])
    groups: dict[Settings, list[nn.Parameter]] = {Settings(1.0, config.betas, config.eps, config.weight_decay): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and chosen(name, parameter):
            groups.setdefault(settings_of(name, config), []).append(parameter)
    return [{"params": members, **settings._asdict()} for settings, members in groups.items() if members]


def sparse_table(model: nn.Module, config: OptimizerConfig) -> nn.Parameter | None:
    """The hash tables, if `optimizer.tables: sparse` trains them apart from the dense optimizer; None without tables,
    and if they are frozen."""
    table = dict(model.named_parameters()).get(TABLES)
    return table if config.tables == "sparse" and table is not None and table.requires_grad else None


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether `optimizer.name: muon` trains this parameter by Muon: the matrices of blocks, cross-attention and
    projections to and from patches."""
    return parameter.ndim == 2 and not any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS)


def settings_of(name: str, config: OptimizerConfig) -> Settings:
    """The settings of the parameter `name`: those of the first group that matches it, else the run's.

    A hash table's eps is `table_eps` unless that group gives one.
    """
    eps = config.table_eps if name == TABLES else config.eps
    found = Settings(factor_of(name, config.lr_scale), config.betas, eps, config.weight_decay)
    group = next((group for group in config.groups if fnmatchcase(name, group.match)), None)
    if group is None:
        return found
    return found._replace(**group.model_dump(exclude={"match"}, exclude_none=True))


def check_patterns(config: OptimizerConfig, names: Iterable[str]) -> None:
    """Raises ConfigError for a pattern of `lr_scale` or `groups` that matches none of these parameters, and for a group
    whose parameters all belong to earlier groups."""
    names = list(names)
    check_used("optimizer.lr_scale", config.lr_scale, names, what="parameter")
    patterns = [group.match for group in config.groups]
    check_used("optimizer.groups", patterns, names, what="parameter")
    first = {next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), -1) for name in names}
    for i, pattern in enumerate(patterns):
        if i not in first:
            raise ConfigError(
                f"optimizer.groups: all parameters of {pattern!r} belong to earlier groups; put it before them"
            )
