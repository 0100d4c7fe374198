"""Models in memory, and the way from and to files: `load` and `build` make models, `save` writes `model.pt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from blt.checkpoint import native
from blt.checkpoint.formats import open_source
from blt.checkpoint.source import HASH_TABLES, ModelConfig, Source, StoredModel, check_can_generate
from blt.checkpoint.tensors import StoredTensor
from blt.model import BLT, EntropyModel
from blt.model.bfloat16 import BFloat16EntropyModel, to_bfloat16
from blt.model.hashing import HashEmbedding, MappedTables
from blt.model.init import allocate
from blt.model.token import TokenModel
from blt.model.vocabulary import Vocabulary
from blt_runtime.errors import CheckpointError, ConfigError, RuleError
from blt_runtime.patching import EntropyDtype, PatchRule

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """The models of one checkpoint.

    `blt` is None if the checkpoint holds only an entropy model. `entropy` is None if the patch rule needs no entropies.
    A token-level baseline is `bpe` with its `vocabulary`; everything else is None.
    """

    blt: BLT | None
    entropy: EntropyModel | None
    patch_rule: PatchRule | None
    bpe: TokenModel | None = None
    vocabulary: Vocabulary | None = None

    def require_blt(self) -> tuple[BLT, PatchRule]:
        """The BLT and its patch rule. Raises CheckpointError unless they, and the entropy model if the rule needs one,
        are there."""
        check_can_generate(self.blt, self.entropy, self.patch_rule, self.bpe)
        assert self.blt is not None
        assert self.patch_rule is not None
        return self.blt, self.patch_rule

    @property
    def hash_embeddings(self) -> dict[str, HashEmbedding]:
        """The hash embeddings by the graph that reads them: "encoder" and "entropy", as far as they exist."""
        named = {"entropy": self.entropy, "encoder": self.blt}
        return {name: m.hash_embedding for name, m in named.items() if m is not None and m.hash_embedding is not None}

    def with_entropy_dtype(self, dtype: EntropyDtype) -> Checkpoint:
        """A copy with the entropy model and the patch rule in `dtype`; the BLT is the same object.

        float32 is the default of this project, bfloat16 is what facebookresearch/blt's loader computes (spec section
        4). Raises RuleError for bfloat16 if the checkpoint has no entropy model, and for float32 if the entropy model
        was rounded before.
        """
        model, rule = self.entropy, self.patch_rule
        rounded = isinstance(model, BFloat16EntropyModel)
        if dtype == "float32" and rounded:
            raise RuleError(
                "the entropy model was rounded to bfloat16; load the checkpoint again for float32 entropies"
            )
        if dtype == "bfloat16" and model is None:
            raise RuleError("bfloat16 entropies need an entropy model, and this checkpoint has none; use float32")
        if rule is not None:
            rule = replace(rule, entropy_dtype=dtype)
        if dtype == "bfloat16" and model is not None and not rounded:
            model = to_bfloat16(model)
        return replace(self, entropy=model, patch_rule=rule)

    def to_source(self, path: Path) -> Source:
        """The weights as a `Source`, to be written at `path`."""
        return Source(
            format="native",
            path=path,
            blt=None if self.blt is None else StoredModel(self.blt.config, weights_of(self.blt)),
            entropy=None if self.entropy is None else StoredModel(self.entropy.config, weights_of(self.entropy)),
            patch_rule=self.patch_rule,
            bpe=None if self.bpe is None else StoredModel(self.bpe.config, weights_of(self.bpe)),
            tokenizer=self.vocabulary.text if self.vocabulary else None,
        )


def load(
    path: str | Path,
    entropy_model: str | Path | None = None,
    *,
    trainable: bool = False,
    entropy_dtype: EntropyDtype | None = None,
    generates: bool = False,
) -> Checkpoint:
    """Loads a checkpoint of any format, in float32 and evaluation mode; hash tables stay in their file and dtype.

    trainable: hash tables are in memory and float32, too.  entropy_dtype: see `Checkpoint.with_entropy_dtype` (default:
    that of the checkpoint's patch rule).  generates: the checkpoint must have everything that generation needs, which
    is checked before weights are read.  `path`, `entropy_model` and errors are those of `open_source`; weights that are
    not finite raise CheckpointError.
    """
    source = open_source(path, entropy_model)
    if generates:
        source.check_can_generate()
    checkpoint = build(source, trainable)
    if entropy_dtype is None:
        entropy_dtype = checkpoint.patch_rule.entropy_dtype if checkpoint.patch_rule else "float32"
    return checkpoint.with_entropy_dtype(entropy_dtype)


def build(source: Source, trainable: bool = False) -> Checkpoint:
    """The models of a source. Raises CheckpointError for weights that are not finite, before memory is allocated."""
    source.check_finite()
    return Checkpoint(
        blt=_model(BLT, source.blt, trainable),
        entropy=_model(EntropyModel, source.entropy, trainable),
        patch_rule=source.patch_rule,
        bpe=_model(TokenModel, source.bpe, trainable),
        vocabulary=_vocabulary(source),
    )


def _vocabulary(source: Source) -> Vocabulary | None:
    if source.bpe is None:
        return None
    try:
        vocabulary = Vocabulary(source.tokenizer or "", f"the tokenizer in {source.path}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if vocabulary.size > source.bpe.config.vocab_size:
        raise CheckpointError(f"{source.path}: its tokenizer has {vocabulary.size} ids, more than its model")
    return vocabulary


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Writes `model.pt` atomically. `dtype` is that of the stored floating-point weights (default: unchanged)."""
    native.write(checkpoint.to_source(Path(path)), Path(path), dtype)


def _model(
    kind: Callable[[ModelConfig], Model], stored: StoredModel[ModelConfig] | None, trainable: bool
) -> Model | None:
    if stored is None:
        return None
    with torch.device("meta"):
        model = kind(stored.config)
    _load_weights(model, stored.weights, trainable)
    return model


def _load_weights(model: nn.Module, weights: Mapping[str, StoredTensor], trainable: bool) -> None:
    """Gives a model that was built on the meta device its weights and buffers."""
    mapped = not trainable and HASH_TABLES in weights and weights[HASH_TABLES].dtype != torch.float64
    if isinstance(model, BLT | EntropyModel) and model.hash_embedding is not None and mapped:
        stored = weights[HASH_TABLES]
        tables = [table for piece in stored.pieces for table in piece.detach().split(model.hash_embedding.config.rows)]
        model.hash_embedding.tables = MappedTables(tables, stored.mapped)
    allocate(model, "cpu")
    for name, parameter in model.named_parameters():
        weights[name].copy_to(parameter.data)
    model.eval()


def stored_tables(hashed: HashEmbedding) -> StoredTensor:
    """All tables, in memory or mapped."""
    tables = hashed.tables
    if isinstance(tables, MappedTables):
        return StoredTensor((HASH_TABLES,) * len(tables.tables), tables.tables, tables.mapped)
    return StoredTensor((HASH_TABLES,), (tables.weight.detach().cpu(),))


def weights_of(model: BLT | EntropyModel) -> dict[str, StoredTensor]:
    """Every weight by its name, mapped hash tables included."""
    found = {name: StoredTensor((name,), (t.detach().cpu(),)) for name, t in model.state_dict().items()}
    if model.hash_embedding is not None:
        found[HASH_TABLES] = stored_tables(model.hash_embedding)
    return found
