"""What is uploaded: the files of a checkpoint and of a bundle, the tokenizer and the card, under fixed names.

Files are uploaded from where they are. Only a checkpoint that has to be converted is written, into a scratch folder.
Everything else of a run's folder (data, optimizer states, logs) has no name in a repository, so it stays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blt.checkpoint.hub import BUNDLE, WEIGHTS
from blt.share import card
from blt.share.facts import Facts, collect
from blt.share.tokenizer import generation_config, tokenizer, tokenizer_config
from blt_runtime import reading
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import Bundle, is_bundle
from blt_runtime.errors import BundleError, CheckpointError, UsageError

if TYPE_CHECKING:
    from blt.checkpoint.source import Source

CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
_NATIVE_KEYS = {"format", "version", "config", "blt", "entropy"}
log = logging.getLogger("blt.share")


@dataclass(frozen=True)
class Item:
    """One file of a repository: its name there, and its content or the local file that has it."""

    name: str
    source: Path | bytes

    @property
    def bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Of the model card. file: a finished card.  bench, data: see `facts.collect`."""

    license: str | None = None
    file: Path | None = None
    bench: Path | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint in the format that is uploaded: "hf" (safetensors), or "native" (model.pt)."""

    source: Source
    format: Literal["hf", "native"]
    items: tuple[Item, ...]
    lost: tuple[str, ...] = ()


def gather(
    folder: Path,
    name: str,
    scratch: Path,
    *,
    bundle: Path | None = None,
    entropy_model: Path | None = None,
    options: CardOptions = CardOptions(),
) -> list[Item]:
    """All files of the repository `name`, in the order of their names.

    folder: a checkpoint or a bundle.  bundle: one that was exported from the checkpoint.  scratch: an empty folder for
    a converted checkpoint. A README.md in the folder is the card. Raises UsageError, CheckpointError, BundleError.

    Example:
        with tempfile.TemporaryDirectory() as scratch:
            upload(name, gather(Path("runs/blt"), name, Path(scratch), bundle=Path("bundle")), message="First version")
    """
    alone = is_bundle(folder)
    if alone and bundle is not None:
        raise UsageError(f"{folder} is a bundle already; leave --bundle out, or give the checkpoint first")
    exported = folder if alone else bundle
    opened, bundle_items = (None, ()) if exported is None else read_bundle(exported)
    checkpoint = None if alone else read_checkpoint(folder, scratch, entropy_model)
    if checkpoint is not None and opened is not None:
        check_same_model(checkpoint.source, opened)
    beside = folder if folder.is_dir() else folder.parent
    written = beside / card.FILE if options.file is None and (beside / card.FILE).is_file() else options.file
    facts = collect(
        beside,
        checkpoint.source if checkpoint else None,
        opened.manifest if opened else None,
        checkpoint=checkpoint.format if checkpoint else None,
        lost=checkpoint.lost if checkpoint else (),
        bench=options.bench,
        data=options.data,
    )
    items = [
        card_item(name, facts, options.license, written),
        *tokenizer_items(facts.longest_text),
        *(checkpoint.items if checkpoint else ()),
        *bundle_items,
    ]
    return sorted(items, key=lambda item: item.name)


def read_checkpoint(path: Path, scratch: Path, entropy_model: Path | None = None) -> Checkpoint:
    """The checkpoint at `path` in the format of transformers if that can represent it, else as `model.pt`.

    A file that has the format already is used where it is, else one is written into `scratch`. Raises CheckpointError,
    also for weights that are not finite and for a checkpoint that cannot generate.
    """
    from blt.checkpoint import huggingface, huggingface_write, native
    from blt.checkpoint.formats import open_source

    source = open_source(path, entropy_model=entropy_model)
    source.check_can_generate()
    source.check_finite()
    if source.format == "huggingface":
        return Checkpoint(source, "hf", _huggingface_items(source.path))
    obstacles = huggingface_write.obstacles(source)
    if not obstacles:
        with _converting(scratch):
            huggingface.write(source, scratch / "hf")
        lost = huggingface_write.lost(source, json.loads((scratch / "hf" / CONFIG).read_text()))
        return Checkpoint(source, "hf", _huggingface_items(scratch / "hf"), tuple(lost))
    log.info("transformers cannot represent %s; the checkpoint is uploaded as %s", "; ".join(obstacles), WEIGHTS)
    if source.format == "native" and _is_whole(source.path):
        return Checkpoint(source, "native", (_item(source.path.parent, source.path.name, WEIGHTS),))
    with _converting(scratch):
        native.write(source, scratch / WEIGHTS)
    return Checkpoint(source, "native", (Item(WEIGHTS, scratch / WEIGHTS),))


@contextmanager
def _converting(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the converted checkpoint to {scratch.parent}: {error.strerror}; TMPDIR names another place"
        ) from error


def _huggingface_items(folder: Path) -> tuple[Item, ...]:
    from blt.checkpoint.huggingface import INDEX, weight_files

    names = [CONFIG, *(path.name for path in weight_files(folder)), *([INDEX] if (folder / INDEX).is_file() else [])]
    return (*(_item(folder, name) for name in names), Item(GENERATION, _json(generation_config())))


def _is_whole(path: Path) -> bool:
    """Whether a model.pt holds everything that generation needs, and nothing but a model."""
    from blt.checkpoint import native
    from blt.checkpoint.tensors import read_tensors

    return read_tensors(path).keys() <= _NATIVE_KEYS and not native.read(path).lacks_entropy_model


def _item(folder: Path, name: str, uploaded: str | None = None) -> Item:
    """A plain file of a folder. Raises CheckpointError for a link that leaves it."""
    try:
        path = reading.in_folder(folder, name)
        reading.check_plain(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from None
    return Item(uploaded or name, path)


def read_bundle(path: Path) -> tuple[Bundle, tuple[Item, ...]]:
    """A bundle, its sha256 compared in full, and the files that its manifest lists. Raises BundleError."""
    bundle = Bundle.open(path, verify="full")
    names = [manifests.FILE_NAME, *bundle.manifest.files]
    return bundle, tuple(Item(f"{BUNDLE}/{name}", path / name) for name in names)


def check_same_model(source: Source, bundle: Bundle) -> None:
    """Raises BundleError unless the bundle was exported from a checkpoint of these configurations and this rule."""
    config = bundle.manifest.config
    for name, model in source.models().items():
        if name in config and config[name] != model.config.model_dump(mode="json"):
            raise BundleError(f"{bundle.path} was exported from another model: the {name} configuration differs")
    ours, theirs = source.patch_rule, bundle.manifest.spec.patch_rule
    if ours is not None and (ours.scheme, ours.threshold) != (theirs.scheme, theirs.threshold):
        raise BundleError(
            f"{bundle.path} was exported with another patch rule ({theirs.scheme}, threshold {theirs.threshold}); "
            "export the checkpoint again"
        )


def tokenizer_items(max_bytes: int | None) -> tuple[Item, ...]:
    """The tokenizer of bytes. max_bytes: the longest text of the model, if known."""
    return (
        Item(TOKENIZER, _json(tokenizer())),
        Item(TOKENIZER_CONFIG, _json(tokenizer_config(max_bytes))),
    )


def card_item(name: str, facts: Facts, license: str | None, given: Path | None) -> Item:
    """The model card: the file that is given, else one written from the facts. Raises UsageError."""
    if given is None:
        return Item(card.FILE, card.render(name, facts, license).encode())
    try:
        return Item(card.FILE, reading.read_text(given).encode())
    except (OSError, ValueError) as error:
        raise UsageError(f"{given}: {reading.reason(error)}; give a model card in UTF-8") from None


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
