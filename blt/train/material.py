"""What a run reads: its text as batches, cut by a patch rule or a vocabulary, and what that was made with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blt.data.batches import Int, PatchStarts, TokenSource
from blt.data.dataset import Dataset, Documents
from blt.data.packing import Loader
from blt.data.patches import PatchIndex, choose_threshold
from blt.data.token_cache import tokenised, vocabulary_for
from blt.model import EntropyConfig, EntropyModel
from blt.model.vocabulary import Vocabulary
from blt.train import start
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.dryrun import dry_run, flops_per_byte
from blt.train.packed import batch_shape, with_buckets
from blt_runtime.errors import CheckpointError, ConfigError
from blt_runtime.patching import PatchRule

log = logging.getLogger("blt.train")
MEASURED_BYTES = 2 << 20  # of the training text, for the mean patch in the count of FLOPs
VALIDATION_SEED = 0  # not the run's: runs of any seed and row length validate on the same documents in the same order


@dataclass(frozen=True)
class Material:
    """`config`: the run's, with the row lengths chosen on the training text.  `extra`: what a resumed run must share.
    `entropy` and `rule` belong to a BLT, `vocabulary` to a token model; `unit` is the mean patch or token in bytes."""

    config: RunConfig
    loaders: dict[str, Callable[[], Loader] | None]
    extra: dict[str, Any]
    entropy: EntropyModel | None = None
    rule: PatchRule | None = None
    vocabulary: Vocabulary | None = None
    unit: float | None = None

    @property
    def training(self) -> Loader:
        """A fresh loader of the training text. Raises ConfigError if there is none."""
        make = self.loaders["train"]
        if make is None:
            raise ConfigError("data.groups leaves no training documents; look at the data with `blt data info`")
        return make()

    @property
    def _costing(self) -> tuple[float | None, EntropyConfig | None, float | None]:
        return self.unit, self.entropy.config if self.entropy else None, self.unit

    @property
    def flops_per_byte(self) -> float:
        """Forward FLOPs per byte of this text."""
        return flops_per_byte(self.config, *self._costing)

    def dry_run(self) -> dict[str, Any]:
        """`blt.train.dry_run` with what was measured on this text."""
        return dry_run(self.config, *self._costing)


def gather(
    config: RunConfig,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
    splits: tuple[str, ...] = ("train", "valid"),
) -> Material:
    """Opens the data and makes what a run keeps beside it: entropies, or a vocabulary and its tokens.

    Raises ConfigError, InputError, CheckpointError, and MissingExtra where a run of kind bpe has no `tokenizers`.
    """
    folder = data or config.data.path
    if folder is None:
        raise ConfigError("no data: name a folder made by `blt data prepare` with --data or data.path")
    dataset = Dataset(folder)
    dataset.check("train", "valid")
    _check_groups(config, dataset.split("train"))
    text = _Text(dataset, splits)
    if isinstance(config, BLTRun):
        compiled = config.run.compile if compile is None else compile
        return _patches(config, text, entropy_model or config.entropy_model, compiled, device)
    return _tokens(config, text) if isinstance(config, BPERun) else text.material(config)


@dataclass(frozen=True)
class _Text:
    """The splits of a dataset, as bytes, and what is cut out of them so far."""

    dataset: Dataset
    splits: tuple[str, ...]
    sources: dict[str, TokenSource] = field(default_factory=dict)
    starts: dict[str, PatchIndex] = field(default_factory=dict)

    def material(self, config: RunConfig, extra: dict[str, Any] | None = None, **more: Any) -> Material:
        """Row lengths chosen, loaders made."""
        train = self.dataset.split("train")
        source, starts = self.sources.get("train", train), self.starts.get("train")
        config = with_buckets(config, source, _members(config, train), starts)
        loaders = {
            name: _loader(config, self.dataset, name, self.starts.get(name), self.sources.get(name))
            for name in self.splits
        }
        return Material(config, loaders, {"data": train.sha256, **(extra or {})}, **more)


def _patches(config: BLTRun, text: _Text, entropy_path: str | Path | None, compiled: bool, device: str) -> Material:
    newlines, entropy = config.patching.reset_newlines, None
    if config.patching.scheme == "entropy":
        entropy = _frozen_entropy(entropy_path, device)
    for name in text.splits:
        index = PatchIndex(text.dataset, name, entropy, reset_newlines=newlines, compile=compiled)
        index.compute()
        text.starts[name] = index
    members = _members(config, text.dataset.split("train"))
    rule = _rule(config, text.starts["train"], members)
    text.starts.update({name: index.with_rule(rule) for name, index in text.starts.items()})
    train = text.starts["train"]
    extra = {"patch_rule": rule.to_dict(), "entropy": train.key}
    return text.material(config, extra, entropy=entropy, rule=rule, unit=_mean_patch(train, members))


def _tokens(config: BPERun, text: _Text) -> Material:
    wanted, documents = config.tokenizer, text.dataset.split("train")
    members = _members(config, documents)
    vocabulary = vocabulary_for(text.dataset, members, wanted.vocab_size, wanted.train_bytes, wanted.path)
    tokens = {name: tokenised(text.dataset, name, vocabulary) for name in text.splits}
    text.sources.update(tokens)
    unit = float(documents.lengths[members].sum() / max(1, tokens["train"].lengths[members].sum()))
    log.info("%.3f bytes per token", unit)
    return text.material(config, {"tokenizer": vocabulary.key}, vocabulary=vocabulary, unit=unit)


def _frozen_entropy(path: str | Path | None, device: str) -> EntropyModel:
    if path is None:
        raise ConfigError("entropy patches need an entropy model: --entropy-model RUN (made by `blt train entropy`)")
    entropy = start.entropy_model(path)
    if entropy is None:
        raise CheckpointError(f"{path} holds no entropy model; give the folder of a `blt train entropy` run")
    return entropy.to(device).eval().requires_grad_(False)


def _rule(config: BLTRun, index: PatchIndex, members: Int) -> PatchRule:
    patching = config.patching
    if not patching.needs_threshold:
        return patching.rule()
    threshold = choose_threshold(index, patching.rule(0.0), patching.target_patch_size, members)
    log.info("threshold %.6f nats for patches of %.2f bytes", threshold, patching.target_patch_size)
    return patching.rule(threshold)


def _mean_patch(starts: PatchIndex, members: Int) -> float:
    """Bytes per patch, counted as in `blt eval`, on MEASURED_BYTES of the training text."""
    n_bytes = n_patches = 0
    for document in np.random.default_rng(0).permutation(members):
        if n_bytes >= MEASURED_BYTES:
            break
        n_bytes += int(starts.documents.lengths[document])
        n_patches += int(starts.starts(int(document))[1:].sum())
    return max(1, n_bytes) / max(1, n_patches)


def _check_groups(config: RunConfig, documents: Documents) -> None:
    for group in config.data.groups or ():
        if not len(documents.of_groups([group])):
            raise ConfigError(f"data.groups: {group!r} has no training documents; see `blt data info`")


def _members(config: RunConfig, documents: Documents) -> Int:
    groups = config.data.groups
    return np.arange(len(documents)) if groups is None else documents.of_groups(groups)


def _loader(
    config: RunConfig, dataset: Dataset, split: str, starts: PatchStarts | None, tokens: TokenSource | None
) -> Callable[[], Loader] | None:
    """Makes loaders over one split, as bytes or as `tokens`; None if it has no documents.

    The text of validation is in one shuffled order, because a run reads the first `data.valid_bytes` of it and shards
    hold one group behind the other. Its rows follow that order, so that the bytes read are the same for rows of any
    length; only rows of whole documents, which are packed longest first, are shuffled, too.
    """
    documents = dataset.split(split)
    members = _members(config, documents)
    source = documents if tokens is None else tokens
    if not len(members):
        return None
    shape, training = batch_shape(config), split == "train"
    if training:
        seed, shuffle, workers = config.run.seed, True, config.data.workers
    else:
        members = np.random.default_rng(VALIDATION_SEED).permutation(members)
        seed, shuffle, workers = VALIDATION_SEED, shape.pack == "documents", 0
    return lambda: Loader(source, shape, starts, seed=seed, shuffle=shuffle, subset=members, workers=workers)
