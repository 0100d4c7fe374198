"""A checkpoint of any format, described before any of its weights are in memory.

A format's module (see `formats`) turns files into a `Source`: configurations, the patch rule, and weights that stay in
their files, under this project's parameter names. Wrong names, shapes, dtypes and numbers are found here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from blt.checkpoint.names import listed, mismatch
from blt.checkpoint.tensors import DTYPES, StoredTensor
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
from blt.model.token import TokenConfig
from blt_runtime import reading
from blt_runtime.errors import CheckpointError, shown
from blt_runtime.ids import VOCAB
from blt_runtime.patching import PatchRule

HASH_TABLES = "hash_embedding.tables.weight"
Config = TypeVar("Config", bound=BaseModel)
ModelConfig = TypeVar("ModelConfig", bound=BLTConfig | EntropyConfig)


@dataclass(frozen=True)
class StoredModel(Generic[ModelConfig]):
    """A BLT, an entropy model or a token model in its file: the configuration, and every parameter by its name."""

    config: ModelConfig
    weights: dict[str, StoredTensor]

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for tensor in self.weights.values() for piece in tensor.pieces)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `format` is native, facebook, facebook-hub, huggingface or "stopped run".

    entropy_path: where an entropy model that is stored separately was when the checkpoint was written.

    A checkpoint with a token model (`bpe`) holds nothing else but the text of its `tokenizer`.
    """

    format: str
    path: Path
    blt: StoredModel[BLTConfig] | None = None
    entropy: StoredModel[EntropyConfig] | None = None
    patch_rule: PatchRule | None = None
    bpe: StoredModel[TokenConfig] | None = None
    tokenizer: str | None = None
    entropy_path: str | None = None

    @property
    def blt_config(self) -> BLTConfig | None:
        return self.blt.config if self.blt else None

    @property
    def entropy_config(self) -> EntropyConfig | None:
        return self.entropy.config if self.entropy else None

    @property
    def lacks_entropy_model(self) -> bool:
        return self.entropy is None and self.patch_rule is not None and self.patch_rule.needs_entropy

    def models(self) -> dict[str, StoredModel[Any]]:
        named: dict[str, StoredModel[Any] | None] = {"blt": self.blt, "entropy": self.entropy, "bpe": self.bpe}
        return {name: model for name, model in named.items() if model is not None}

    def with_weights(self, weights: dict[str, StoredTensor]) -> Source:
        """A copy with other weights of the trained model: the BLT or the token model, else the entropy model."""
        name = next(name for name in ("blt", "bpe", "entropy") if getattr(self, name) is not None)
        trained: StoredModel[Any] = getattr(self, name)
        changes: dict[str, Any] = {name: replace(trained, weights=weights)}
        return replace(self, **changes)

    def check_can_generate(self) -> None:
        """Raises CheckpointError if something that generation needs is missing."""
        check_can_generate(self.blt, self.entropy, self.patch_rule, self.bpe)

    def with_entropy(self, other: Source) -> Source:
        """A copy with the entropy model of `other`. Raises CheckpointError if it has none, or one of other ids."""
        if other.entropy is None:
            raise CheckpointError(f"{other.path} holds no entropy model")
        return replace(self, entropy=other.entropy).check_vocabularies()

    def check_vocabularies(self) -> Source:
        """Raises CheckpointError if the BLT or the entropy model does not have the byte-level ids."""
        for name, config in (("BLT", self.blt_config), ("entropy model", self.entropy_config)):
            if config is not None and config.vocab_size != VOCAB:
                raise CheckpointError(
                    f"{self.path}: the {name} has {config.vocab_size} ids, a byte-level model has {VOCAB}"
                )
        return self

    def check_finite(self) -> None:
        """Raises CheckpointError that names every tensor with a NaN or an infinity. Reads all weights once."""
        self.refuse(
            [name for model in self.models().values() for t in model.weights.values() for name in t.not_finite()]
        )

    def refuse(self, not_finite: Sequence[str]) -> None:
        """Raises CheckpointError that names these tensors, if there are any."""
        if not_finite:
            names = listed(list(dict.fromkeys(not_finite)))
            raise CheckpointError(f"{self.path}: NaN or infinite weights in {names}; it was saved broken")


def check_can_generate(
    blt: object | None, entropy: object | None, rule: PatchRule | None, bpe: object | None = None
) -> None:
    """Raises CheckpointError unless there are a BLT, its patch rule, and the entropy model if the rule needs one."""
    if bpe is not None:
        raise CheckpointError(
            "this checkpoint holds a token-level baseline, which can only be trained, evaluated and inspected; "
            "give one made by `blt train blt`"
        )
    if blt is None:
        raise CheckpointError("this checkpoint holds an entropy model only; give one made by `blt train blt`")
    if rule is None:
        raise CheckpointError("this checkpoint has no patch rule, so its patch boundaries are unknown")
    if rule.needs_entropy and entropy is None:
        raise CheckpointError("the patch rule needs an entropy model; name one with --entropy-model PATH")


def fit_weights(
    config: ModelConfig,
    found: Mapping[str, StoredTensor],
    names_of: Callable[[str], list[str]],
    where: Path,
    unused: re.Pattern[str] | None = None,
) -> StoredModel[ModelConfig]:
    """A model from tensors under a file's own names. Raises one CheckpointError that says everything that does not fit
    the configuration: counts, and the first names of each kind.

    names_of: the file's names of one of our parameters: one, or one for each hash table if the format stores the tables
    separately.  unused: names that the format stores and no implementation reads.
    """
    layers = config.n_layers if isinstance(config, EntropyConfig) else _blt_layers(config)
    if layers > len(found):
        raise CheckpointError(f"{where}: the configuration has {layers} layers, the file only {len(found)} tensors")
    try:
        expected_shapes = shapes(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # the size overflows torch's integers
        raise CheckpointError(f"{where}: the configuration cannot be right: {str(error).splitlines()[0]}") from None
    weights: dict[str, StoredTensor] = {}
    missing: list[str] = []
    problems: list[str] = []
    left = dict(found)
    for ours, shape in expected_shapes.items():
        theirs = names_of(ours)
        expected = shape if len(theirs) == 1 else (shape[0] // len(theirs), *shape[1:])
        pieces = [left.pop(name, None) for name in theirs]
        missing += [name for name, piece in zip(theirs, pieces, strict=True) if piece is None]
        here = [piece for piece in pieces if piece is not None]
        wrong = [problem for piece in here if (problem := _problem(piece, expected))]
        problems += wrong
        if here and not wrong and len({piece.dtype for piece in here}) > 1:
            problems.append(f"{theirs[0]} and the other tables have different dtypes")
        if here:
            tensors = tuple(tensor for piece in here for tensor in piece.pieces)
            names = tuple(name for piece in here for name in piece.names)
            weights[ours] = StoredTensor(names, tensors, all(piece.mapped for piece in here))
    unknown = [name for name in left if not (unused and unused.fullmatch(name))]
    if missing or problems or unknown:
        reasons = mismatch(missing, problems, unknown)
        raise CheckpointError(f"{where}: tensors do not fit the configuration: {reasons}")
    return StoredModel(config, weights)


def _blt_layers(config: BLTConfig) -> int:
    return config.encoder.n_layers + config.latent.n_layers + config.decoder.n_layers


def _problem(tensor: StoredTensor, expected: tuple[int, ...]) -> str | None:
    if tensor.shape != expected:
        return f"{tensor.names[0]} is {tensor.shape}, expected {expected}"
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{tensor.names[0]} is {str(tensor.dtype).removeprefix('torch.')}, weights must be one of {known}"
    if any(piece.layout is not torch.strided or piece.is_meta for piece in tensor.pieces):
        return f"{tensor.names[0]} is sparse or has no data; weights must be plain tensors"
    return None


def shapes(config: BLTConfig | EntropyConfig) -> dict[str, tuple[int, ...]]:
    """The parameter names and shapes of a configuration; no memory is allocated."""
    with torch.device("meta"):
        model = BLT(config) if isinstance(config, BLTConfig) else EntropyModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def parse(kind: type[Config], values: Any, file: str, section: str = "") -> Config:
    """A pydantic model from a file's values. Raises CheckpointError that names the field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in (section, *first["loc"]) if part != "")
        given = "" if isinstance(first["input"], dict) else f"; it is {shown(first['input'])}"
        raise CheckpointError(f"{file}: {field}: {first['msg']}{given}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError."""
    try:
        return reading.read_json(reading.in_folder(path.parent, path.name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {reading.reason(error)}; copy it again") from None
