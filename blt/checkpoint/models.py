"""Checkpoints of every format, as models in memory and as files.

`open_source` says what a checkpoint is without loading it, `load` builds the models, `save` writes our own format.
Nothing in a checkpoint is ever run: pickled files are read with `weights_only=True`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from blt.checkpoint import facebook, hub, native
from blt.checkpoint.formats import ADAPTERS
from blt.checkpoint.source import HASH_TABLES, Part, Source, require_complete
from blt.checkpoint.tensors import Stored
from blt.model import BLT, EntropyModel
from blt.model.bfloat16 import BFloat16EntropyModel, to_bfloat16
from blt.model.hashing import HashEmbedding, MappedTables
from blt.model.layers import RotaryTable
from blt.model.token import TokenModel
from blt.model.vocabulary import Vocabulary, checked
from blt_runtime.errors import CheckpointError, RuleError
from blt_runtime.patching import EntropyDtype, PatchRule

MODEL_FILE = native.MODEL_FILE


@dataclass(frozen=True)
class Checkpoint:
    """What a model file holds. An entropy model alone has no `blt`; a rule without entropies needs no `entropy`. A
    token-level baseline is `bpe` with its `vocabulary`, and nothing else."""

    blt: BLT | None
    entropy: EntropyModel | None
    patch_rule: PatchRule | None
    bpe: TokenModel | None = None
    vocabulary: Vocabulary | None = None

    def require_blt(self) -> tuple[BLT, PatchRule]:
        """The BLT and its rule. Raises CheckpointError if one is missing, or the entropy model that the rule needs."""
        require_complete(self.blt, self.entropy, self.patch_rule, self.bpe)
        assert self.blt is not None
        assert self.patch_rule is not None
        return self.blt, self.patch_rule

    def with_entropy_dtype(self, dtype: EntropyDtype) -> Checkpoint:
        """The same with the entropy model and the patch rule in `dtype`: float32 is ours, bfloat16 what the reference's
        loader computes (spec section 4). The BLT is the same object.

        Raises RuleError if bfloat16 is asked of a checkpoint whose patches need no entropies, or float32 of one whose
        entropy model was rounded already.
        """
        model, rule = self.entropy, self.patch_rule
        rounded = isinstance(model, BFloat16EntropyModel)
        if dtype == "float32" and rounded:
            raise RuleError(
                "the entropy model was rounded to bfloat16: load the checkpoint again for float32 entropies"
            )
        if dtype == "bfloat16" and model is None:
            raise RuleError("bfloat16 entropies need an entropy model, and this checkpoint has none: leave float32")
        if rule is not None:
            rule = replace(rule, entropy_dtype=dtype)
        if dtype == "bfloat16" and model is not None and not rounded:
            model = to_bfloat16(model)
        return replace(self, entropy=model, patch_rule=rule)

    def to_source(self, path: Path) -> Source:
        """The same as weights to be written at `path`."""
        blt = None if self.blt is None else Part(self.blt.config, _weights(self.blt))
        entropy = None if self.entropy is None else Part(self.entropy.config, _weights(self.entropy))
        bpe = None if self.bpe is None else Part(self.bpe.config, _weights(self.bpe))
        return Source(
            "native", path, blt, entropy, self.patch_rule, bpe, self.vocabulary.text if self.vocabulary else None
        )


def open_source(path: str | Path, entropy_model: str | Path | None = None) -> Source:
    """What any supported checkpoint says: configurations, rule, and weights that stay in their files.

    path: a `model.pt`, a folder with one, a folder in the reference's training or hub format, a Hugging Face folder,
    or a name on the hub.  entropy_model: the same, for formats that keep it apart; found by itself where it lies
    beside.  Raises CheckpointError, and MissingExtra for a hub name without huggingface_hub.
    """
    source = _read(path)
    alone = source.entropy is None and source.patch_rule is not None and source.patch_rule.needs_entropy
    if entropy_model is None and alone:
        entropy_model = hub.entropy_beside(path, source.path)
    return source if entropy_model is None else source.with_entropy(_read(entropy_model))


def _read(path: str | Path) -> Source:
    place = hub.resolve(path)
    adapter = next((a for a in ADAPTERS if a.matches(place)), None)
    if adapter is None:
        raise CheckpointError(f"{path} is no checkpoint: {_why_not(place)}")
    source: Source = adapter.read(place)
    return source


def _why_not(place: Path) -> str:
    """What is wrong with a path that no adapter takes, and what helps."""
    config = place / facebook.HUB_CONFIG
    if config.is_file():
        return f"its {config.name} has neither the reference's 'args' nor model_type blt, so it is another model's"
    inside = {path.parent.name for name in (native.MODEL_FILE, facebook.PARAMS) for path in place.glob(f"*/{name}")}
    if inside:
        return f"it is a folder with {', '.join(sorted(inside))} in it; give one of them"
    return "a folder needs model.pt, params.json (reference) or config.json (hub)"


def load(
    path: str | Path,
    entropy_model: str | Path | None = None,
    trainable: bool = False,
    entropy_dtype: EntropyDtype | None = None,
    generates: bool = False,
) -> Checkpoint:
    """Load any supported checkpoint in float32 and evaluation mode; hash tables stay in their file, in its dtype.

    trainable: hash tables in memory and float32, too.  entropy_dtype: see `Checkpoint.with_entropy_dtype` (default:
    what the checkpoint's rule says).  generates: it must have all that generation needs, which is asked before weights
    are read.  Other arguments and errors as `open_source`; weights that are not finite are a CheckpointError.
    """
    source = open_source(path, entropy_model)
    if generates:
        source.require_blt()
    checkpoint = build(source, trainable)
    if entropy_dtype is None:
        entropy_dtype = checkpoint.patch_rule.entropy_dtype if checkpoint.patch_rule else "float32"
    return checkpoint.with_entropy_dtype(entropy_dtype)


def build(source: Source, trainable: bool = False) -> Checkpoint:
    """The models of a source. Raises CheckpointError for weights that are not finite, before memory is spent."""
    source.check_finite()
    blt = entropy = None
    if source.blt is not None and source.blt_config is not None:
        with torch.device("meta"):
            blt = BLT(source.blt_config)
        _materialise(blt, source.blt.weights, trainable)
    if source.entropy is not None and source.entropy_config is not None:
        with torch.device("meta"):
            entropy = EntropyModel(source.entropy_config)
        _materialise(entropy, source.entropy.weights, trainable)
    bpe = vocabulary = None
    if source.bpe is not None and source.bpe_config is not None:
        vocabulary = checked(source.tokenizer or "", source.path)
        if vocabulary.size > source.bpe_config.vocab_size:
            raise CheckpointError(f"{source.path}: its tokenizer has {vocabulary.size} ids, more than its model")
        with torch.device("meta"):
            bpe = TokenModel(source.bpe_config)
        _materialise(bpe, source.bpe.weights, trainable)
    return Checkpoint(blt, entropy, source.patch_rule, bpe, vocabulary)


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write `model.pt` atomically; `dtype` is that of the stored floating-point weights (default: as they are)."""
    native.write(checkpoint.to_source(Path(path)), Path(path), dtype)


def _materialise(model: BLT | EntropyModel, weights: dict[str, Stored], trainable: bool) -> None:
    """Fill a model that was built on the meta device."""
    mapped = not trainable and HASH_TABLES in weights and weights[HASH_TABLES].dtype != torch.float64
    if isinstance(model, BLT) and model.hash_embedding is not None and mapped:
        stored = weights[HASH_TABLES]
        tables = [table for piece in stored.pieces for table in piece.detach().split(model.hash_embedding.config.rows)]
        model.hash_embedding.tables = MappedTables(tables, stored.mapped)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, RotaryTable | HashEmbedding):
            module.make_buffers()
    for name, parameter in model.named_parameters():
        weights[name].copy_to(parameter.data)
    model.eval()


def stored_tables(model: BLT) -> Stored:
    """A model's hash tables, wherever they are. Raises ValueError if it has none."""
    if model.hash_embedding is None:
        raise ValueError("this model has no hash tables")
    tables = model.hash_embedding.tables
    if isinstance(tables, MappedTables):
        return Stored((HASH_TABLES,) * len(tables.tables), tables.tables, tables.mapped)
    return Stored((HASH_TABLES,), (tables.weight.detach().cpu(),))


def _weights(model: BLT | EntropyModel) -> dict[str, Stored]:
    weights = {name: Stored((name,), (t.detach().cpu(),)) for name, t in model.state_dict().items()}
    if isinstance(model, BLT) and model.hash_embedding is not None:
        weights[HASH_TABLES] = stored_tables(model)
    return weights
