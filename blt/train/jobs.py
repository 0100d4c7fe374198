"""What a run of each kind is made of: its model, its objective, its loaders, and the checkpoint that it ends with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from blt import start
from blt.checkpoint import Checkpoint
from blt.config import BLTRun, BPERun, EntropyRun, RunConfig
from blt.data.batches import Int, PatchStarts, TokenSource
from blt.data.dataset import Dataset, Documents
from blt.data.packing import Loader
from blt.data.patches import PatchIndex, choose_threshold
from blt.data.token_cache import save_vocabulary, tokenised, vocabulary_for
from blt.model import BLT, EntropyModel
from blt.model.token import TokenModel
from blt.model.windows import choose_attention
from blt.train.dryrun import flops_per_byte
from blt.train.loop import Trainer
from blt.train.objective import Objective, count_parameters
from blt.train.packed import batch_shape, with_buckets
from blt.train.parts import freeze
from blt_runtime.errors import CheckpointError, ConfigError
from blt_runtime.patching import PatchRule

log = logging.getLogger("blt.train")
Model = TypeVar("Model", EntropyModel, BLT, TokenModel)
Prepared = tuple[Trainer, Callable[[], Checkpoint]]
TOKENIZER_FILE = "tokenizer.json"
MEASURED_BYTES = 2 << 20  # of the training text, for the mean patch in the count of FLOPs


def prepare_run(
    config: RunConfig,
    out: Path,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
) -> Prepared:
    """The trainer of a run at step 0, and what makes its final checkpoint. Raises ConfigError, InputError,
    CheckpointError, and MissingExtra where a run of kind bpe has no `tokenizers`."""
    dataset = _dataset(config, data)
    compiled = config.run.compile if compile is None else compile
    if isinstance(config, EntropyRun):
        return _entropy_run(config, out, dataset, compiled, device)
    if isinstance(config, BPERun):
        return _bpe_run(config, out, dataset, compiled, device)
    return _blt_run(config, out, dataset, entropy_model or config.entropy_model, compiled, device)


def training_loader(
    config: RunConfig,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
) -> tuple[RunConfig, Loader]:
    """The configuration with the row lengths chosen on the training text, and the loader over it, without a model.
    What a run keeps beside the data (entropies, a vocabulary and its tokens) is made here, too. Raises as prepare_run.
    """
    dataset = _dataset(config, data)
    documents = dataset.split("train")
    members = _members(config, documents)
    starts: PatchStarts | None = None
    source: TokenSource = documents
    if isinstance(config, BLTRun):
        entropy = None
        if config.patching.scheme == "entropy":
            entropy = _frozen_entropy(entropy_model or config.entropy_model, device)
        compiled = config.run.compile if compile is None else compile
        index = PatchIndex(dataset, "train", entropy, reset_newlines=config.patching.reset_newlines, compile=compiled)
        starts = index.with_rule(_rule(config, dataset, index))
    elif isinstance(config, BPERun):
        wanted = config.tokenizer
        vocabulary = vocabulary_for(dataset, members, wanted.vocab_size, wanted.train_bytes, wanted.path)
        source = tokenised(dataset, "train", vocabulary)
    config = with_buckets(config, source, members, starts)
    return config, _required(_loader(config, dataset, "train", starts, source))()


def _dataset(config: RunConfig, data: str | Path | None) -> Dataset:
    folder = data or config.data.path
    if folder is None:
        raise ConfigError("no data: name a folder made by `blt data prepare` with --data or data.path")
    dataset = Dataset(folder)
    dataset.check("train", "valid")
    _check_groups(config, dataset.split("train"))
    return dataset


def _entropy_run(config: EntropyRun, out: Path, dataset: Dataset, compiled: bool, device: str) -> Prepared:
    documents = dataset.split("train")
    config = with_buckets(config, documents, _members(config, documents))
    model = _initial(EntropyModel(config.model), config, device, compiled)
    objective = Objective(model, bf16=config.run.dtype == "bf16", compile=compiled, device=device)
    loaders = {name: _loader(config, dataset, name) for name in ("train", "valid")}
    extra = {"data": dataset.split("train").sha256}
    flops = flops_per_byte(config)
    trainer = Trainer(config, objective, _required(loaders["train"])(), loaders["valid"], out, extra, flops)
    return trainer, lambda: Checkpoint(None, model, None)


def _bpe_run(config: BPERun, out: Path, dataset: Dataset, compiled: bool, device: str) -> Prepared:
    wanted, documents = config.tokenizer, dataset.split("train")
    members = _members(config, documents)
    vocabulary = vocabulary_for(dataset, members, wanted.vocab_size, wanted.train_bytes, wanted.path)
    tokens = {name: tokenised(dataset, name, vocabulary) for name in ("train", "valid")}
    config = with_buckets(config, tokens["train"], members)
    loaders = {name: _loader(config, dataset, name, tokens=source) for name, source in tokens.items()}
    bytes_per_token = documents.lengths[members].sum() / max(1, tokens["train"].lengths[members].sum())
    log.info("%.3f bytes per token", bytes_per_token)
    model = _initial(TokenModel(config.model), config, device, compiled)
    objective = Objective(model, bf16=config.run.dtype == "bf16", compile=compiled, device=device)
    extra = {"data": documents.sha256, "tokenizer": vocabulary.key}
    flops = flops_per_byte(config, bytes_per_token=float(bytes_per_token))
    trainer = Trainer(config, objective, _required(loaders["train"])(), loaders["valid"], out, extra, flops)

    def finish() -> Checkpoint:
        save_vocabulary(vocabulary, out / TOKENIZER_FILE)
        return Checkpoint(None, None, None, model, vocabulary)

    return trainer, finish


def _blt_run(
    config: BLTRun, out: Path, dataset: Dataset, entropy_path: str | Path | None, compiled: bool, device: str
) -> Prepared:
    entropy = None
    if config.patching.scheme == "entropy":
        entropy = _frozen_entropy(entropy_path, device)
    newlines = config.patching.reset_newlines
    index = {
        name: PatchIndex(dataset, name, entropy, reset_newlines=newlines, compile=compiled)
        for name in ("train", "valid")
    }
    for part in index.values():
        part.compute()
    rule = _rule(config, dataset, index["train"])
    starts = {name: index[name].with_rule(rule) for name in index}
    config = with_buckets(config, dataset.split("train"), _members(config, dataset.split("train")), starts["train"])
    loaders = {name: _loader(config, dataset, name, starts[name]) for name in starts}
    model = _initial(BLT(config.model), config, device, compiled)
    objective = Objective(
        model, config.patching.longest_patch, bf16=config.run.dtype == "bf16", compile=compiled, device=device
    )
    extra = {"data": index["train"].documents.sha256, "patch_rule": rule.to_dict(), "entropy": index["train"].key}
    mean_patch = _mean_patch(starts["train"], _members(config, dataset.split("train")))
    flops = flops_per_byte(config, entropy=entropy.config if entropy else None, patch_size=mean_patch)
    trainer = Trainer(config, objective, _required(loaders["train"])(), loaders["valid"], out, extra, flops)
    return trainer, lambda: Checkpoint(model, entropy, rule)


def _frozen_entropy(path: str | Path | None, device: str) -> EntropyModel:
    if path is None:
        raise ConfigError("entropy patches need an entropy model: --entropy-model RUN (made by `blt train entropy`)")
    entropy = start.entropy_model(path)
    if entropy is None:
        raise CheckpointError(f"{path} holds no entropy model; give the folder of a `blt train entropy` run")
    return entropy.to(device).eval().requires_grad_(False)


def _rule(config: BLTRun, dataset: Dataset, index: PatchIndex) -> PatchRule:
    patching = config.patching
    if not patching.needs_threshold:
        return patching.rule()
    members = _members(config, dataset.split("train"))
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
    config: RunConfig,
    dataset: Dataset,
    split: str,
    starts: PatchStarts | None = None,
    tokens: TokenSource | None = None,
) -> Callable[[], Loader] | None:
    """Makes loaders over one split, as bytes or as `tokens`; None if it has no documents."""
    documents = dataset.split(split)
    members = _members(config, documents)
    source = documents if tokens is None else tokens
    if not len(members):
        return None
    shape, seed, shuffle = batch_shape(config), config.run.seed, split == "train"
    workers = config.data.workers if shuffle else 0
    return lambda: Loader(source, shape, starts, seed=seed, shuffle=shuffle, subset=members, workers=workers)


def _required(make: Callable[[], Loader] | None) -> Callable[[], Loader]:
    if make is None:
        raise ConfigError("data.groups leaves no training documents; look at the data with `blt data info`")
    return make


def _initial(model: Model, config: RunConfig, device: str, compiled: bool) -> Model:
    model.init_weights(torch.Generator().manual_seed(config.run.seed))
    if not isinstance(config, BPERun):
        start.initialise(model, config.init.checkpoint, config.init.latent)
    choose_attention(model, config.run.attention, device, compiled)
    frozen = freeze(model, config.optimizer.freeze)
    log.info("%d parameters, %d tensors of them frozen", count_parameters(model), len(frozen))
    return model.to(device).train()
