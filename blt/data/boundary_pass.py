"""Computes the stored boundaries of a data folder: shard by shard, by any number of processes.

A plan is made first (`make_plan`): a threshold is chosen on a sample of entropies if the rule needs one. Then each
process computes the shards of its part (`compute`). No process waits for another one, and a killed process repeats at
most the shard that it was in. Entropies are computed in the chunks of `blt.data.entropy_cache`, at the same places of
the split. So in float32 the boundaries are, bit for bit, those that training computes for itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blt.data import boundaries
from blt.data.batches import Int
from blt.data.boundaries import Bools, Dtype, Flips, Plan, ShardText
from blt.data.dataset import Dataset, Documents
from blt.data.entropies import EntropyPass, Float, make_pass
from blt.data.entropy_cache import Progress, entropy_key
from blt.data.patches import PatchIndex, choose_threshold, sample_documents, starts_of
from blt.model import EntropyModel
from blt_runtime.errors import InputError, UsageError
from blt_runtime.patching import PatchRule
from blt_runtime.records import to_dict

log = logging.getLogger("blt.data")


@dataclass(frozen=True)
class Request:
    """The boundaries that are wanted.

    rule: any threshold if `target_patch_size` (bytes per patch) is given.  groups: of the documents that the threshold
    is chosen on (None: all).  compile: the entropy model.
    """

    splits: tuple[str, ...]
    rule: PatchRule
    target_patch_size: float | None = None
    groups: tuple[str, ...] | None = None
    dtype: Dtype = "float32"
    compile: bool = False


def folder_name(model: EntropyModel, request: Request) -> str:
    """The name of the folder in DATA/boundaries: a hash of the entropy model and of the wanted rule."""
    what = to_dict(request) | {"entropy": entropy_key(model, request.rule.reset_newlines)}
    del what["compile"]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def plan_for(dataset: Dataset, model: EntropyModel, request: Request, folder: Path) -> Plan:
    """The plan in `folder`, which is made if there is none: one process makes it and the others wait.

    Raises InputError if the folder has a plan of other boundaries, and ConfigError if no threshold reaches the target.
    """
    if not (folder / boundaries.PLAN).exists():
        boundaries.create_plan(folder, lambda: make_plan(dataset, model, request))
    plan = boundaries.read_plan(folder)
    rule = replace(request.rule, threshold=plan.rule.threshold) if request.target_patch_size else request.rule
    wanted = replace(
        plan, entropy=entropy_key(model, rule.reset_newlines), dtype=request.dtype, rule=rule,
        target_patch_size=request.target_patch_size, groups=request.groups, shards=_shards(dataset, request.splits),
    )  # fmt: skip
    if plan != wanted:
        raise InputError(f"{folder} has other boundaries: {_difference(plan, wanted)}; give another folder with -o")
    return plan


def _difference(plan: Plan, wanted: Plan) -> str:
    if plan.entropy != wanted.entropy:
        return "of another entropy model"
    if plan.shards != wanted.shards:
        return "of other text, or of other splits"
    return boundaries.difference(plan.rule, wanted.rule) or boundaries.difference(plan, wanted)


def make_plan(dataset: Dataset, model: EntropyModel, request: Request) -> Plan:
    """Chooses a threshold on a sample if the rule needs one, and counts the boundaries that bfloat16 flips on it.

    Raises InputError if the data has none of the splits' documents, and ConfigError if no threshold reaches the target.
    """
    shards = _shards(dataset, request.splits)
    if not any(shards.values()):
        raise InputError(f"{dataset.folder} has no documents in {', '.join(request.splits)}")
    rule, documents = request.rule, dataset.split("train")
    index = PatchIndex(dataset, "train", model, reset_newlines=rule.reset_newlines, compile=request.compile)
    members = np.arange(len(documents)) if request.groups is None else documents.of_groups(request.groups)
    if request.target_patch_size is not None:
        threshold = choose_threshold(index, rule, request.target_patch_size, members)
        log.info("threshold %.6f nats for patches of %.2f bytes", threshold, request.target_patch_size)
        rule = replace(rule, threshold=threshold)
    flips = None if request.dtype == "float32" else _count_flips(index.with_rule(rule), model, members)
    return Plan(
        entropy_key(model, rule.reset_newlines), dtype=request.dtype, rule=rule,
        target_patch_size=request.target_patch_size, groups=request.groups, shards=shards, flips=flips,
    )  # fmt: skip


def _shards(dataset: Dataset, splits: Iterable[str]) -> dict[str, tuple[ShardText, ...]]:
    return {split: boundaries.shards_of(dataset.split(split)) for split in splits}


def _count_flips(index: PatchIndex, model: EntropyModel, members: Int) -> Flips:
    """Compares the boundaries in bfloat16 with those in float32 on a sample of the training documents."""
    assert index.rule is not None
    sample = sample_documents(index.documents, members)
    index.compute(sample)
    ids = [index.documents.ids(int(document)) for document in sample]
    bf16 = make_pass(model, len(index.documents.tokens), reset_newlines=index.reset_newlines, bf16=True)
    stream = _Stream(bf16.run(np.concatenate(ids)))
    tokens = found = lost = new = 0
    for document, ids_N in zip(sample.tolist(), ids, strict=True):
        exact, theirs = index.starts(document), starts_of(index.rule, ids_N, stream.take(len(ids_N)))
        tokens, found = tokens + len(exact), found + int(exact.sum())
        lost, new = lost + int((exact & ~theirs).sum()), new + int((theirs & ~exact).sum())
    return Flips(tokens, found, lost=lost, new=new)


def part_of(plan: Plan, part: int, parts: int) -> list[tuple[str, ShardText]]:
    """The shards of part number `part` of `parts`: every `parts`-th one. Raises UsageError."""
    if not 0 <= part < parts:
        raise UsageError(f"task {part} of {parts}: number tasks from 0 to {parts - 1}")
    return plan.names()[part::parts]


def compute(
    dataset: Dataset,
    model: EntropyModel,
    plan: Plan,
    folder: Path,
    part: int = 0,
    parts: int = 1,
    *,
    compile: bool = False,
) -> int:
    """Computes the shards of one part that are missing. Returns the number of tokens computed.

    Raises UsageError for a part that is none, and InputError if the folder cannot be written.
    """
    mine = part_of(plan, part, parts)
    todo = [(split, shard) for split, shard in mine if boundaries.record_of(folder, shard) is None]
    passes: dict[str, EntropyPass] = {}
    progress = Progress("boundaries", sum(shard.tokens for _, shard in todo), compile and bool(todo))
    for split, shard in todo:
        documents = dataset.split(split)
        if split not in passes:
            newlines, bf16 = plan.rule.reset_newlines, plan.dtype == "bfloat16"
            passes[split] = make_pass(model, len(documents.tokens), newlines, compile=compile, bf16=bf16)
        number = documents.shard_names.index(shard.name)
        members = range(*(int(at) for at in documents.shard_offsets[number : number + 2]))
        starts = _starts(documents, members, plan.rule, passes[split], progress)
        boundaries.write_shard(folder, shard, starts)
    return sum(shard.tokens for _, shard in todo)


def _starts(
    documents: Documents, members: Sequence[int], rule: PatchRule, entropy_pass: EntropyPass, progress: Progress
) -> Iterator[Bools]:
    """Where patches begin in each of some consecutive documents."""
    begin, end = (int(at) for at in documents.token_offsets[[members[0], members[-1] + 1]])
    chunk, length = entropy_pass.chunk, int(documents.token_offsets[-1])
    first, last = begin // chunk * chunk, min(length, -(-end // chunk) * chunk)
    stream = _Stream(entropy_pass.run(documents.tokens, first, last))
    stream.take(begin - first)
    for document in members:
        ids = documents.ids(document)
        yield starts_of(rule, ids, stream.take(len(ids)))
        progress.add(len(ids))


class _Stream:
    """Values that arrive in parts, taken in other parts."""

    def __init__(self, parts: Iterator[Float]):
        self._parts, self._rest = parts, np.empty(0, np.float32)

    def take(self, count: int) -> Float:
        found, have = [self._rest], len(self._rest)
        while have < count:
            found.append(next(self._parts))
            have += len(found[-1])
        values = np.concatenate(found)
        self._rest = values[count:]
        return values[:count]
