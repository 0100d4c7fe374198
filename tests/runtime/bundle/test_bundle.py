"""Bundles survive writing and reading, and every kind of damage raises one clear error quickly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from blt_runtime import Bundle, Model
from blt_runtime.backends.null import null_spec
from blt_runtime.bundle.bundle import is_bundle
from blt_runtime.bundle.manifest import Manifest
from blt_runtime.errors import BundleError, ManifestError, UsageError, VersionError
from blt_runtime.hashing import TableDtype
from tests.runtime.bundles import HASH, edit, hub_cache, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_manifest_survives_the_disk(folder: Path) -> None:
    written = write_bundle(folder)
    assert Bundle.open(folder).manifest == written
    assert Manifest.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_a_bundle_of_an_older_export_has_one_precision(folder: Path) -> None:
    write_bundle(folder)
    edit(folder, drop=["precisions", "judged"])
    manifest = Bundle.open(folder).manifest
    assert manifest.judged is None
    assert {manifest.precision_of(name) for name in manifest.graphs} == {"fp32"}
    edit(folder, precisions={"latent": "int8"})
    assert Bundle.open(folder).manifest.precision_of("latent") == "int8"


def test_a_bundle_without_a_table_type_holds_float32(folder: Path) -> None:
    spec = json.loads((folder / "manifest.json").read_text())["spec"]
    assert spec["hash"].pop("dtype") == "float32"
    edit(folder, spec=spec)
    assert Model.open(folder, backend="null").spec.hash == HASH


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_bundle_runs(tmp_path: Path, dtype: TableDtype) -> None:
    write_bundle(tmp_path / "b", dtype=dtype)
    model = Model.open(tmp_path / "b", backend="null")
    tables = model.hash_tables["encoder"]
    assert isinstance(tables, np.memmap)
    assert not tables.flags.writeable
    assert len(list(model.stream().generate_ids(30, temperature=0, stop_at_eos=False))) == 30
    whole = Model.open(write_float32(tmp_path), backend="null")
    ids = np.random.default_rng(2).integers(0, 260, 100)
    np.testing.assert_array_equal(model.score(ids).logits, whole.score(ids).logits)


def write_float32(folder: Path) -> Path:
    """The same tables: `write_bundle` draws small whole numbers, which every type holds exactly."""
    write_bundle(folder / "whole")
    return folder / "whole"


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes((folder / "latent.onnx").read_bytes())
    (folder / "latent.onnx").unlink()
    (folder / "latent.onnx").symlink_to("../elsewhere")


def link_blobs(blobs: str) -> Callable[[Path], None]:
    """A link that is almost one of a hub cache: to `blobs` next to the folder."""

    def damage(folder: Path) -> None:
        link(folder)
        (folder / "latent.onnx").unlink()
        target = folder.parent / blobs / "hash"
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / "elsewhere").rename(target)
        (folder / "latent.onnx").symlink_to(target)

    return damage


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere")
    (folder / "manifest.json").symlink_to("../elsewhere")


def truncate(folder: Path) -> None:
    os.truncate(folder / "encoder.onnx", 3)


def fifo(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    os.mkfifo(folder / "encoder.onnx")


def name_outside(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = dict(manifest["files"])
        files[name] = files.pop("entropy.onnx")
        edit(folder, files=files, graphs={**manifest["graphs"], "entropy": {"file": name}})

    return damage


def spec_with(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, spec={**json.loads((folder / "manifest.json").read_text())["spec"], **changes})


def spec_graph(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        spec = json.loads((folder / "manifest.json").read_text())["spec"]
        spec["graphs"]["encoder"].update(changes)
        edit(folder, spec=spec)

    return damage


def spec_tensor(**changes: object) -> Callable[[Path], None]:
    tensor = {"name": "ids", "dtype": "int64", "shape": ["B", "S"], **changes}
    return spec_graph(inputs=[tensor], aliases={})


def graph_without(graph: str, tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        spec = json.loads((folder / "manifest.json").read_text())["spec"]
        spec["graphs"][graph]["inputs"] = [t for t in spec["graphs"][graph]["inputs"] if t["name"] != tensor]
        edit(folder, spec=spec)

    return damage


def cache_with(graph: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        spec = json.loads((folder / "manifest.json").read_text())["spec"]
        spec["graphs"][graph]["cache"].update(changes)
        edit(folder, spec=spec)

    return damage


def hash_with(**changes: object) -> Callable[[Path], None]:
    hash = {"sizes": [3, 4], "functions": 1, "rows": 50, "dim": 4, **changes}
    return spec_with(hash=hash)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[BundleError], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), BundleError, "has no manifest.json"),
    "missing file": (lambda f: (f / "decoder.onnx").unlink(), BundleError, "decoder.onnx is missing"),
    "changed file": (replace("decoder.onnx", b"graph decodeR"), BundleError, "decoder.onnx was changed"),
    "truncated file": (truncate, BundleError, "3 bytes instead of"),
    "link": (link, BundleError, "is a link"),
    "link to blobs of no cache": (link_blobs("blobs"), BundleError, "is a link"),
    "link of the manifest": (link_manifest, BundleError, "manifest.json in"),
    "unlisted link": (
        lambda f: (f / "weights").symlink_to("/etc/passwd"),
        BundleError,
        "weights in",
    ),
    "pipe": (fifo, BundleError, "not a plain file"),
    "parent": (name_outside("../entropy.onnx"), ManifestError, "not a plain file name"),
    "absolute": (name_outside("/etc/passwd"), ManifestError, "not a plain file name"),
    "backslash": (name_outside("..\\entropy.onnx"), ManifestError, "not a plain file name"),
    "dots": (name_outside(".."), ManifestError, "not a plain file name"),
    "itself": (name_outside("manifest.json"), ManifestError, "not a plain file name"),
    "newer": (lambda f: edit(f, version=99, surprise=1), VersionError, "upgrade"),
    "no version": (lambda f: edit(f, drop=["version"]), ManifestError, "version number"),
    "other format": (lambda f: edit(f, format="gguf"), ManifestError, "blt-bundle"),
    "broken JSON": (replace("manifest.json", b'{"format": '), ManifestError, "not valid JSON"),
    "no text": (replace("manifest.json", b"\xff\xfe\x00"), ManifestError, "not valid JSON"),
    "deep JSON": (replace("manifest.json", b"[" * 200_000), ManifestError, "not valid JSON"),
    "no object": (replace("manifest.json", b"[1]"), ManifestError, "must hold an object"),
    "unknown key": (lambda f: edit(f, flavor="ort"), ManifestError, "did you mean 'flavour'"),
    "missing key": (lambda f: edit(f, drop=["spec"]), ManifestError, "lacks the key 'spec'"),
    "wrong type": (lambda f: edit(f, opset="24"), ManifestError, "opset must be int"),
    "wrong choice": (lambda f: edit(f, flavour="fast"), ManifestError, "'ort' or 'cuda' or 'portable'"),
    "unlisted file": (lambda f: edit(f, files={}), ManifestError, "does not list"),
    "no tables": (lambda f: edit(f, hash_tables=None), ManifestError, "hash"),
    "precision of no graph": (
        lambda f: edit(f, precisions={"encode": "int8"}),
        ManifestError,
        "'precisions'",
    ),
    "other graphs": (
        lambda f: edit(f, graphs={"encoder": {"file": "encoder.onnx"}}),
        ManifestError,
        "different graphs",
    ),
    "unknown spec key": (spec_with(chunks=3), ManifestError, "did you mean 'chunk'"),
    "bad capacity": (spec_with(capacity_bytes=0), ManifestError, "capacity_bytes must be at least 1"),
    "bad graph": (spec_graph(name="other"), ManifestError, "is listed as 'encoder'"),
    "bad dtype": (spec_tensor(dtype="float99"), ManifestError, "float99"),
    "two letters": (spec_tensor(shape=["B", "SN"]), ManifestError, "'SN'"),
    "no letter": (spec_tensor(shape=["B", ""]), ManifestError, "size ''"),
    "negative hash size": (hash_with(sizes=[3, -1]), ManifestError, "hash sizes"),
    "huge hash size": (hash_with(sizes=[3, 1 << 40]), ManifestError, "hash sizes"),
    "no hash size": (hash_with(sizes=[]), ManifestError, "hash sizes"),
    "many hash functions": (hash_with(functions=12), ManifestError, "1 to 11 functions"),
    "no hash rows": (hash_with(rows=0), ManifestError, "rows of at least 1"),
    "other table type": (hash_with(dtype="float16"), BundleError, "float32 by rows, but float16 tables are float16"),
    "unknown table type": (hash_with(dtype="float8"), ManifestError, "'float16' or 'bfloat16'"),
    "other hash width": (hash_with(dim=5), ManifestError, "'hash_embedding' has the shape"),
    "no positions": (graph_without("latent", "positions"), ManifestError, "'latent' lacks the input 'positions'"),
    "no cache input": (graph_without("latent", "past_key.0"), ManifestError, "lacks 'present_key.0' or its alias"),
    "own_start missing": (spec_with(encoder_window=2), ManifestError, "lacks the input 'own_start'"),
    "other decoder window": (spec_with(decoder_window=3), ManifestError, "'patch_row' has the shape"),
    "other vocabulary": (spec_with(vocab_size=300), ManifestError, "'logits' has the shape"),
    "no cache": (spec_graph(cache=None), ManifestError, "must have 'cache' and cache tensors, or neither"),
    "other capacity": (cache_with("encoder", capacity=99), ManifestError, "'past_key.0' must be [B, heads, 99"),
    "no window": (cache_with("encoder", window=0), ManifestError, "capacity, window and layers"),
    "short linear cache": (
        cache_with("encoder", kind="linear"),
        ManifestError,
        "a linear cache of 16 is below capacity_bytes 512",
    ),
    "short latent cache": (
        spec_with(capacity_patches=300),
        ManifestError,
        "a linear cache of 256 is below capacity_patches 300",
    ),
    "huge chunk": (spec_with(chunk=1 << 40), ManifestError, "more than capacity_bytes 512"),
    "bad letter": (spec_tensor(shape=["B", "Z"]), ManifestError, "'Z'"),
    "bad rule": (spec_with(patch_rule={"scheme": "entropy"}), ManifestError, "threshold"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_quick_line(folder: Path, kind: str) -> None:
    damage, error_type, message = DAMAGE[kind]
    damage(folder)
    start = time.thread_time()  # not wall time: other tests may run at the same time
    with pytest.raises(error_type) as error:
        Model.open(folder, backend="null")
    assert time.thread_time() - start < 1
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inside", ["", "bundles/small"])
def test_a_bundle_in_a_hub_cache_opens(folder: Path, inside: str) -> None:
    snapshot = hub_cache(folder, inside)
    assert is_bundle(snapshot)
    assert Model.open(snapshot, backend="null", verify="full").stream().position == 1


@pytest.mark.parametrize("target", ["/etc/passwd", "../../blobs/../outside", "../../blobs/link", "../../blobs/folder"])
def test_other_links_in_a_hub_cache_are_refused(folder: Path, target: str) -> None:
    snapshot = hub_cache(folder)
    blobs = snapshot.parent.parent / "blobs"
    (blobs.parent / "outside").write_text("x")
    (blobs / "link").symlink_to("/etc/passwd")
    (blobs / "folder").mkdir()
    (snapshot / "extra").symlink_to(target)
    with pytest.raises(BundleError, match=r"extra in .* is a link"):
        Bundle.open(snapshot)


def test_a_blobs_folder_that_is_a_link_is_refused(folder: Path) -> None:
    snapshot = hub_cache(folder)
    repository = snapshot.parent.parent
    (repository / "blobs").rename(folder.parent / "elsewhere")
    (repository / "blobs").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(snapshot)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".DS_Store", "._latent.onnx", "Thumbs.db", ".nfs0001"])
def test_files_that_the_manifest_does_not_list_are_ignored(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    assert Bundle.open(folder, verify="full")


def test_a_manifest_tells_a_bundle_from_other_folders(folder: Path, tmp_path: Path) -> None:
    assert is_bundle(folder)
    edit(folder, version=99)
    assert is_bundle(folder)
    edit(folder, format="blt-data")
    assert not is_bundle(folder)
    assert not is_bundle(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(BundleError, match="it is a file"):
        Bundle.open(tmp_path / "model.pt")


def retable(folder: Path, content: object) -> None:
    np.save(folder / "hash_tables.npy", cast(Any, content), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    size = (folder / "hash_tables.npy").stat().st_size
    edit(folder, files={**manifest["files"], "hash_tables.npy": {"bytes": size, "sha256": ""}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4), np.float32), "shape"),
        (np.zeros((100, 4), np.float64), "float64"),
        (np.zeros((100, 4), np.uint16), "uint16"),
        (np.zeros((100, 4), ">f4"), ">f4"),
        (np.zeros((100, 4), np.float32, order="F"), "by columns"),
        (np.array([{"a": 1}], dtype=object), "not an array file"),
    ],
)
def test_bad_tables(folder: Path, content: object, message: str) -> None:
    retable(folder, content)
    with pytest.raises(BundleError, match=message):
        Model.open(folder, backend="null", verify="sizes")


def test_verify_levels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace("decoder.onnx", b"graph decodeR")(folder)
    Bundle.open(folder, verify="sizes")
    monkeypatch.setattr("blt_runtime.bundle.bundle.HASH_WHOLE_BUNDLE", 10)
    monkeypatch.setattr("blt_runtime.bundle.bundle.HASH_FILE", 12)
    Bundle.open(folder, verify="auto")
    with pytest.raises(BundleError, match="changed"):
        Bundle.open(folder, verify="full")
    with pytest.raises(UsageError, match="verify"):
        Bundle.open(folder, verify="maybe")  # type: ignore[arg-type]


def test_unknown_backend(folder: Path) -> None:
    with pytest.raises(UsageError, match="onnx, null"):
        Model.open(folder, backend="tpu")


@pytest.mark.parametrize("backend", ["null", "onnx"])
@pytest.mark.parametrize("threads", [0, 2.5, True])
def test_bad_threads(folder: Path, backend: str, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        Model.open(folder, backend=backend, threads=threads)


def test_manifest_without_hash(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", null_spec())
    assert Bundle.open(tmp_path / "b").hash_tables() == {}
