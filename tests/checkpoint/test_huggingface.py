"""Hugging Face folders without `transformers`: round trips, obstacles, and accepted values of config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint import huggingface, huggingface_config, native
from blt.checkpoint.formats import open_source
from blt.checkpoint.source import Source
from blt.checkpoint.tensors import StoredTensor
from blt.generate.torch_backend import open_model
from blt.model.config import HashConfig
from blt_runtime.errors import CheckpointError
from blt_runtime.ids import EOS
from blt_runtime.patching import PatchRule
from tests.checkpoint.folders import edit, load_state, rows, save_state, write
from tests.tiny import BY_ENTROPY, PLAIN, VARIANTS, WINDOW, random_checkpoint, stack, tiny


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_round_trip_from_native_is_bit_identical(dtype: torch.dtype | None, tmp_path: Path) -> None:
    source = tiny().to_source(tmp_path)
    native.write(source, tmp_path / "model.pt", dtype)
    first = open_source(tmp_path / "model.pt")
    huggingface.write(first, tmp_path / "hf")
    second = open_source(tmp_path / "hf")
    assert second.format == "huggingface"
    assert second.patch_rule == first.patch_rule
    assert second.blt_config == filled(first)
    for key, part in first.models().items():
        back = second.models()[key].weights
        assert back.keys() == part.weights.keys()
        for name, tensor in part.weights.items():
            assert back[name].dtype == tensor.dtype == (dtype or torch.float32)
            assert torch.equal(rows(back[name]), rows(tensor))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == str(dtype or torch.float32).removeprefix("torch.")


def filled(source: Source) -> Any:
    """The configuration with explicit numbers of key/value heads, as in the folder."""
    c = source.blt_config
    assert c is not None
    explicit = {
        name: stack.model_copy(update={"n_kv_heads": stack.kv_heads})
        for name, stack in {"encoder": c.encoder, "latent": c.latent, "decoder": c.decoder}.items()
    }
    return c.model_copy(update=explicit)


def test_separate_tables_are_written_as_one_tensor(tmp_path: Path) -> None:
    checkpoint = tiny()
    source = checkpoint.to_source(tmp_path)
    assert source.blt is not None
    name = "hash_embedding.tables.weight"
    whole = rows(source.blt.weights[name])
    pieces = StoredTensor((name,) * 3, tuple(whole.split(97)))
    apart = replace(source, blt=replace(source.blt, weights=source.blt.weights | {name: pieces}))
    huggingface.write(apart, tmp_path / "hf")
    fused = load_state(tmp_path / "hf")["model.encoder_hash_tok_embedding.weight"]
    assert len(pieces.pieces) == 3
    assert torch.equal(fused, whole)


# --- golden data -------------------------------------------------------------------------------------------


GOLDEN = ["ascii", "multibyte", "emoji", "code", "random_bytes", "repeat", "bos_only", "two", "three", "long"]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_cases_without_eos(golden: Path, case: str) -> None:
    """The weights are those of the golden facebook checkpoint, fused and renamed by transformers' own conversion."""
    with np.load(golden / "a" / "cases.npz") as arrays:
        ids, positions = arrays[f"{case}/tokens"].tolist(), arrays[f"{case}/logit_positions"]
        expected = [arrays[f"{case}/{name}"] for name in ("entropies", "patch_lengths", "logits")]
    assert EOS not in ids
    score = open_model(golden / "a" / "hf").stream(bos=False).score_ids(ids)
    np.testing.assert_allclose(score.entropies, expected[0], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(score.patch_lengths, expected[1])
    np.testing.assert_allclose(score.logits[positions], expected[2], rtol=0, atol=2e-5)


def test_golden_text(golden: Path) -> None:
    stream = open_model(golden / "a" / "hf", capacity=256).stream(bos=False)
    for case in json.loads((golden / "a" / "generate.json").read_text()):
        stream.reset()
        stream.append_ids(case["prompt_ids"])
        assert list(stream.generate_ids(64, temperature=0, stop_at_eos=False)) == case["meta"]


def test_golden_weights_equal_those_of_the_facebook_format(golden: Path) -> None:
    here, there = open_source(golden / "a" / "hf"), open_source(golden / "a" / "blt")
    assert here.patch_rule == there.patch_rule
    for key, part in there.models().items():
        for name, tensor in part.weights.items():
            assert torch.equal(rows(here.models()[key].weights[name]), rows(tensor)), name


# --- what transformers cannot represent --------------------------------------------------------------------


def test_every_obstacle_is_listed_at_once(tmp_path: Path) -> None:
    config = PLAIN.model_copy(
        update={
            "encoder": stack(32, 2, 2, window=WINDOW, head_dim=8),
            "latent": stack(64, 1, 4, window=5),
            "decoder": stack(32, 2, 4),
            "encoder_cross_all_layers": True,
            "encoder_cross_heads": 4,
            "decoder_cross_heads": 1,
            "encoder_cross_window": 2,
            "decoder_cross_window": 3,
            "pooling": "mean",
        }
    )
    rule = replace(BY_ENTROPY, monotonic=True, max_patch_length=3, reset_newlines=True, entropy_dtype="bfloat16")
    source = replace(random_checkpoint(config, rule).to_source(tmp_path), entropy=None)
    with pytest.raises(CheckpointError) as caught:
        huggingface.write(source, tmp_path / "hf")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "encoder_cross_all_layers with 2 encoder layers",
        "max_patch_length 3",
        "monotonic patch rule",
        "entropies compared in bfloat16",
        "encoder_cross_window 2",
        "decoder_cross_window 3",
        "encoder_cross_heads 4 with 2 heads",
        "decoder_cross_heads 1 with 4 heads",
        "pooling 'mean'",
        f"windows of encoder ({WINDOW}) and decoder (None) differ",
        "a window of 5 in the latent transformer",
        "head_dim of the encoder",
        "no entropy model",
        "reset_newlines",
    ):
        assert part in message
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("plain", "bytes_no_window")])
def test_the_other_variants_are_refused(variant: str, tmp_path: Path) -> None:
    named = {
        "all_layers_gqa_projection": r"encoder layers; monotonic patch rule",
        "cross_windows_own_heads_newlines": r"threshold_add 0.0; reset_newlines",
        "no_hash_space_causal_latent": r"pooling 'min'; patch scheme 'space'",
        "max_patch_length": r"represent \(docs/spec.md, section 12\): max_patch_length 3$",
        "static": r"section 12\): pooling 'learned'; patch scheme 'static'$",
        "hash_entropy": r"section 12\): hash n-grams of the entropy model$",
        "hash_entropy_without_layers": r"hash n-grams of the entropy model; an entropy model without layers$",
    }
    with pytest.raises(CheckpointError, match=named[variant]):
        write(tiny(variant), tmp_path / "hf")


def test_other_obstacles(tmp_path: Path) -> None:
    config = PLAIN.model_copy(update={"latent": stack(32, 1, 2), "cross_k": 1, "decoder_projection": False})
    with pytest.raises(CheckpointError, match=r"represent \(docs/spec.md, section 12\): decoder_projection off$"):
        write(random_checkpoint(config, BY_ENTROPY), tmp_path / "hf")
    source = tiny().to_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"represent \(docs/spec.md, section 12\): no patch rule$"):
        huggingface.write(replace(source, patch_rule=None), tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"represent \(docs/spec.md, section 12\): a checkpoint with only an entropy model$"
    ):
        huggingface.write(replace(source, blt=None), tmp_path / "hf")


def test_differences_without_an_obstacle_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tiny(), tmp_path / "hf")
    assert "does not mask documents" in caplog.text
    assert "half precision" not in caplog.text
    write(tiny(), tmp_path / "half", torch.bfloat16)
    assert "half precision" in caplog.text


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = write(tiny(), tmp_path / "hf")
    (folder / "stale.txt").write_text("")
    write(tiny(seed=1), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


# --- accepted and refused values of config.json ------------------------------------------------------------


def test_missing_fields_are_the_defaults_of_transformers() -> None:
    """Older versions write only what differs from the defaults; the released 1B has all defaults."""
    blt, entropy, rule = huggingface_config.our_configs(
        huggingface_config.parse_config({"encoder_config": None}, ""), ""
    )
    assert rule == PatchRule("entropy", threshold=1.335442066192627)
    assert blt.hash == HashConfig(rows=500002)
    assert blt.cross_k == 2
    assert blt.decoder_cross_all_layers
    assert not blt.encoder_cross_all_layers
    assert entropy is not None
    shapes = {
        "encoder": (blt.encoder, 1, 1024, 16, 2730, 500000.0, 512),  # int(8/3 * 1024), not the model's 2816
        "latent": (blt.latent, 25, 2048, 16, 5632, 500000.0, None),
        "decoder": (blt.decoder, 9, 1024, 16, 2816, 500000.0, 512),
        "entropy": (entropy, 14, 768, 12, 2048, 10000.0, 512),
    }
    for name, (c, *expected) in shapes.items():
        found = [c.n_layers, c.dim, c.n_heads, c.hidden_dim, c.rope_theta, c.window]
        assert found == expected, name


def test_older_spellings_of_the_rotary_angle(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for section in ("encoder_config", "decoder_config", "patcher_config"):
            del config[section]["rope_parameters"]
        config["encoder_config"] |= {"rope_scaling": {"type": "default"}, "rope_theta": 8.0}
        config["decoder_config"] |= {"rope_scaling": {"rope_theta": 9.0, "rope_type": "default"}, "rope_theta": 3.0}
        config["patcher_config"] |= {"rope_theta": 7}

    edit(folder, change)
    source = open_source(folder)
    assert source.blt_config is not None
    assert source.entropy_config is not None
    angles = [c.rope_theta for c in (source.blt_config.encoder, source.blt_config.decoder, source.entropy_config)]
    assert angles == [8.0, 9.0, 7.0]


@pytest.mark.parametrize("off", [False, True])
def test_a_folder_without_patcher(folder: Path, off: bool, caplog: pytest.LogCaptureFixture) -> None:
    if off:
        edit(folder, lambda c: c.update(patch_in_forward=False))
    else:
        state = load_state(folder)
        save_state(folder, {name: tensor for name, tensor in state.items() if "patcher" not in name})
    source = open_source(folder)
    assert source.entropy is None
    assert source.patch_rule is not None
    assert source.patch_rule.scheme == "entropy"
    assert ("weights of the patcher are not read" in caplog.text) == off


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "text for a number": (lambda c: c["global_config"].update(num_hidden_layers="2"), r"num_hidden_layers.*'2'"),
    "other mode": (lambda c: c.update(patching_mode="space"), r"patching_mode 'space' .*section 12.*write 'byte'"),
    "no mode": (lambda c: c.update(patching_mode=None), r"patching_mode None .*section 12"),
    "no patch size": (lambda c: c.update(patch_size=None), r"patch_size null .*section 12.*write 4"),
    "longest": (lambda c: c.update(max_patch_length=8), r"max_patch_length 8.*section 12.*null"),
    "no threshold": (lambda c: c.update(patching_threshold=None), "patching_threshold is null"),
    "NaN": (lambda c: c.update(patching_threshold=float("nan")), "is not a finite number"),
    "all layers": (
        lambda c: c["encoder_config"].update(cross_attn_all_layers=True, num_hidden_layers=2),
        r"cross_attn_all_layers with 2 layers.*section 12",
    ),
    "angles": (lambda c: c["encoder_config"].update(rope_scaling={"type": "yarn"}), "encoder_config: rope_type 'yarn'"),
    "activation": (lambda c: c["decoder_config"].update(hidden_act="gelu"), r"decoder_config\.hidden_act.*'gelu'"),
    "tied": (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings"),
    "slices": (lambda c: c["decoder_config"].update(cross_attn_k=3), r"decoder_config\.cross_attn_k 3 .*_k 2"),
    "latent width": (
        lambda c: c["decoder_config"].update(hidden_size_global=96),
        r"hidden_size_global 96 does not fit global_config\.hidden_size 64",
    ),
    "local widths": (
        lambda c: c["decoder_config"].update(hidden_size=64),
        r"decoder_config\.hidden_size 64 does not fit encoder_config\.hidden_size 32",
    ),
    "heads": (lambda c: c["encoder_config"].update(num_attention_heads=3), "encoder_config: n_heads 3 is not div"),
    "head size": (lambda c: c["global_config"].update(head_dim=8), "head_dim 8 is not hidden_size 64 // .* 4"),
    "width of the weights": (
        lambda c: (c["global_config"].update(hidden_size=32), c["decoder_config"].update(hidden_size_global=32)),
        r"global_transformer.layers.0.self_attn\.q_proj\S+ is \(64, 64\), expected \(32, 32\);.*missing .*projection",
    ),
    "vocabulary": (
        lambda c: (c.update(vocab_size=300), c["encoder_config"].update(vocab_size=300)), r"expected \(300, 32",
    ),
    "tables": (lambda c: c.update(encoder_hash_byte_group_vocab=98), r"is \(291, 32\), expected \(294, 32\)"),
    "functions": (lambda c: c.update(encoder_hash_byte_group_nb_functions=12), "functions.*11"),
    "a list": (lambda c: c.update(global_config=[]), r"global_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations_are_one_clear_error(name: str, folder: Path) -> None:
    change, message = BAD[name]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_damaged_configuration(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        open_source(folder)
    file.write_text('["model_type": "blt"]')
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        open_source(folder)
