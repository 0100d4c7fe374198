"""The facebook format: every variant scores the same from training and hub folders; a mismatch is one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint.formats import open_source
from blt.checkpoint.models import Checkpoint, build, load, save
from blt.generate import reference
from blt.generate.torch_backend import open_model
from blt.model import EntropyModel
from blt_runtime.errors import CheckpointError
from tests.checkpoint.facebook import Form, forced_window, write_facebook
from tests.tiny import ENTROPY, VARIANTS, hard_text, tiny

# The format has no newline resets, separate head counts or learned queries; it can represent everything else.
OWN = ("cross_windows_own_heads_newlines", "static", "hash_entropy", "hash_entropy_without_layers")
"""Variants with options that the format lacks."""
REPRESENTABLE = [name for name in VARIANTS if name not in OWN]


@pytest.mark.parametrize("form", ["training", "hub"])
@pytest.mark.parametrize("variant", REPRESENTABLE)
def test_every_variant_scores_the_same_from_the_facebook_format(variant: str, form: Form, tmp_path: Path) -> None:
    checkpoint = tiny(variant) if form == "hub" else forced_window(tiny(variant))
    blt, rule = checkpoint.require_blt()
    ids = hard_text()[:120].tolist()
    lengths = reference.lengths_of(checkpoint, ids)
    source = open_source(write_facebook(tmp_path, checkpoint, form))
    score = open_model(build(source)).stream().score_ids(ids)
    assert (source.format, source.patch_rule) == ("facebook-hub" if form == "hub" else "facebook", rule)
    assert score.patch_lengths.tolist() == lengths
    np.testing.assert_allclose(score.logits, reference.forward(blt, ids, lengths).logits, rtol=0, atol=2e-5)


def test_one_id_scores(tmp_path: Path) -> None:
    score = open_model(write_facebook(tmp_path, tiny()), capacity=1).stream(bos=False).score_ids([1])
    assert score.patch_lengths.tolist() == [1, 1]


def test_a_model_with_patch_in_forward(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny("no_hash_space_causal_latent"))
    edit(folder, lambda p: p["data"]["patcher_args"].update(patching_mode="entropy"))
    edit(folder, lambda p: p["model"].update(patch_in_forward=True, patching_mode="space"))
    rule = load(folder).patch_rule
    assert rule is not None
    assert rule.scheme == "space"
    edit(folder, lambda p: p["model"].update(patching_mode="entropy"))
    with pytest.raises(CheckpointError, match="patch_in_forward"):
        load(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    params = json.loads((folder / "params.json").read_text())
    change(params)
    (folder / "params.json").write_text(json.dumps(params))


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (lambda p: p["model"].pop("dim_global"), r"model\.dim_global: Field required"),
    "heads 0": (lambda p: p["model"].update(n_heads_global=0), r"model\.n_heads_global"),
    "heads do not divide": (lambda p: p["model"].update(n_heads_global=5), "do not divide into 5 heads"),
    "text for a number": (lambda p: p["model"].update(n_layers_global="2"), r"model\.n_layers_global.*'2'"),
    "sizes": (lambda p: p["model"].update(encoder_hash_byte_group_size="345"), "encoder_hash_byte_group_size"),
    "other mask": (lambda p: p["model"].update(attn_bias_type="local_block_causal"), "attn_bias_type"),
    "data is a list": (lambda p: p.update(data=[]), r"no section 'data\.patcher_args'"),
    "no threshold": (lambda p: p["data"]["patcher_args"].update(threshold=None), "threshold"),
    "no number": (lambda p: p["data"]["patcher_args"].update(threshold="high"), "threshold"),
    "unknown mode": (lambda p: p["data"]["patcher_args"].update(patching_mode="words"), "patching_mode"),
    "half a byte": (lambda p: p["data"]["patcher_args"].update(patching_mode="static"), r"whole patch_size, not 4\.5"),
    "more layers": (lambda p: p["model"].update(n_layers_global=3), r"missing .*global_transformer\.layers\.2"),
    "fewer layers": (lambda p: p["model"].update(n_layers_global=1), r"unknown .*global_transformer\.layers\.1"),
    "beyond all memory": (lambda p: p["model"].update(dim_global=10**18), "/blt: the configuration cannot be right"),
    "width": (
        lambda p: p["model"].update(encoder_hash_byte_group_vocab=98),
        r"encoder_hash_tok_embedding.0.weight is \(97, 32\), expected \(98, 32\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_are_one_clear_error(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    folder = write_facebook(tmp_path, tiny())
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_the_given_entropy_model_replaces_the_one_found(tmp_path: Path) -> None:
    checkpoint = tiny()
    folder = write_facebook(tmp_path, checkpoint)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load(folder, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no entropy model"):
        load(folder, _without_entropy(tmp_path))
    save(tmp_path / "own.pt", tiny(seed=1))
    own, replaced = tiny(seed=1).entropy, load(folder, tmp_path / "own.pt").entropy
    assert own is not None
    assert replaced is not None
    torch.testing.assert_close(replaced.state_dict(), own.state_dict())
    edit(folder.parent / "entropy_model", lambda p: p["entropy_model"].pop("dim"))
    with pytest.raises(CheckpointError, match=r"entropy_model\.dim: Field required"):
        load(folder)


def _without_entropy(folder: Path) -> Path:
    save(folder / "space.pt", tiny("no_hash_space_causal_latent"))
    return folder / "space.pt"


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 24), ("rope_theta", 500000.0), ("norm_eps", 1e-6)])
def test_arguments_that_facebooks_loader_ignores_are_an_error(name: str, value: float, tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    edit(tmp_path / "entropy_model", lambda p: p["entropy_model"].update({name: value}))
    with pytest.raises(CheckpointError, match=f"entropy model has {name} .*does not belong"):
        load(folder)


def test_an_entropy_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    other = EntropyModel(ENTROPY.model_copy(update={"vocab_size": 300}))
    save(tmp_path / "other.pt", Checkpoint(None, other, None))
    with pytest.raises(CheckpointError, match="entropy model has 300 ids, a byte-level model has 260"):
        load(folder, tmp_path / "other.pt")


def test_hub_format_without_train_args_has_no_threshold(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny(), "hub")
    (folder / "train_args.json").unlink()
    with pytest.raises(CheckpointError, match=r"no train_args\.json.*threshold"):
        load(folder)


def test_swapped_shapes_are_all_named(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    content = torch.load(folder / "consolidated.pth", weights_only=True)
    state = content["model"]
    names = ["local_encoder.patch_embedding_projection.weight", "local_decoder.output.weight"]
    for name in names:
        state[name] = state[name].T.contiguous()
    torch.save(content, folder / "consolidated.pth")
    with pytest.raises(CheckpointError, match=f"{names[0]} is .*; {names[1]} is "):
        load(folder)


def change_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    content = torch.load(folder / "consolidated.pth", weights_only=True)
    change(content["model"])
    torch.save(content, folder / "consolidated.pth")


FFN = "global_transformer.layers.0.feed_forward"


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_only_the_transposed_matrix_is_named(part: str, tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    change_state(folder, lambda state: state.update({f"{FFN}.{part}.weight": state[f"{FFN}.{part}.weight"].T}))
    with pytest.raises(CheckpointError, match=rf"do not fit the configuration: {FFN}\.{part}\.weight is [^;]*$"):
        load(folder)


def test_missing_matrices_that_define_a_width_are_listed_together(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    names = ["local_encoder.layers.0.attention.wq.weight", f"{FFN}.w1.weight"]
    change_state(folder, lambda state: [state.pop(name) for name in names])
    with pytest.raises(CheckpointError, match=f"missing {names[0]}; missing {names[1]}$"):
        load(folder)
    change_state(folder, lambda state: [state.pop(n) for n in list(state) if n.startswith("local_encoder.layers")])
    with pytest.raises(CheckpointError, match=rf"missing \(.*{names[0]}, local_encoder\.layers\.0\.attention\.wk"):
        load(folder)


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float8_e4m3fn, weights must be": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": torch.Tensor.to_sparse,
    "sparse or has no data": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("message", ODD)
def test_unsupported_tensors_are_refused(message: str, tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    change_state(folder, lambda state: state.update({f"{FFN}.w1.weight": ODD[message](state[f"{FFN}.w1.weight"])}))
    with pytest.raises(CheckpointError, match=rf"{FFN}\.w1\.weight is {message}"):
        load(folder)


def test_an_entropy_model_without_train_entropy_model(tmp_path: Path) -> None:
    """facebookresearch/blt's loader reads only the section `entropy_model`."""
    folder = write_facebook(tmp_path, tiny())
    edit(tmp_path / "entropy_model", lambda p: p.pop("train_entropy_model"))
    assert load(folder).entropy is not None


@pytest.mark.parametrize("args", [None, 5, []])
def test_args_that_are_not_an_object(args: object, tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny(), "hub")
    (folder / "config.json").write_text(json.dumps({"args": args}))
    with pytest.raises(CheckpointError, match=r"blt/config\.json has no section 'args'"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["encoder_hash_tok_embedding.1.weight", "global_transformer.layers.1.ffn_norm.weight"])
def test_weights_that_are_not_finite_are_named(name: str, bad: float, tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    content = torch.load(folder / "consolidated.pth", weights_only=True)
    content["model"][name].view(-1)[-1] = bad
    torch.save(content, folder / "consolidated.pth")
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}"):
        load(folder)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = write_facebook(tmp_path, tiny())
    content = torch.load(folder / "consolidated.pth", weights_only=True)
    content["model"]["local_decoder.norm.weight"] = torch.ones(32, dtype=torch.int8)
    torch.save(content, folder / "consolidated.pth")
    with pytest.raises(
        CheckpointError, match=r"local_decoder\.norm\.weight is int8, weights must be one of float32, float16"
    ):
        load(folder)
