"""Run configurations: reads YAML with `--set a.b=value` overrides into one frozen object.

An unknown key is an error that names the key and the nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from blt.data.mixture import TemperatureBy
from blt.model.config import BLTConfig, EntropyConfig, Frozen
from blt.model.token import TokenConfig
from blt.train import strict_yaml
from blt_runtime import reading
from blt_runtime.errors import ConfigError, RuleError, shown
from blt_runtime.ids import VOCAB
from blt_runtime.patching import PatchRule, PatchSettings

MAX_BUCKETS = 32
"""The largest number of row lengths in a run: each one costs a compilation."""
SHORT_WARMUP = 10
"""The schedule is so many times as long as a warm-up that had to be shortened."""
SHORT_DECAY = 10
"""The schedule is so many times as long as the decay of a WSD schedule that gives none."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Frozen):
    """The training data: a folder made by `blt data prepare` (or `--data`), and some of its groups (null: all).

    `mix` has weights by shell patterns over the names of groups (the last pattern that matches applies, 1 without one).
    The bytes that are read of a group are proportional to its weight and to `bytes ** temperature`. With
    `temperature_by: language`, the bytes of languages are; a language is what follows the last dot of a group's name
    (`blt.data.mixture`). Rows are shuffled within blocks of documents; `first_block_tokens` is the size of the first
    one (null: 2^20). `workers` threads prepare batches ahead of the step (0: none); they do not change the batches.
    """

    path: str | None = None
    groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    mix: dict[str, Annotated[FiniteFloat, Field(gt=0)]] = Field(default_factory=dict)
    temperature: FiniteFloat = Field(default=1.0, ge=0)
    temperature_by: TemperatureBy = "group"
    valid_bytes: int = Field(default=1 << 20, ge=1)
    first_block_tokens: int | None = Field(default=None, ge=1 << 10)
    workers: int = Field(default=1, ge=0, le=64)

    @field_validator("temperature")
    @classmethod
    def _flattens(cls, value: float) -> float:
        """Refuses the T of bytes ** (1 / T), which is above 1 wherever it is used."""
        if value > 1:
            raise ValueError("bytes ** temperature needs 0 to 1; for bytes ** (1 / T) give 1 / T")
        return value


class PatchingConfig(Frozen, PatchSettings):  # type: ignore[misc]  # mypy takes Frozen for a mutable dataclass
    """The patch rule of a run: `PatchSettings`, with the limits that training adds.

    If the scheme is entropy and `threshold` is null, a threshold is chosen on training data, for a mean patch size of
    `target_patch_size` bytes. `max_patch_length` is also the static width of the encoder's gather.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    scheme: Literal["entropy", "space", "static", "byte"] = "entropy"
    patch_size: int | None = Field(default=None, ge=1)
    max_patch_length: int | None = Field(default=16, ge=2)
    target_patch_size: float = Field(default=4.5, gt=1)

    @model_validator(mode="after")
    def _complete(self) -> typing.Self:
        if self.scheme == "static" and self.patch_size is None:
            raise ValueError("scheme static needs patch_size")
        if self.scheme in ("entropy", "space") and self.max_patch_length is None:
            raise ValueError(f"scheme {self.scheme} needs max_patch_length: it fixes the width of the encoder's gather")
        try:
            self.rule(0.0)
        except RuleError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def needs_threshold(self) -> bool:
        return self.scheme == "entropy" and self.threshold is None

    @property
    def mean_patch_size(self) -> float:
        """Bytes: exact for static and byte patches, the target for entropy patches, estimated for space patches."""
        return {"static": self.patch_size, "byte": 1}.get(self.scheme) or self.target_patch_size

    @property
    def longest_patch(self) -> int:
        """The static width L of the encoder's gather."""
        fixed = {"static": self.patch_size, "byte": 1}.get(self.scheme)
        return min(limit for limit in (fixed, self.max_patch_length) if limit is not None)

    def rule(self, threshold: float | None = None) -> PatchRule:
        """The rule, with `threshold` if the configuration has none."""
        given = self.model_dump(exclude={"target_patch_size"})
        return PatchRule(**(given | {"threshold": threshold} if self.threshold is None else given))


class GroupConfig(Frozen):
    """AdamW's settings for the parameters whose name matches the shell pattern `match`; null keeps the run's."""

    match: str = Field(min_length=1)
    betas: tuple[Beta, Beta] | None = None
    eps: FiniteFloat | None = Field(default=None, gt=0)
    weight_decay: FiniteFloat | None = Field(default=None, ge=0)


class OptimizerConfig(Frozen):
    """AdamW on all parameters (spec section 11), or Muon on matrices; `clip` is the largest gradient norm. `ema` is the
    decay of the moving averages of the weights; null keeps none.

    `freeze` and `lr_scale` have shell patterns of parameter names: those that do not train, and those whose learning
    rate is multiplied by a factor. `groups` gives betas, eps and weight decay by pattern; the first group that matches
    a parameter applies to it. `tables` sparse updates only the hash table rows that a batch touches, and several ranks
    divide the rows among them. `table_eps` is the eps of hash tables that no group gives one.

    Why tables have an eps of their own: in a batch of T targets, a row that one position reads has the gradient
    g = d / T, where d is the derivative of that position's summed nats. Every other weight sums T such terms. AdamW's
    first update of a row at a late step is lr * (1 - b1) g / (sqrt(1 - b2) |g| + eps), which is

        lr * (1 - b1) / sqrt(1 - b2) * f,    f = 1 / (1 + eps * T / (sqrt(1 - b2) |d|)).

    Without eps it does not depend on T. With b2 = 0.95 and |d| = 0.15, f at eps 1e-8 is 0.98 for 74 kB a step, and
    0.17 for 16 MB. At 1e-15 it is above 0.999 up to 10 GB. A smaller eps has no use: g^2 below float32's 1e-38 is 0, so
    a g below 1e-19 has no second moment, and 1e-15 keeps its update near 0. Müller et al. (2022, "Instant Neural
    Graphics Primitives") train hash tables with the same eps.
    """

    name: Literal["adamw", "muon"] = "adamw"
    ema: FiniteFloat | None = Field(default=None, gt=0, lt=1)
    lr: FiniteFloat = Field(default=4e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: FiniteFloat = Field(default=1e-8, gt=0)
    weight_decay: FiniteFloat = Field(default=0.1, ge=0)
    clip: FiniteFloat = Field(default=1.0, gt=0)
    tables: Literal["dense", "sparse"] = "dense"
    table_eps: FiniteFloat = Field(default=1e-15, gt=0)
    groups: tuple[GroupConfig, ...] = ()
    freeze: tuple[str, ...] = ()
    lr_scale: dict[str, Annotated[FiniteFloat, Field(gt=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _dense_averages(self) -> typing.Self:
        if self.ema is not None and self.tables == "sparse":
            raise ValueError("ema changes every row in every step, which tables: sparse avoids; use tables: dense")
        return self


class ScheduleConfig(Frozen):
    """Linear warm-up, then one of two curves down to `min_ratio` of the learning rate.

    cosine: from the warm-up to `decay_steps` (null: to `steps`).  wsd (warm-up, stable, decay; Hu et al. 2024,
    "MiniCPM", section 4): constant, then linear over the last `decay` steps before `decay_steps` (null: a tenth). Their
    decay is any falling function. After `decay_steps` the rate is constant. A warm-up that does not end before the
    curve does is shortened, and so is a decay that would begin in the warm-up. A resumed run keeps the `decay_steps` of
    its checkpoint, unless they are given or the rate is still constant there.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    steps: int = Field(default=1000, ge=1)
    warmup: int = Field(default=100, ge=0)
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    decay: int | None = Field(default=None, ge=1)
    decay_steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.kind == "cosine" and self.decay is not None:
            raise ValueError("decay is for kind wsd; a cosine decays from the warm-up on")
        return self

    @property
    def end(self) -> int:
        """The step at which the curve ends."""
        return self.decay_steps or self.steps

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or a tenth of the schedule if it is longer than that."""
        return self.warmup if self.warmup <= self.end else self.end // SHORT_WARMUP

    @property
    def decay_length(self) -> int:
        """The steps over which the rate falls."""
        after_warmup = self.end - self.warmup_steps
        if self.kind == "cosine":
            return after_warmup
        return min(after_warmup, self.end // SHORT_DECAY if self.decay is None else self.decay)

    @property
    def decay_start(self) -> int:
        """The first step whose rate may be lower than that of the step before."""
        return self.end - self.decay_length


class BatchConfig(Frozen):
    """The batch of a step: `rows` rows over all ranks, with `patches` patches each (BLT only).

    `byte_buckets` are the ascending lengths in bytes that rows are padded to. With `auto_buckets`, give only the
    longest; at most that many lengths are then chosen on the data. `pack`: "stream" cuts rows out of all documents one
    after another, "documents" packs whole documents into rows. A rank computes `micro_rows` rows at a time, which
    share a length, and adds up their gradients (null: about one micro-batch for each length).
    """

    rows: int = Field(default=8, ge=1)
    micro_rows: int | None = Field(default=None, ge=1)
    patches: int | None = Field(default=None, ge=2)
    byte_buckets: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(512,), max_length=MAX_BUCKETS)
    auto_buckets: int | None = Field(default=None, ge=2, le=MAX_BUCKETS)
    pack: Literal["stream", "documents"] = "stream"

    @model_validator(mode="after")
    def _ascending(self) -> typing.Self:
        if self.auto_buckets is not None and len(self.byte_buckets) != 1:
            raise ValueError("auto_buckets chooses the lengths; give only the longest one in byte_buckets")
        if not self.byte_buckets or list(self.byte_buckets) != sorted(set(self.byte_buckets)):
            raise ValueError("byte_buckets must be different lengths in ascending order")
        return self


class RunSettings(Frozen):
    """Settings of the run. `*_every` are in steps.

    A sample is a short text that the model writes; 0 logs none. Checkpoints at `milestones_every` are kept beside the
    newest `keep_checkpoints`; 0 makes none. With `async_checkpoints` the state is copied to memory and written while
    training goes on. `activation_checkpointing` is what the backward pass computes again (`blt.train.recompute`).
    `norms_every` measures the norms of the model's parts; 0 never. `spike_rollback` is how often a
    run may return to a checkpoint after a spike of the loss; 0 never. `shard_ranks` ranks share the parameters, and
    each group of so many has them all (null: all ranks are one group).
    `peak_flops` is the peak of one device in FLOP/s, for MFU (null: that of a well-known GPU).
    """

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = True
    attention: Literal["auto", "flex"] = "auto"
    deterministic: bool = True
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    spike_rollback: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    valid_every: int = Field(default=200, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    milestones_every: int = Field(default=0, ge=0)
    sample_every: int = Field(default=0, ge=0)
    norms_every: int = Field(default=0, ge=0)
    shard_ranks: int | None = Field(default=None, ge=2)
    peak_flops: FiniteFloat | None = Field(default=None, gt=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    async_checkpoints: bool = False
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    tensorboard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _was_a_switch(cls, values: Any) -> Any:
        """`activation_checkpointing` was true (full) or false (none) in earlier versions."""
        if isinstance(values, Mapping) and isinstance(was := values.get("activation_checkpointing"), bool):
            return {**values, "activation_checkpointing": "full" if was else "none"}
        return values


class InitConfig(Frozen):
    """Initial weights instead of random ones: a `checkpoint` of any format, or the blocks of a Llama for the `latent`.

    A checkpoint also gives the sections `model` and `patching` and the entropy model, where the configuration leaves
    them out.
    """

    checkpoint: str | None = None
    latent: str | None = None

    @model_validator(mode="after")
    def _one(self) -> typing.Self:
        if self.checkpoint is not None and self.latent is not None:
            raise ValueError("init: give checkpoint or latent, not both")
        return self


class _Run(Frozen):
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _one_muon(self) -> typing.Self:
        """torch warns that sums over two dimensions of ranks may differ between ranks: replicas would drift apart."""
        if self.optimizer.name == "muon" and self.run.shard_ranks is not None:
            raise ValueError("optimizer.name muon shards over all ranks; leave run.shard_ranks out, or use adamw")
        return self


class EntropyRun(_Run):
    """Trains an entropy model on rows of bytes."""

    kind: Literal["entropy"]
    model: EntropyConfig
    init: InitConfig = InitConfig()

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.init.latent is not None:
            raise ValueError("init.latent is for BLT runs; an entropy model has no latent transformer")
        if self.batch.patches is not None:
            raise ValueError("batch.patches is for BLT runs; an entropy model trains on rows of bytes")
        _check_vocabulary(self.model.vocab_size)
        _check_rows(self.batch.byte_buckets[-1], {"model": self.model.max_seqlen})
        return self


class BLTRun(_Run):
    """Trains a BLT on rows of patches. `entropy_model` is a model.pt or a run folder (`--entropy-model`)."""

    kind: Literal["blt"]
    model: BLTConfig
    init: InitConfig = InitConfig()
    patching: PatchingConfig = PatchingConfig()
    entropy_model: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.batch.patches is None:
            raise ValueError("batch.patches is missing: the number of patches in a row")
        _check_vocabulary(self.model.vocab_size)
        encoder, decoder = self.model.encoder.max_seqlen, self.model.decoder.max_seqlen
        _check_rows(self.batch.byte_buckets[-1], {"model.encoder": encoder, "model.decoder": decoder})
        if self.batch.patches > self.model.latent.max_seqlen:
            raise ValueError(f"batch.patches {self.batch.patches} is more than model.latent.max_seqlen")
        return self


class TokenizerConfig(Frozen):
    """The BPE vocabulary of a token run: `vocab_size` ids, the four special ones included.

    It is trained on about `train_bytes` of the training text, or read from a `tokenizer.json` at `path`.
    """

    vocab_size: int = Field(default=4096, ge=VOCAB)
    path: str | None = None
    train_bytes: int = Field(default=32 << 20, ge=1)


class BPERun(_Run):
    """Trains a token-level transformer on rows of BPE tokens; `batch.byte_buckets` counts tokens here."""

    kind: Literal["bpe"]
    model: TokenConfig
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_vocabulary(cls, values: Any) -> Any:
        """Sets `model.vocab_size` to that of the tokenizer; it may be left out."""
        model, tokenizer = (values.get(key, {}) for key in ("model", "tokenizer"))
        if not isinstance(model, Mapping) or not isinstance(tokenizer, Mapping):
            return values
        size = tokenizer.get("vocab_size", TokenizerConfig().vocab_size)
        if model.get("vocab_size", size) != size:
            raise ValueError(f"model.vocab_size is {model['vocab_size']}, tokenizer.vocab_size {size}; leave one out")
        return {**values, "model": {**model, "vocab_size": size}}

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.batch.patches is not None:
            raise ValueError("batch.patches is for BLT runs; a token model trains on rows of tokens")
        _check_rows(self.batch.byte_buckets[-1], {"model": self.model.max_seqlen})
        return self


RunConfig = EntropyRun | BLTRun | BPERun
_KINDS: dict[str, type[EntropyRun] | type[BLTRun] | type[BPERun]] = {
    "entropy": EntropyRun,
    "blt": BLTRun,
    "bpe": BPERun,
}
KINDS = tuple(_KINDS)


def _check_vocabulary(size: int) -> None:
    if size != VOCAB:
        raise ValueError(f"model.vocab_size is {size}; bytes and special ids are {VOCAB}, so leave it out")


def _check_rows(longest: int, limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        if longest > limit:
            raise ValueError(f"batch.byte_buckets has {longest}, more than {name}.max_seqlen {limit}")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `a.b=value` overrides (values are YAML). Raises ConfigError."""
    try:
        raw = strict_yaml.parse(reading.read_text(path, strict_yaml.LARGEST))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file with --config") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a mapping of sections; see the files in configs/")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """The configuration of plain mappings. Raises ConfigError that names the key, and CheckpointError for `init`."""
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"kind is {shown(kind)}; it must be {', '.join(map(repr, _KINDS))}")
    _check_keys(raw, _KINDS[kind], "")
    try:
        return _KINDS[kind].model_validate(_completed(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {message}" if where else message) from error


def _completed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sections completed from `init`."""
    if not raw.get("init"):
        return dict(raw)  # the common case, which imports no checkpoint reader
    from blt.train.initial_weights import complete

    InitConfig.model_validate(raw["init"])
    return complete(raw)


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    node = raw
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
    try:
        node[keys[-1]] = strict_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error


def _check_keys(raw: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    known = list(section.model_fields)
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(_unknown(prefix, str(key), known))
        inner = _section_of(section.model_fields[key].annotation)
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, f"{prefix}{key}.")


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)
    return f"unknown key {shown(prefix + key)}; the nearest known one is {prefix + near[0]!r}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation like `HashConfig | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_section_of(part) for part in typing.get_args(annotation)]
        return next((part for part in found if part is not None), None)
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None
