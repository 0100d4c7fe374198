"""Hugging Face folders against the package that they are for: the same numbers in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint import huggingface, native
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import Checkpoint, load
from blt.generate import reference
from blt.generate.torch_backend import open_model
from blt.model.config import HashConfig
from blt_runtime.ids import EOS
from blt_runtime.patching import PatchRule
from tests.checkpoint import live
from tests.tiny import BY_ENTROPY, PLAIN, WINDOW, random_checkpoint, stack

safetensors = pytest.importorskip("safetensors.torch", reason="the format: pip install safetensors")


@pytest.fixture(scope="module", params=list(live.SHAPES))
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model and the folder it was saved in."""
    model = live.make(request.param)
    return model, live.save(model, tmp_path_factory.mktemp("peer") / request.param)


def test_their_models_compute_the_same_in_this_project(peer: tuple[Any, Path]) -> None:
    model, folder = peer
    checkpoint = load(folder)
    assert (checkpoint.entropy is None) == (model.model.patcher is None)
    for ids in (live.text(), *live.prompts(), [1, 5]):
        assert live.largest_error(live.theirs(model, ids), live.ours(checkpoint, ids)) < live.TOLERANCE


def test_their_models_generate_the_same_greedy_text_in_this_project(peer: tuple[Any, Path]) -> None:
    model, folder = peer
    stream = open_model(folder, capacity=64).stream(bos=False)
    compared = 0
    for ids in live.prompts():
        stream.reset()
        stream.append_ids(ids)
        expected = live.up_to_eos(live.greedy(model, ids, 20))
        assert list(stream.generate_ids(len(expected), temperature=0, stop_at_eos=False)) == expected
        compared += len(expected)
    assert compared > 30


def test_a_round_trip_is_bit_identical(peer: tuple[Any, Path], tmp_path: Path) -> None:
    """By way of our model.pt; transformers finds every tensor and computes the same numbers."""
    model, folder = peer
    native.write(open_source(folder), tmp_path / "model.pt")
    huggingface.write(open_source(tmp_path / "model.pt"), tmp_path / "again")
    again = live.open_theirs(tmp_path / "again")
    assert live.largest_error(live.theirs(model, live.text()), live.theirs(again, live.text())) < live.TOLERANCE
    old, new = (
        safetensors.load_file(folder / "model.safetensors"),
        safetensors.load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert old.keys() == new.keys()
    grouped = {name for name in old if old[name].shape != new[name].shape}
    kv = {name for name in old if "local_" in name and name.endswith(("k_proj.weight", "v_proj.weight"))}
    assert grouped <= kv  # grouped heads of a local stack are written ungrouped
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - grouped)


OURS = {
    "plain": (PLAIN, BY_ENTROPY),
    "local_gqa_projection_k3": (
        PLAIN.model_copy(
            update={
                "encoder": stack(32, 2, 4, n_kv_heads=2, window=WINDOW),
                "latent": stack(48, 2, 4, n_kv_heads=1, rope_theta=1e4, norm_eps=1e-3),
                "decoder": stack(32, 2, 4, n_kv_heads=1, window=WINDOW, ffn_dim=None),
                "cross_k": 3,
                "decoder_cross_all_layers": False,
                "hash": HashConfig(sizes=(1, 2, 8), rows=1009, functions=3),
            }
        ),
        BY_ENTROPY,
    ),
    "no_tables_no_window_k4": (
        PLAIN.model_copy(
            update={"encoder": stack(32, 3, 2), "decoder": stack(32, 1, 2), "cross_k": 4, "hash": None}
        ),
        BY_ENTROPY,
    ),
    "bytes": (PLAIN.model_copy(update={"cross_k": 1, "encoder_cross_all_layers": True}), PatchRule("byte")),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(OURS))
def own(request: pytest.FixtureRequest) -> Checkpoint:
    checkpoint = random_checkpoint(*OURS[request.param])
    for i, model in enumerate((checkpoint.blt, checkpoint.entropy)):
        if model is not None:
            live.random_norms(model, i)
    if checkpoint.patch_rule is not None and checkpoint.entropy is not None:
        values = live.ours(checkpoint, live.text()).entropies
        assert values is not None
        checkpoint = replace(checkpoint, patch_rule=replace(BY_ENTROPY, threshold=live.middle_of_gap(values)))
    return checkpoint


def write(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> Path:
    huggingface.write(checkpoint.to_source(Path("memory")), folder, dtype)
    return folder


def test_our_models_compute_the_same_in_transformers(own: Checkpoint, tmp_path: Path) -> None:
    model = live.open_theirs(write(own, tmp_path / "hf"))
    for ids in (live.text(), *live.prompts()):
        assert live.largest_error(live.theirs(model, ids), live.ours(own, ids)) < live.TOLERANCE
    for ids in live.prompts():
        expected = live.up_to_eos(reference.generate(own, ids, 12))
        assert live.greedy(model, ids, len(expected)) == expected
        out = model.generate(torch.tensor([ids]), max_new_tokens=len(expected), do_sample=False)  # without its cache
        assert out[0, len(ids) :].tolist() == expected


def test_shards(tmp_path: Path) -> None:
    model = live.make("plain")
    folder = live.save(model, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    assert live.largest_error(live.theirs(model, live.text()), live.ours(load(folder), live.text())) < live.TOLERANCE


SWAPS = {
    "two hash tables": "model.encoder_hash_tok_embedding.weight",
    "w1 and w3": "model.local_encoder.layers.0.mlp.{gate,up}_proj.weight",
    "keys and values": "model.global_transformer.layers.1.self_attn.{k,v}_proj.weight",
    "norms of a layer": "model.local_decoder.layers.1.{input,post_attention}_layernorm.weight",
    "norms of a cross-attention": "model.local_decoder.cross_attn_layers.0.{q,k}_norm.weight",
    "patch projections of the layers": "model.local_{encoder,decoder}.patch_embedding_projection.weight",
    "layers of the patcher": "model.patcher.layers.{0,1}.mlp.up_proj.weight",
}


@pytest.mark.parametrize("what", SWAPS)
def test_a_swapped_pair_of_weights_is_found(what: str, tmp_path: Path) -> None:
    """The comparisons above can fail: each swap moves logits or entropies by more than a thousand tolerances."""
    # 32 x 64 and 64 x 64 projections cannot be swapped, so the latent transformer has the width of a slice
    shape = live.config(live.local(32, 1, 2), live.local(32, 2, 4), live.local(32, 2, 2), k=2)
    live.SHAPES["narrow"] = shape
    model = live.make("narrow")
    folder = live.save(model, tmp_path / "swapped")
    expected = live.theirs(model, live.text())
    state = safetensors.load_file(folder / "model.safetensors")
    swap(state, SWAPS[what])
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = live.ours(load(folder), live.text())
    assert found.entropies is not None
    assert expected.entropies is not None
    error = max(np.abs(found.logits - expected.logits).max(), np.abs(found.entropies - expected.entropies).max())
    assert error > 1000 * live.TOLERANCE


def swap(state: dict[str, torch.Tensor], pattern: str) -> None:
    if "{" not in pattern:
        first, second, *rest = state[pattern].chunk(3)
        state[pattern] = torch.cat([second, first, *rest])
        return
    head, (a, b), tail = pattern.split("{")[0], pattern.split("{")[1].split("}")[0].split(","), pattern.split("}")[1]
    names = head + a + tail, head + b + tail
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]


def test_the_two_differ_only_after_an_eos(tmp_path: Path) -> None:
    """D2: facebookresearch/blt masks documents, transformers does not."""
    model = live.make("plain")
    checkpoint = load(live.save(model, tmp_path / "hf"))
    ids = live.text()[:60]
    ids[30] = EOS
    a, b = live.theirs(model, ids), live.ours(checkpoint, ids)
    assert a.entropies is not None
    assert b.entropies is not None
    assert np.abs(a.logits - b.logits)[:31].max() < live.TOLERANCE
    assert np.abs(a.entropies - b.entropies)[:31].max() < live.TOLERANCE
    assert np.abs(a.entropies - b.entropies)[31:].max() > 0.01
    assert np.abs(a.logits - b.logits)[31:].max() > 0.1


@pytest.mark.parametrize("case", ["ascii", "code", "long"])
def test_the_golden_facebook_checkpoint_runs_in_transformers(case: str, golden: Path, tmp_path: Path) -> None:
    """Facebook format to Hugging Face: transformers computes the logits of facebookresearch/blt."""
    huggingface.write(open_source(golden / "a" / "blt"), tmp_path / "hf")
    with np.load(golden / "a" / "cases.npz") as arrays:
        expected = {name: arrays[f"{case}/{name}"] for name in ("tokens", "logit_positions", "patch_lengths", "logits")}
    found = live.theirs(live.open_theirs(tmp_path / "hf"), expected["tokens"].tolist())
    assert found.lengths == expected["patch_lengths"].tolist()
    np.testing.assert_allclose(
        found.logits[expected["logit_positions"]], expected["logits"], atol=live.TOLERANCE, rtol=0
    )
