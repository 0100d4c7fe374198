"""Every field of the configurations and of the patch rule, in every format: a round trip keeps it, refuses it, or names
it in a warning. A new field fails here until it has a value in `OTHER`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from blt.checkpoint import huggingface, native
from blt.checkpoint.formats import open_source
from blt.checkpoint.huggingface_write import settings
from blt.checkpoint.models import Checkpoint
from blt.checkpoint.source import Source
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
from blt.model.config import HashConfig, TransformerConfig
from blt_runtime.errors import CheckpointError
from blt_runtime.patching import PatchRule
from tests.checkpoint.facebook import write_facebook

STACK: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 4, "ffn_dim": 24, "window": 24, "max_seqlen": 64}
BASE: dict[str, Any] = {
    "blt": {
        "encoder": STACK,
        "latent": STACK | {"dim": 32, "window": None},
        "decoder": STACK | {"n_layers": 2},
        "hash": {"rows": 7, "sizes": [3]},
    },
    "entropy": STACK | {"window": 512, "rope_theta": 10000.0},
    "patch_rule": {"scheme": "entropy", "threshold": 1.5},
}
OTHER_STACK: dict[str, Any] = {
    "dim": 8,
    "n_layers": 3,
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 6,
    "ffn_dim": 40,
    "norm_eps": 1e-3,
    "rope_theta": 777.0,
    "window": 30,
    "max_seqlen": 96,
}
OTHER: dict[str, dict[str, Any]] = {
    "blt.encoder": OTHER_STACK,
    "blt.latent": OTHER_STACK | {"dim": 48},
    "blt.decoder": OTHER_STACK,
    "blt.hash": {"sizes": [2, 4], "rows": 11, "functions": 3},
    "blt": {
        "vocab_size": 261,
        "hash": None,
        "cross_k": 3,
        "encoder_cross_heads": 2,
        "decoder_cross_heads": 2,
        "encoder_cross_all_layers": True,
        "decoder_cross_all_layers": False,
        "encoder_cross_window": 2,
        "decoder_cross_window": 2,
        "decoder_projection": False,
        "pooling": "mean",
        "latent_document_mask": False,
    },
    "entropy": OTHER_STACK | {"vocab_size": 261, "hash": {"sizes": [2, 4], "rows": 11, "functions": 3}},
    "patch_rule": {
        "scheme": "byte",
        "threshold": 0.75,
        "threshold_add": 0.25,
        "monotonic": True,
        "patch_size": 6,
        "max_patch_length": 5,
        "reset_newlines": True,
        "entropy_dtype": "bfloat16",
    },
}
"""Another value of every field."""
TOGETHER: dict[str, list[tuple[str, Any]]] = {
    "blt.encoder.dim": [("blt.decoder.dim", 8)],
    "blt.decoder.dim": [("blt.encoder.dim", 8)],
    "blt.encoder_cross_all_layers": [("blt.encoder.n_layers", 2)],
    "blt.decoder_projection": [("blt.cross_k", 1), ("blt.latent.dim", 16)],
}
"""Fields that must change with another one, for a valid configuration."""


def fields() -> list[str]:
    """The full names of all fields of the configuration classes, from the classes themselves."""

    def of(kind: type[BaseModel], prefix: str) -> list[str]:
        names = []
        for name, field in kind.model_fields.items():
            nested = {"blt.hash": HashConfig}.get(f"{prefix}.{name}", field.annotation)
            if nested is TransformerConfig or nested is HashConfig:
                names += of(nested, f"{prefix}.{name}")
            if nested is not TransformerConfig:
                names.append(f"{prefix}.{name}")
        return names

    rule = [f"patch_rule.{field.name}" for field in dataclasses.fields(PatchRule)]
    return of(BLTConfig, "blt") + of(EntropyConfig, "entropy") + rule


FIELDS = fields()


def test_every_field_has_another_value() -> None:
    assert sorted(FIELDS) == sorted(f"{section}.{name}" for section, values in OTHER.items() for name in values)


def changed(field: str) -> dict[str, Any]:
    """The base with another value of one field."""
    section, _, name = field.rpartition(".")
    values = {key: {**value} for key, value in BASE.items()}
    for at, value in [(field, OTHER[section][name]), *TOGETHER.get(field, [])]:
        *path, last = at.split(".")
        inside = values
        for key in path:
            inside[key] = {**inside[key]}
            inside = inside[key]
        inside[last] = value
    return values


def checkpoint(values: dict[str, Any]) -> Checkpoint:
    blt, entropy = BLT(BLTConfig.model_validate(values["blt"])), EntropyModel(EntropyConfig(**values["entropy"]))
    for model in (blt, entropy):
        model.init_weights()
    return Checkpoint(blt.eval(), entropy.eval(), PatchRule(**values["patch_rule"]))


def meaning(source: Source) -> dict[str, Any]:
    found = settings(source.blt_config, "blt") | settings(source.entropy_config, "entropy")
    return found | settings(source.patch_rule, "patch_rule")


def test_the_values_differ_in_their_meaning(tmp_path: Path) -> None:
    base = meaning(checkpoint(BASE).to_source(tmp_path))
    for field in FIELDS:
        other = meaning(checkpoint(changed(field)).to_source(tmp_path))
        named = [name for name in other.keys() | base.keys() if name.startswith(field)]
        assert any(other.get(name) != base.get(name) for name in named), field


@pytest.mark.parametrize("field", FIELDS)
def test_our_own_format_keeps_every_field(field: str, tmp_path: Path) -> None:
    source = checkpoint(changed(field)).to_source(tmp_path)
    native.write(source, tmp_path / "model.pt")
    if field.endswith("vocab_size"):
        with pytest.raises(CheckpointError, match="a byte-level model has 260"):
            open_source(tmp_path / "model.pt")
        return
    assert meaning(open_source(tmp_path / "model.pt")) == meaning(source)


@pytest.mark.parametrize("field", FIELDS)
def test_hugging_faces_format_keeps_refuses_or_names_every_field(
    field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint(changed(field)).to_source(tmp_path)
    try:
        huggingface.write(source, tmp_path / "hf")
        back = meaning(open_source(tmp_path / "hf"))
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
        ours = meaning(source)
        changes = [name for name in ours if ours[name] != back.get(name)]
        assert all(f"{name} {ours[name]} becomes {back.get(name)}" in caplog.text for name in changes)
        assert ("does not keep" in caplog.text) == bool(changes)
    assert not refusal or names(refusal, field), refusal
    assert refusal or (tmp_path / "hf").exists()


def names(refusal: str, field: str) -> bool:
    """Whether the message is about the field, in our words."""
    words = {"window": "window", "vocab_size": "261 ids", "scheme": "patch scheme", "entropy_dtype": "bfloat16"}
    name = field.split(".")[-1]
    return words.get(name, name.split("_all_layers")[0]) in refusal or name.replace("_", " ") in refusal


def test_the_lost_document_mask_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = checkpoint(changed("blt.latent_document_mask")).to_source(tmp_path)
    huggingface.write(source, tmp_path / "hf")
    assert "blt.latent_document_mask False becomes True" in caplog.text


NO_ARGUMENT = {
    "blt.decoder.norm_eps": "one norm_eps for all stacks",
    "blt.encoder.norm_eps": "one norm_eps for all stacks",
    "blt.latent.norm_eps": "one norm_eps for all stacks",
    "blt.decoder.rope_theta": "one rope_theta for all stacks",
    "blt.encoder.rope_theta": "one rope_theta for all stacks",
    "blt.latent.rope_theta": "one rope_theta for all stacks",
    "blt.encoder.max_seqlen": "one max_encoder_seq_length for both local stacks",
    "blt.decoder.max_seqlen": "one max_encoder_seq_length for both local stacks",
    "blt.encoder.window": "one local_attention_window_len for both local stacks",
    "blt.decoder.window": "one local_attention_window_len for both local stacks",
    "blt.latent.window": "none in the latent transformer",
    "blt.encoder_cross_heads": "one cross_attn_nheads for both",
    "blt.decoder_cross_heads": "one cross_attn_nheads for both",
    "patch_rule.reset_newlines": "facebookresearch/blt resets its entropy model nowhere",
    "patch_rule.entropy_dtype": "chosen when a checkpoint is loaded",
    "patch_rule.patch_size": "read for static patching only",
    "entropy.hash": "facebookresearch/blt has no n-grams there",
    "entropy.max_seqlen": "at least 8,192",
    "entropy.window": "512 in a training folder; the hub's is tested below",
}
"""What facebookresearch/blt has no argument for, so that no folder of its format can hold it."""
SHARED: dict[str, dict[str, Any]] = {
    "norm_eps": {"blt.encoder.norm_eps": 1e-3, "blt.latent.norm_eps": 1e-3, "blt.decoder.norm_eps": 1e-3},
    "rope_theta": {"blt.encoder.rope_theta": 7.0, "blt.latent.rope_theta": 7.0, "blt.decoder.rope_theta": 7.0},
    "max_seqlen": {"blt.encoder.max_seqlen": 96, "blt.decoder.max_seqlen": 96},
    "window": {"blt.encoder.window": 30, "blt.decoder.window": 30},
    "cross_heads": {"blt.encoder_cross_heads": 2, "blt.decoder_cross_heads": 2},
    "entropy": {"entropy.rope_theta": 7.0, "entropy.norm_eps": 1e-3, "entropy.window": 30},
}


def assert_facebook_keeps(values: dict[str, Any], folder: Path, form: Any) -> None:
    made = checkpoint(values)
    if not made.patch_rule or not made.patch_rule.needs_entropy:
        made = dataclasses.replace(made, entropy=None)
    ours, path = meaning(made.to_source(folder)), write_facebook(folder, made, form)
    e = EntropyConfig(**values["entropy"])
    forced = form == "hub" or (e.window, e.rope_theta, e.norm_eps) == (512, 10000.0, 1e-5)
    if not forced or {values["blt"].get("vocab_size", 260), e.vocab_size} != {260}:
        with pytest.raises(CheckpointError, match=r"runs every one with|a byte-level model has 260"):
            open_source(path)
        return
    back = meaning(open_source(path))
    ignored = {"entropy.max_seqlen", "patch_rule.patch_size"}
    assert {n: v for n, v in back.items() if n not in ignored} == {n: v for n, v in ours.items() if n not in ignored}


@pytest.mark.parametrize("form", ["training", "hub"])
@pytest.mark.parametrize("field", [field for field in FIELDS if field not in NO_ARGUMENT])
def test_facebooks_format_is_read_with_every_field(field: str, form: str, tmp_path: Path) -> None:
    values = changed(field)
    if field.endswith(".n_heads"):  # cross_attn_nheads is one number for both
        values["blt"] |= {"encoder_cross_heads": 2, "decoder_cross_heads": 2}
    if field == "patch_rule.scheme":
        values["patch_rule"] = {"scheme": "byte"}
    assert_facebook_keeps(values, tmp_path, form)


@pytest.mark.parametrize("name", SHARED)
def test_facebooks_format_is_read_with_fields_that_stacks_share(name: str, tmp_path: Path) -> None:
    values = {key: {**value} for key, value in BASE.items()}
    for field, value in SHARED[name].items():
        section, *path = field.split(".")
        inside = values[section]
        for key in path[:-1]:
            inside[key] = {**inside[key]}
            inside = inside[key]
        inside[path[-1]] = value
    assert_facebook_keeps(values, tmp_path, "hub")
