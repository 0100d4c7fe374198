"""What a checkpoint of any format says, before anything of it is in memory.

An adapter (`formats`) turns files into a `Source`: configurations, the patch rule, and weights under our names
that still lie in their files. Everything that can be wrong with names, shapes, dtypes and numbers is found here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from blt.checkpoint.tensors import DTYPES, Stored
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
from blt.model.token import TokenConfig
from blt_runtime.errors import CheckpointError
from blt_runtime.ids import VOCAB
from blt_runtime.patching import PatchRule

HASH_TABLES = "hash_embedding.tables.weight"
Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Part:
    """A BLT, an entropy model or a token model: configuration, and a `Stored` for each of its parameters, by our
    names."""

    config: BLTConfig | EntropyConfig
    weights: dict[str, Stored]

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for tensor in self.weights.values() for piece in tensor.pieces)


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk. `format`: native, reference, hub or huggingface. A token model (`bpe`) comes
    alone, with the text of its `tokenizer`."""

    format: str
    path: Path
    blt: Part | None = None
    entropy: Part | None = None
    patch_rule: PatchRule | None = None
    bpe: Part | None = None
    tokenizer: str | None = None

    @property
    def blt_config(self) -> BLTConfig | None:
        return self.blt.config if self.blt is not None and isinstance(self.blt.config, BLTConfig) else None

    @property
    def entropy_config(self) -> EntropyConfig | None:
        part = self.entropy
        return part.config if part is not None and isinstance(part.config, EntropyConfig) else None

    @property
    def bpe_config(self) -> TokenConfig | None:
        return self.bpe.config if self.bpe is not None and isinstance(self.bpe.config, TokenConfig) else None

    def parts(self) -> dict[str, Part]:
        named = {"blt": self.blt, "entropy": self.entropy, "bpe": self.bpe}
        return {name: part for name, part in named.items() if part is not None}

    def require_blt(self) -> None:
        """Raises CheckpointError as `require_complete`."""
        require_complete(self.blt, self.entropy, self.patch_rule, self.bpe)

    def with_entropy(self, other: Source) -> Source:
        """The same with the entropy model of `other`. Raises CheckpointError if it has none, or another vocabulary."""
        if other.entropy is None:
            raise CheckpointError(f"{other.path} holds no entropy model")
        return replace(self, entropy=other.entropy).check_together()

    def check_together(self) -> Source:
        """Raises CheckpointError where BLT and entropy model do not belong together."""
        blt, entropy = self.blt_config, self.entropy_config
        for name, config in (("BLT", blt), ("entropy model", entropy)):
            if config is not None and config.vocab_size != VOCAB:
                raise CheckpointError(
                    f"{self.path}: the {name} has {config.vocab_size} ids, a byte-level model has {VOCAB}"
                )
        return self

    def check_finite(self) -> None:
        """Raises CheckpointError that names every tensor with a NaN or an infinity. Reads all weights once."""
        bad = [name for part in self.parts().values() for t in part.weights.values() for name in t.not_finite()]
        if bad:
            raise CheckpointError(
                f"{self.path}: NaN or infinite weights in {', '.join(dict.fromkeys(bad))}; it was saved broken"
            )


def require_complete(
    blt: object | None, entropy: object | None, rule: PatchRule | None, bpe: object | None = None
) -> None:
    """Raises CheckpointError unless these can generate: a BLT, its rule, and the entropy model that the rule needs."""
    if bpe is not None:
        raise CheckpointError(
            "this checkpoint holds a token-level baseline, which is trained, evaluated and inspected, no more; "
            "give one made by `blt train blt`"
        )
    if blt is None:
        raise CheckpointError("this checkpoint holds an entropy model only; give one made by `blt train blt`")
    if rule is None:
        raise CheckpointError("this checkpoint has no patch rule, so nobody knows where its patches begin")
    if rule.needs_entropy and entropy is None:
        raise CheckpointError("the patch rule needs an entropy model; name one with --entropy-model PATH")


def make_part(
    config: BLTConfig | EntropyConfig,
    found: Mapping[str, Stored],
    names_of: Callable[[str], list[str]],
    where: Path,
    unused: re.Pattern[str] | None = None,
) -> Part:
    """A part from tensors under a file's own names; everything that does not fit is listed in one CheckpointError.

    names_of: the file's name of one of our parameters (several where it keeps the hash tables apart, one for each).
    unused: names that the format stores and never reads.
    """
    layers = config.n_layers if isinstance(config, EntropyConfig) else _blt_layers(config)
    if layers > len(found):
        raise CheckpointError(f"{where}: the configuration has {layers} layers, the file only {len(found)} tensors")
    try:
        expected_shapes = shapes(config)
    except RuntimeError as error:  # torch has no number for such a size
        raise CheckpointError(f"{where}: the configuration cannot be right: {str(error).splitlines()[0]}") from None
    weights: dict[str, Stored] = {}
    problems: list[str] = []
    left = dict(found)
    for ours, shape in expected_shapes.items():
        theirs = names_of(ours)
        expected = shape if len(theirs) == 1 else (shape[0] // len(theirs), *shape[1:])
        pieces = [left.pop(name, None) for name in theirs]
        problems += [f"missing {name}" for name, piece in zip(theirs, pieces, strict=True) if piece is None]
        here = [piece for piece in pieces if piece is not None]
        wrong = [problem for piece in here if (problem := _problem(piece, expected))]
        problems += wrong
        if here and not wrong and len({piece.dtype for piece in here}) > 1:
            problems.append(f"{theirs[0]} and the other tables are of several dtypes")
        if here:
            tensors = tuple(tensor for piece in here for tensor in piece.pieces)
            names = tuple(name for piece in here for name in piece.names)
            weights[ours] = Stored(names, tensors, all(piece.mapped for piece in here))
    problems += [f"unknown {name}" for name in left if not (unused and unused.fullmatch(name))]
    if problems:
        raise CheckpointError(f"{where}: tensors do not fit the configuration: " + "; ".join(problems))
    return Part(config, weights)


def _blt_layers(config: BLTConfig) -> int:
    return config.encoder.n_layers + config.latent.n_layers + config.decoder.n_layers


def _problem(tensor: Stored, expected: tuple[int, ...]) -> str | None:
    if tensor.shape != expected:
        return f"{tensor.names[0]} is {tensor.shape}, expected {expected}"
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{tensor.names[0]} is {str(tensor.dtype).removeprefix('torch.')}, weights are one of {known}"
    if any(piece.layout is not torch.strided or piece.is_meta for piece in tensor.pieces):
        return f"{tensor.names[0]} is sparse or has no data, weights are plain tensors"
    return None


def shapes(config: BLTConfig | EntropyConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes; nothing is allocated."""
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
        given = "" if isinstance(first["input"], dict) else f"; it is {first['input']!r}"
        raise CheckpointError(f"{file}: {field}: {first['msg']}{given}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy it again") from None
