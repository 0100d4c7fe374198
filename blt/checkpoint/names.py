"""Names of tensors: without the prefixes of wrappers, and as short lists for messages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from blt_runtime.errors import CheckpointError

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What `torch.compile`, DistributedDataParallel, FSDP and activation checkpointing insert into names, at any depth and
in any order. No parameter of a supported format has such a part in its name."""
COUNTER = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` stores next to the averaged weights."""
SHOWN = 5
Tensors = TypeVar("Tensors")


def without_wrappers(found: Mapping[str, Tensors], where: Path) -> dict[str, Tensors]:
    """The tensors under the names that they have in the model itself.

    Raises CheckpointError if two tensors have the same name there.
    """
    plain: dict[str, str] = {}
    for name in found:
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise CheckpointError(f"{where}: {plain[bare]} and {name} are the same parameter; save one of them")
        plain[bare] = name
    wrapped = any(bare != name for bare, name in plain.items())
    return {bare: found[name] for bare, name in plain.items() if not (wrapped and bare == COUNTER)}


def listed(names: Sequence[str]) -> str:
    """All names if they are few; else the first, the number of the others and the prefix of all."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    prefix = os.path.commonprefix(list(names))  # noqa: RUF071 (names, not paths)
    common = f"; all begin with {prefix!r}" if prefix else ""
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more{common}"


def mismatch(missing: Sequence[str], wrong: Sequence[str], unknown: Sequence[str]) -> str:
    """What does not fit a configuration: missing and unknown names, and sentences about wrong tensors."""
    if len(missing) + len(wrong) + len(unknown) <= SHOWN:
        return "; ".join([*(f"missing {name}" for name in missing), *wrong, *(f"unknown {name}" for name in unknown)])
    found = list(wrong[:SHOWN])
    found += [f"{len(wrong) - SHOWN} more like this"] if len(wrong) > SHOWN else []
    found += [f"{len(missing)} missing ({listed(missing)})"] if missing else []
    found += [f"{len(unknown)} unknown ({listed(unknown)})"] if unknown else []
    return "; ".join(found) + _prefix_hint(missing, unknown)


def _prefix_hint(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Names the prefix without which the unknown names are the missing ones."""
    wanted = set(missing)
    for name in unknown[:1]:
        for theirs in wanted:
            prefix = name.removesuffix(theirs)
            if prefix != name and all(other.removeprefix(prefix) in wanted for other in unknown):
                return f"; they fit without the prefix {prefix!r}: rename them"
    return ""
