"""Opens a checkpoint of any format. Each format is a module with `matches(path)` and `read(path) -> Source`.

The modules `native` and `huggingface` also have `write`. Nothing in a checkpoint is ever executed: pickled files are
read with `weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path

from blt.checkpoint import facebook, hub, huggingface, native, stopped
from blt.checkpoint.source import Source
from blt_runtime.errors import CheckpointError, UsageError, shown

FORMATS = (native, stopped, facebook, huggingface)
"""In the order in which a path is matched."""


def open_source(path: str | Path, entropy_model: str | Path | None = None) -> Source:
    """Configurations, patch rule and weights of a checkpoint of any format; the weights stay in their files.

    path: a `model.pt`, a folder that holds one, the folder of a training run that stopped, a folder in the facebook
    format (facebookresearch/blt's training folder or hub folder), a Hugging Face folder, or a name on the hub.
    entropy_model: the same, for formats that store the entropy model separately; by default it is searched for inside
    and next to the folder.

    Raises CheckpointError, and for a hub name HubError, or MissingExtra without huggingface_hub.
    """
    source = _read(path)
    if entropy_model is None and source.lacks_entropy_model:
        entropy_model = source.entropy_path or hub.find_entropy_model(path, source.path)
    return source if entropy_model is None else source.with_entropy(_read(entropy_model))


def _read(path: str | Path) -> Source:
    if not isinstance(path, str | Path):
        raise UsageError(f"a checkpoint is named by a str or a Path, not {shown(path)}")
    place = hub.resolve(path)
    found = next((module for module in FORMATS if module.matches(place)), None)
    if found is None:
        raise CheckpointError(f"{path} is not a checkpoint: {_why_not(place)}")
    source: Source = found.read(place)
    return source


def _why_not(place: Path) -> str:
    """Why no format matches a path, and what to give instead."""
    config = place / facebook.HUB_CONFIG
    if config.is_file():
        neither = "neither the 'args' of facebookresearch/blt nor model_type blt"
        return f"its {config.name} has {neither}, so it belongs to another model"
    inside = {path.parent.name for name in (native.MODEL_FILE, facebook.PARAMS) for path in place.glob(f"*/{name}")}
    if inside:
        return f"it is a folder that contains {', '.join(sorted(inside))}; give one of them"
    return (
        "a folder needs model.pt, params.json (facebookresearch/blt), config.json (hub) or, if a bundle, manifest.json"
    )
