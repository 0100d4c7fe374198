"""Checkpoints: saving and loading gives the same model, and every damaged or foreign file is one clear error."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint.models import Checkpoint, load, save
from blt.model import BLT, EntropyConfig, EntropyModel, HashConfig
from blt_runtime.errors import CheckpointError
from blt_runtime.patching import PatchRule
from tests.tiny import PLAIN, random_checkpoint, tiny


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    save(tmp_path / "model.pt", tiny())
    return tmp_path / "model.pt"


@pytest.mark.parametrize("variant", ["plain", "hash_entropy_without_layers"])
def test_round_trip(variant: str, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny(variant))
    before, after = tiny(variant), load(tmp_path / "model.pt", trainable=True)
    assert after.patch_rule == before.patch_rule
    assert before.blt is not None
    assert before.entropy is not None
    assert after.blt is not None
    assert after.entropy is not None
    for one, other in ((before.blt, after.blt), (before.entropy, after.entropy)):
        assert one.config == other.config
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_only_what_earlier_releases_cannot_read_has_a_new_version(tmp_path: Path) -> None:
    found = {}
    for variant in ("plain", "hash_entropy", "hash_entropy_without_layers"):
        save(tmp_path / "model.pt", tiny(variant))
        content = torch.load(tmp_path / "model.pt", weights_only=True)
        found[variant] = content["version"], "hash" in content["config"]["entropy"]
    assert found == {"plain": (1, False), "hash_entropy": (2, True), "hash_entropy_without_layers": (2, True)}


def test_a_folder_is_read_as_its_model_file(model_file: Path) -> None:
    assert load(model_file.parent).patch_rule == load(model_file).patch_rule


def test_half_precision_file_loads_as_float32(tmp_path: Path) -> None:
    save(tmp_path / "half.pt", tiny(), dtype=torch.float16)
    blt = load(tmp_path / "half.pt").blt
    assert blt is not None
    assert {p.dtype for p in blt.parameters()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_loaded_model_keeps_its_tables(copied: Callable[[BLT], BLT], tmp_path: Path) -> None:
    """Pages of a file may be dropped after each read; those of a copy in memory hold its content."""
    hashed = PLAIN.model_copy(update={"hash": HashConfig(sizes=(3, 4), rows=2003)})  # tables of many pages
    save(tmp_path / "model.pt", random_checkpoint(hashed, PatchRule("space")))
    model = load(tmp_path / "model.pt").blt
    assert model is not None
    assert model.hash_embedding is not None
    twin = copied(model).hash_embedding
    assert twin is not None
    ids = torch.arange(4, 260)[None]
    for _ in range(2):
        assert torch.equal(twin(ids), model.hash_embedding(ids))


def test_folders_without_a_checkpoint_are_one_clear_error(tmp_path: Path) -> None:
    for name, text in (
        ("llama", '{"model_type": "llama"}'),
        ("released/blt_1b", None),
        ("released/entropy_model", None),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ("params.json" if text is None else "config.json")).write_text(text or "{}")
    (tmp_path / "released" / "README.md").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"config\.json has neither .* another model"):
        load(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"a folder that contains blt_1b, entropy_model; give one of them"):
        load(tmp_path / "released")


def test_entropy_model_alone(tmp_path: Path) -> None:
    save(tmp_path / "entropy.pt", Checkpoint(None, tiny().entropy, None))
    alone = load(tmp_path / "entropy.pt")
    with pytest.raises(CheckpointError, match="entropy model only"):
        alone.require_blt()


def test_an_entropy_model_may_have_rows_shorter_than_its_window(tmp_path: Path) -> None:
    """Like one trained with `max_seqlen: 256` and the default window."""
    config = EntropyConfig(dim=16, n_layers=1, n_heads=2, max_seqlen=256)
    assert config.window == 512
    save(tmp_path / "entropy.pt", Checkpoint(None, EntropyModel(config), None))
    loaded = load(tmp_path / "entropy.pt").entropy
    assert loaded is not None
    assert loaded.config == config


def test_save_leaves_nothing_half_written(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = model_file.read_bytes()

    def full_disk(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(model_file, tiny())
    assert model_file.read_bytes() == content
    assert [path.name for path in model_file.parent.iterdir()] == ["model.pt"]


class Foreign:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("echo pwned",)


def _foreign_zip(path: Path) -> None:
    torch.save({"format": "blt-model", "x": Foreign()}, path)


def _foreign_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Foreign(), protocol=2))


def _noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def _truncated(path: Path) -> None:
    save(path, tiny())
    path.write_bytes(path.read_bytes()[:-5000])


def _not_ours(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def _edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save(path, tiny())
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return make


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "noise": (_noise, "not a PyTorch checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a PyTorch checkpoint"),
    "truncated": (_truncated, "truncated"),
    "foreign global": (_foreign_zip, "other than tensors"),
    "foreign global, plain pickle": (_foreign_pickle, "other than tensors"),
    "other content": (_not_ours, "not a blt-model file"),
    "newer": (_edited(lambda c: c.update(version=99)), "version 99.*upgrade"),
    "unknown key": (_edited(lambda c: c["config"]["blt"].update(cros_k=2)), "cros_k"),
    "sizes that do not divide": (_edited(lambda c: c["config"]["blt"]["encoder"].update(n_heads=5)), "not divisible"),
    "missing tensor": (_edited(lambda c: c["blt"].pop("decoder.norm.weight")), "missing decoder.norm.weight"),
    "misshapen tensor": (
        _edited(lambda c: c["blt"].update({"decoder.norm.weight": torch.ones(3)})),
        r"decoder.norm.weight is \(3,\), expected \(32,\)",
    ),
    "bad rule": (_edited(lambda c: c["config"]["patch_rule"].update(treshold=1)), "threshold"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_clear_error(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = BAD_FILES[name]
    make(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    assert "pwned" not in capfd.readouterr().out


def test_missing_path() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load("nowhere/model.pt")


@pytest.fixture
def facebook_folder(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(golden / "a", tmp_path / "a", ignore=shutil.ignore_patterns("cases*", "hf"))
    return tmp_path / "a" / "blt"


def edit_params(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    params = json.loads((folder / "params.json").read_text())
    change(params)
    (folder / "params.json").write_text(json.dumps(params))


def test_the_entropy_model_of_a_facebook_folder_is_found(facebook_folder: Path) -> None:
    assert load(facebook_folder).entropy is not None
    shutil.move(facebook_folder.parent / "entropy_model", facebook_folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="--entropy-model"):
        load(facebook_folder).require_blt()
    assert load(facebook_folder, facebook_folder.parent / "elsewhere").entropy is not None


def test_facebook_format_errors(facebook_folder: Path) -> None:
    edit_params(facebook_folder, lambda p: p["model"].update(n_layers_local_decoder=4))
    with pytest.raises(CheckpointError, match=r"missing .*local_decoder\.layers\.3\.attention\.wq\.weight"):
        load(facebook_folder)
    edit_params(facebook_folder, lambda p: p["model"].update(n_layers_local_decoder=3, use_rope=False))
    with pytest.raises(CheckpointError, match="use_rope"):
        load(facebook_folder)
    (facebook_folder / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json"):
        load(facebook_folder)


def test_what_generation_needs_is_checked_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny()
    save(tmp_path / "alone.pt", Checkpoint(checkpoint.blt, None, checkpoint.patch_rule))
    save(tmp_path / "entropy.pt", Checkpoint(None, checkpoint.entropy, None))
    monkeypatch.setattr("blt.checkpoint.source.Source.check_finite", lambda self: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="--entropy-model"):
        load(tmp_path / "alone.pt", generates=True)
    with pytest.raises(CheckpointError, match="entropy model only"):
        load(tmp_path / "entropy.pt", generates=True)


@pytest.mark.parametrize(
    ("key", "value"), [("max_seqlen", 10**15), ("norm_eps", float("inf")), ("rope_theta", float("inf"))]
)
def test_absurd_numbers_are_refused_before_memory_is_allocated(tmp_path: Path, key: str, value: float) -> None:
    _edited(lambda c: c["config"]["entropy"].update({key: value}))(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=key):
        load(tmp_path / "bad.pt")
