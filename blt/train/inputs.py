"""The inputs of a run: its text as batches, cut by a patch rule or a vocabulary, and the models that cut it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blt.data.batches import Groups, Int, PatchStarts, TokenSource, first_bytes
from blt.data.dataset import Dataset, Documents
from blt.data.mixture import Mixture
from blt.data.packing import FIRST_BLOCK_TOKENS, ORDER, Loader
from blt.data.patches import PatchIndex, choose_threshold, sample_documents
from blt.data.quantities import amount
from blt.data.token_cache import tokenised, vocabulary_for
from blt.model import EntropyModel
from blt.model.vocabulary import Vocabulary
from blt.train import initial_weights
from blt.train import mixture as mixing
from blt.train.batching import batch_shape, with_buckets
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.dryrun import dry_run, flops_per_byte
from blt.train.stored import find_boundaries
from blt_runtime.errors import CheckpointError, ConfigError
from blt_runtime.patching import PatchRule

log = logging.getLogger("blt.train")
VALIDATION_SEED = 0
"""Not the run's: runs of any seed and row length validate on the same documents in the same order."""


@dataclass(frozen=True)
class RunInputs:
    """`config` is the run's, with the row lengths chosen on the training text; `loaders` has one for each split.

    `extra` is what a resumed run must share. `entropy` and `rule` belong to a BLT, `vocabulary` to a token model;
    `unit_bytes` is the mean patch or token in bytes. `mixture` is None if training reads permutations of its documents.
    """

    config: RunConfig
    loaders: dict[str, Callable[[], Loader] | None]
    extra: dict[str, Any]
    entropy: EntropyModel | None = None
    rule: PatchRule | None = None
    vocabulary: Vocabulary | None = None
    unit_bytes: float | None = None
    mixture: Mixture | None = None

    @property
    def training(self) -> Loader:
        """A fresh loader of the training text. Raises ConfigError if there is none."""
        make = self.loaders["train"]
        if make is None:
            raise ConfigError("data.groups leaves no training documents; list the groups with `blt data info`")
        return make()

    @property
    def _unit(self) -> dict[str, Any]:
        return {"bytes_per_token": self.unit_bytes, "patch_size": self.unit_bytes}

    @property
    def _measured(self) -> dict[str, Any]:
        return {**self._unit, "entropy": self.entropy.config if self.entropy else None}

    @property
    def flops_per_byte(self) -> float:
        """Forward FLOPs per byte of this text."""
        return flops_per_byte(self.config, **self._measured)

    @property
    def model_flops_per_byte(self) -> float:
        """Those of the trained model alone, without the entropy model that cuts its patches."""
        return flops_per_byte(self.config, **self._unit)

    @property
    def run_bytes(self) -> float:
        """About the bytes of text that the steps of the schedule read: rows are taken to be full."""
        batch, unit = self.config.batch, self.unit_bytes or 1.0
        row = batch.byte_buckets[-1] * (unit if isinstance(self.config, BPERun) else 1.0)
        if batch.patches is not None:
            row = min(row, batch.patches * unit)
        return self.config.schedule.steps * batch.rows * row

    def dry_run(self, ranks: int = 1) -> dict[str, Any]:
        """`blt.train.dry_run` with the patch or token size measured on this text, and the mixture."""
        report = dry_run(self.config, ranks=ranks, **self._measured)
        return report if self.mixture is None else report | {"mixture": mixing.report(self.mixture, self.run_bytes)}


def prepare_inputs(
    config: RunConfig,
    data: str | Path | None = None,
    *,
    entropy_model: str | Path | None = None,
    boundaries: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
    splits: tuple[str, ...] = ("train", "valid"),
    steps: int | None = None,
) -> RunInputs:
    """Opens the data and makes what a run caches next to it: entropies, or a vocabulary and its tokens.

    boundaries: a folder of stored ones; without it, those in the data folder that fit the run replace its entropies.
    steps: the blocks that so many training steps read are planned ahead of them (default: those of the schedule).

    Raises ConfigError, InputError, CheckpointError, and MissingExtra if a run of kind bpe has no `tokenizers`.
    """
    folder = data or config.data.path
    if folder is None:
        raise ConfigError("no data: name a folder made by `blt data prepare` with --data or data.path")
    dataset = Dataset(folder)
    dataset.check("train", "valid")
    train = dataset.split("train")
    _check_groups(config, train)
    mixture = mixing.mixture_of(config.data, train, _members(config, train))
    text = _Text(dataset, splits, config.schedule.steps if steps is None else steps, mixture)
    if isinstance(config, BLTRun):
        entropy = None
        if config.patching.scheme == "entropy":
            entropy = frozen_entropy(entropy_model or config.entropy_model, device)
        compiled = config.run.compile if compile is None else compile
        stored = None
        if entropy is not None:
            stored = find_boundaries(config, dataset, splits, entropy, boundaries)
        elif boundaries is not None:
            raise ConfigError(f"the scheme {config.patching.scheme} needs no stored boundaries; leave them out")
        if stored is not None:
            text.starts.update(stored)
            return _with_rule(config, text, entropy, rule=stored["train"].plan.rule, key=stored["train"].key)
        return _with_patches(config, text, entropy, compiled=compiled)
    return _with_tokens(config, text) if isinstance(config, BPERun) else text.inputs(config)


@dataclass(frozen=True)
class _Text:
    """The splits of a dataset, and how they are cut: `sources` into tokens (default: bytes), `starts` into patches.

    steps: of training, which read the blocks that are planned ahead.  mixture: of the training text.
    """

    dataset: Dataset
    splits: tuple[str, ...]
    steps: int = 0
    mixture: Mixture | None = None
    sources: dict[str, TokenSource] = field(default_factory=dict)
    starts: dict[str, PatchStarts] = field(default_factory=dict)

    def inputs(self, config: RunConfig, extra: dict[str, Any] | None = None, **models: Any) -> RunInputs:
        """Chooses the row lengths and makes the loaders."""
        train = self.dataset.split("train")
        source, starts = self.sources.get("train", train), self.starts.get("train")
        config = with_buckets(config, source, members=_members(config, train), starts=starts, mixture=self.mixture)
        loaders = {split: self._loader(config, split) for split in self.splits}
        first = config.data.first_block_tokens or FIRST_BLOCK_TOKENS
        same = {"data": train.sha256, "first_block": first, "order": ORDER, **(extra or {})}
        if self.mixture is not None:
            same["mixture"] = mixing.settings(config.data, self.mixture)
        inputs = RunInputs(config, loaders, same, mixture=self.mixture, **models)
        if self.mixture is not None:
            mixing.log_epochs(self.mixture, inputs.run_bytes)
        return inputs

    def _loader(self, config: RunConfig, split: str) -> Callable[[], Loader] | None:
        """Makes loaders over one split; None if it has no documents.

        Validation reads the first `data.valid_bytes` of its documents, to the byte, before they become rows: rows,
        lengths and packing change what is padded and not what is read. The documents are shuffled first, because shards
        store one group after another.
        """
        documents, shape = self.dataset.split(split), batch_shape(config)
        members = _members(config, documents)
        if not len(members):
            return None
        source, starts = self.sources.get(split, documents), self.starts.get(split)
        if split == "train":
            seed, workers = config.run.seed, config.data.workers
            return lambda: Loader(
                source, shape, starts, seed=seed, subset=members, workers=workers, total_batches=self.steps,
                mixture=self.mixture, first_block_tokens=config.data.first_block_tokens,
            )  # fmt: skip
        members = np.random.default_rng(VALIDATION_SEED).permutation(members)
        members, last = first_bytes(source, members, config.data.valid_bytes)
        groups = Groups(tuple(documents.names), documents.group_ids)
        return lambda: Loader(source, shape, starts, shuffle=False, subset=members, last_tokens=last, groups=groups)

    def compute_entropies(self, config: BLTRun, indices: dict[str, PatchIndex]) -> None:
        """Computes the entropies of a sample of the training text, and those that validation reads.

        Those of the training text are computed block by block ahead of the step.
        """
        needed = {}
        for split in self.splits:
            make = self._loader(config, split)
            if make is not None:
                documents = self.dataset.split(split)
                sampled = split == "train"
                needed[split] = sample_documents(documents, _members(config, documents)) if sampled else make().subset
        _announce(indices, needed)
        for split, members in needed.items():
            indices[split].compute(members)


def _announce(starts: dict[str, PatchIndex], needed: dict[str, Int]) -> None:
    """Logs which entropies are about to be computed, and where they are kept."""
    parts, folder = [], None
    for split, members in needed.items():
        cache, documents = starts[split].cache, starts[split].documents
        assert cache is not None
        folder = cache.path.parent
        if missing := cache.missing_bytes(members):
            parts.append(f"{amount(missing)} of the {amount(documents.n_bytes)} of {split}")
    if parts:
        log.info(
            "computing the entropies that this run needs before its first step: %s; further ones are computed ahead of "
            "the steps, and all are kept in %s for the next run",
            " and ".join(parts), folder,
        )  # fmt: skip
    elif folder is not None:
        log.info("entropies: read from %s, missing ones are computed ahead of the steps", folder)


def _with_patches(config: BLTRun, text: _Text, entropy: EntropyModel | None, compiled: bool) -> RunInputs:
    newlines = config.patching.reset_newlines
    indices = {
        name: PatchIndex(text.dataset, name, entropy, reset_newlines=newlines, compile=compiled) for name in text.splits
    }
    text.starts.update(indices)
    if entropy is not None:
        text.compute_entropies(config, indices)
    rule = _rule(config, indices["train"], _members(config, text.dataset.split("train")))
    text.starts.update({name: index.with_rule(rule) for name, index in indices.items()})
    return _with_rule(config, text, entropy, rule=rule, key=indices["train"].key)


def _with_rule(config: BLTRun, text: _Text, entropy: EntropyModel | None, *, rule: PatchRule, key: str) -> RunInputs:
    """The inputs of a run whose boundaries are known. key: identifies the entropies that they follow from."""
    documents = text.dataset.split("train")
    unit_bytes = _mean_patch_size(documents, text.starts["train"], _members(config, documents))
    extra = {"patch_rule": rule.to_dict(), "entropy": key}
    return text.inputs(config, extra, entropy=entropy, rule=rule, unit_bytes=unit_bytes)


def _with_tokens(config: BPERun, text: _Text) -> RunInputs:
    wanted, documents = config.tokenizer, text.dataset.split("train")
    members = _members(config, documents)
    vocabulary = vocabulary_for(
        text.dataset, members, size=wanted.vocab_size, train_bytes=wanted.train_bytes, path=wanted.path
    )
    tokens = {name: tokenised(text.dataset, name, vocabulary) for name in text.splits}
    text.sources.update(tokens)
    unit_bytes = float(documents.lengths[members].sum() / max(1, tokens["train"].lengths[members].sum()))
    log.info("%.3f bytes per token", unit_bytes)
    return text.inputs(config, {"tokenizer": vocabulary.key}, vocabulary=vocabulary, unit_bytes=unit_bytes)


def frozen_entropy(path: str | Path | None, device: str) -> EntropyModel:
    """The entropy model of a checkpoint, frozen. Raises ConfigError without a path, and CheckpointError."""
    if path is None:
        raise ConfigError("entropy patches need an entropy model: --entropy-model RUN (made by `blt train entropy`)")
    entropy = initial_weights.entropy_model(path)
    if entropy is None:
        raise CheckpointError(f"{path} holds no entropy model; give the folder of a `blt train entropy` run")
    return entropy.to(device).eval().requires_grad_(False)


def _rule(config: BLTRun, index: PatchIndex, members: Int) -> PatchRule:
    patching = config.patching
    if not patching.needs_threshold:
        return patching.rule()
    threshold = choose_threshold(index, patching.rule(0.0), target=patching.target_patch_size, members=members)
    log.info("threshold %.6f nats for patches of %.2f bytes", threshold, patching.target_patch_size)
    return patching.rule(threshold)


def _mean_patch_size(documents: Documents, starts: PatchStarts, members: Int) -> float:
    """Bytes per patch, counted as in `blt eval`, on a sample of the training text."""
    sample = sample_documents(documents, members)
    n_patches = sum(int(starts.starts(int(document))[1:].sum()) for document in sample)
    return max(1, int(documents.lengths[sample].sum())) / max(1, n_patches)


def _check_groups(config: RunConfig, documents: Documents) -> None:
    for group in config.data.groups or ():
        if not len(documents.of_groups([group])):
            raise ConfigError(f"data.groups: {group!r} has no training documents; see `blt data info`")


def _members(config: RunConfig, documents: Documents) -> Int:
    groups = config.data.groups
    return np.arange(len(documents)) if groups is None else documents.of_groups(groups)
