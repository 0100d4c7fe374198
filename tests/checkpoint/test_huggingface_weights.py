"""The weights of a Hugging Face folder: grouped heads, shards, and every kind of damage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from blt.checkpoint.formats import open_source
from blt.checkpoint.models import load
from blt_runtime.errors import CheckpointError
from tests.checkpoint.folders import edit, load_state, rows, save_state, shard, write_index


def test_every_tensor_that_does_not_fit_is_listed(folder: Path) -> None:
    state = load_state(folder)
    del state["lm_head.weight"], state["model.global_transformer.layers.1.mlp.up_proj.weight"]
    state["model.local_decoder.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    state["model.local_encoder.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 32)
    state["model.local_decoder.norm.weight"] = torch.zeros(32, dtype=torch.int64)
    save_state(folder, state)
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "missing lm_head.weight",
        "missing model.global_transformer.layers.1.mlp.up_proj.weight",
        "unknown model.local_decoder.layers.7.mlp.up_proj.weight",
        "model.local_encoder.layers.0.mlp.down_proj.weight is (64, 32), expected (32, 64)",
        "model.local_decoder.norm.weight is int64",
    ):
        assert part in message


def test_an_incomplete_patcher(folder: Path) -> None:
    state = load_state(folder)
    del state["model.patcher.layers.1.self_attn.o_proj.weight"]
    save_state(folder, state)
    with pytest.raises(CheckpointError, match=r"missing model\.patcher\.layers\.1\.self_attn\.o_proj\.weight$"):
        open_source(folder)


def group_heads(folder: Path) -> None:
    """Gives the local stacks one key/value head for two heads, in cross-attention, too, as transformers does."""
    edit(folder, lambda c: [c[f"{side}_config"].update(num_key_value_heads=1) for side in ("encoder", "decoder")])
    local = re.compile(r"model\.local_.*\.[kv]_proj\.weight")
    state = load_state(folder)
    save_state(folder, {n: t[:16].contiguous() if local.fullmatch(n) else t for n, t in state.items()})


def test_grouped_cross_attention_is_read_head_by_head(folder: Path) -> None:
    group_heads(folder)
    source, state = open_source(folder), load_state(folder)
    assert source.blt is not None
    head = state["model.local_decoder.cross_attn_layers.1.v_proj.weight"]
    assert head.shape == (16, 32)
    assert torch.equal(rows(source.blt.weights["decoder.cross.1.wv.weight"]), torch.cat([head, head]))
    assert source.blt.weights["decoder.layers.1.attention.wv.weight"].shape == (16, 32)


def test_a_grouped_weight_that_is_not_finite_is_named_once(folder: Path) -> None:
    group_heads(folder)
    state = load_state(folder)
    state["model.local_encoder.cross_attn_layers.0.k_proj.weight"][3] = float("inf")
    save_state(folder, state)
    with pytest.raises(
        CheckpointError, match=r"weights in model\.local_encoder\.cross_attn_layers\.0\.k_proj\.weight;"
    ):
        load(folder)


def test_a_weight_that_is_not_finite(folder: Path) -> None:
    state = load_state(folder)
    state["model.patcher.norm.weight"][3] = float("nan")
    save_state(folder, state)
    with pytest.raises(CheckpointError, match=r"model\.patcher\.norm\.weight"):
        load(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_source(folder)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="copy it again"):
        open_source(folder)


def test_shards(folder: Path) -> None:
    whole = open_source(folder)
    shard(folder)
    for key, part in open_source(folder).models().items():
        for name, tensor in part.weights.items():
            assert tensor.shape == whole.models()[key].weights[name].shape
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors does not exist"):
        open_source(folder)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/hostname", "sub/a.safetensors", "..", "", "a\\b"])
def test_shards_outside_the_folder_are_refused(name: str, folder: Path) -> None:
    names = shard(folder)
    write_index(folder, names | {"lm_head.weight": name})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_source(folder)


def test_links_to_files_outside_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link to a file outside its folder"):
        open_source(folder)


def test_links_within_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub cache stores files as blobs/HASH, and the folder of a revision has links to them."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert open_source(snapshot).blt is not None


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index(index: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_source(folder)
