"""`blt convert`: every format into ours and Hugging Face's, bit by bit. What a format cannot express is an error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blt.checkpoint.formats import open_source
from blt.checkpoint.models import load, save
from tests.checkpoint.facebook import Form, write_facebook
from tests.cli.calls import Result
from tests.tiny import tiny

pytest.importorskip("safetensors")

Call = Callable[..., Result]


@pytest.fixture(name="blt")
def blt_with_code(blt: Callable[..., Result]) -> Call:
    """`blt(..., code=2)`: the command ends with that exit code."""

    def call(*arguments: object, code: int = 0) -> Result:
        result = blt(*arguments)
        assert result.code == code, result.err
        return result

    return call


@pytest.fixture
def native(tmp_path: Path) -> Path:
    save(tmp_path / "model.pt", tiny())
    return tmp_path / "model.pt"


def same_weights(one: Path, other: Path) -> None:
    for left, right in zip(open_source(one).models().values(), open_source(other).models().values(), strict=True):
        assert left.weights.keys() == right.weights.keys()
        for name, tensor in left.weights.items():
            assert tensor.dtype == right.weights[name].dtype
            assert all(torch.equal(a, b) for a, b in zip(tensor.blocks(), right.weights[name].blocks(), strict=True))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_round_trip_gives_the_same_file(blt: Call, native: Path, tmp_path: Path, dtype: str | None) -> None:
    if dtype is not None:
        blt("convert", native, "-o", tmp_path / "narrow.pt", "--to", "native", "--dtype", dtype)
        native = tmp_path / "narrow.pt"
        assert {t.dtype for part in open_source(native).models().values() for t in part.weights.values()} == {
            torch.bfloat16
        }
    blt("convert", native, "-o", tmp_path / "hf", "--to", "hf")
    blt("convert", tmp_path / "hf", "-o", tmp_path / "back", "--to", "native")
    same_weights(native, tmp_path / "back")
    assert load(tmp_path / "back").patch_rule == load(native).patch_rule
    blt("convert", tmp_path / "hf", "-o", tmp_path / "again", "--to", "native")
    assert (tmp_path / "again" / "model.pt").read_bytes() == (tmp_path / "back" / "model.pt").read_bytes()


def test_every_format_becomes_the_same_native_file(blt: Call, tmp_path: Path) -> None:
    """Split tables, a fused one, pickles and safetensors: one model, one file, from every format."""
    forms: tuple[Form, ...] = ("training", "hub")
    for form in forms:
        (tmp_path / form).mkdir()
        write_facebook(tmp_path / form, tiny("bytes_no_window"), form)
        blt("convert", tmp_path / form / "blt", "-o", tmp_path / f"{form}.pt", "--to", "native")
    blt("convert", tmp_path / "hub" / "blt", "-o", tmp_path / "hf", "--to", "hf")
    blt("convert", tmp_path / "hf", "-o", tmp_path / "hf.pt", "--to", "native")
    config = open_source(tmp_path / "training.pt").blt_config
    assert config is not None
    assert config.hash is not None
    assert (tmp_path / "training.pt").read_bytes() == (tmp_path / "hub.pt").read_bytes()
    assert (tmp_path / "training.pt").read_bytes() == (tmp_path / "hf.pt").read_bytes()


def test_the_report(blt: Call, native: Path, tmp_path: Path) -> None:
    report = json.loads(blt("convert", native, "-o", tmp_path / "hf", "--to", "hf", "--json").text)
    assert (report["schema"], report["from"], report["to"]) == ("blt.convert/1", "native", "hf")
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())


def test_an_existing_target_is_replaced_only_with_force(blt: Call, native: Path, tmp_path: Path) -> None:
    again = ("convert", native, "-o", tmp_path / "hf", "--to", "hf")
    blt(*again)
    assert "exists" in blt(*again, code=2).err
    blt(*again, "--force")
    before = native.read_bytes()
    assert "exists" in blt("convert", native, "-o", native, "--to", "native", code=2).err
    blt("convert", native, "-o", native, "--to", "native", "--force")
    assert native.read_bytes() == before


def test_files_of_a_killed_process_do_not_matter_and_a_link_stays(blt: Call, native: Path, tmp_path: Path) -> None:
    left = tmp_path / f".hf.{os.getpid()}.part"
    left.mkdir()
    (left / "config.json").write_text("half")
    blt("convert", native, "-o", tmp_path / "hf", "--to", "hf")
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    blt("convert", native, "-o", tmp_path / "link", "--to", "hf", "--force")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "link", "model.pt"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("to", ["hf", "native"])
def test_force_replaces_no_foreign_folder_and_no_file_by_a_folder(
    blt: Call, native: Path, to: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    for file in (tmp_path / "thesis" / "config.json", tmp_path / "notes", tmp_path / "thesis.pt" / "x"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for out in ["notes", "thesis"] if to == "hf" else ["notes", "thesis.pt"]:
        error = blt("convert", native, "-o", tmp_path / out, "--to", to, "--force", code=2).err
        assert f"{out}: this is a" in error or f"{out} is no Hugging Face folder" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("variant", ["max_patch_length", "cross_windows_own_heads_newlines", "static"])
def test_an_error_names_what_transformers_cannot_express(blt: Call, variant: str, tmp_path: Path) -> None:
    checkpoint = tiny(variant)
    assert checkpoint.blt is not None
    with torch.no_grad():
        checkpoint.blt.decoder.norm.weight[0] = float("nan")  # found only when all weights are read
    save(tmp_path / "model.pt", checkpoint)
    error = blt("convert", tmp_path / "model.pt", "-o", tmp_path / "hf", "--to", "hf", code=1).err
    part = {"max_patch_length": "max_patch_length 3", "static": "patch scheme 'static'"}.get(variant, "threshold_add")
    assert part in error
    assert not re.search(r"\bD\d+\b", error)  # a number of docs/spec.md
    assert not (tmp_path / "hf").exists()


def test_weights_that_are_not_finite_are_not_converted(blt: Call, tmp_path: Path) -> None:
    checkpoint = tiny()
    assert checkpoint.blt is not None
    with torch.no_grad():
        checkpoint.blt.decoder.norm.weight[3] = float("nan")
    save(tmp_path / "model.pt", checkpoint)
    error = blt("convert", tmp_path / "model.pt", "-o", tmp_path / "out", "--to", "native", code=1).err
    assert "NaN or infinite weights in decoder.norm.weight" in error
    assert not (tmp_path / "out").exists()


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A conversion that receives SIGTERM removes what it wrote and exits with 143."""
    script = (
        "import os, signal, sys, time\n"
        "import blt.cli, blt.checkpoint.tensors\n"
        "blocks = blt.checkpoint.tensors.StoredTensor.blocks\n"
        "def slow(self):\n"
        "    yield from blocks(self)\n"
        "    if len(os.listdir(sys.argv[-3])) > 0: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "blt.checkpoint.tensors.StoredTensor.blocks = slow\n"
        "blt.cli.main()\n"
    )
    save(tmp_path / "model.pt", tiny())
    (tmp_path / "out").mkdir()
    arguments = ["convert", tmp_path / "model.pt", "-o", tmp_path / "out", "--to", "native"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
    )
    assert done.returncode == 143, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
