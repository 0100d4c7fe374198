"""The model card: metadata that the hub's library reads, numbers with their source, and nothing that breaks a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blt.data import dataset
from blt.share import card
from blt.share.facts import collect
from blt_runtime.backends.null import null_spec
from blt_runtime.bundle.manifest import Judged, Manifest
from blt_runtime.errors import UsageError
from tests.runtime.bundles import write_bundle

JUDGED = Judged(1000, 1.5, 1.625, 250, 3, 4)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_bundle(tmp_path / "bundle", null_spec())


def test_the_evaluation_of_a_bundle_is_in_the_card_and_its_metadata(manifest: Manifest, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    judged = Manifest(**{**vars(manifest), "judged": JUDGED, "precision": "int8"})
    text = card.render("owner/small", collect(tmp_path, None, judged, checkpoint=None), "mit")
    assert "| bundle, int8 | text given to the export | 1,000 | 1.6250 |" in text
    assert "| mean patch | 4.00 bytes |" in text
    read = hub.ModelCard(text)
    assert read.data.license == "mit"
    assert read.data.pipeline_tag == "text-generation"
    assert "onnx" in read.data.tags
    assert [result.metric_value for result in read.data.eval_results] == [1.5, 1.625]


def test_what_is_not_known_is_said(manifest: Manifest, tmp_path: Path) -> None:
    text = card.render("owner/small", collect(tmp_path, None, manifest, checkpoint=None))
    for line in ("Bits per byte were not measured.", "Not measured.", "The data was not recorded.", "No licence"):
        assert line in text
    assert "model-index" not in text
    assert "license" not in text.split("---")[1]


def data_manifest(groups: int) -> dict[str, Any]:
    counts = {f"group {i} <b>|": {"bytes": 1000 - i, "documents": 1} for i in range(groups)}
    shard = {"name": "train-0", "sha256": "ab" * 32, "bytes": 5, "documents": 1}
    return {"splits": {"train": {"bytes": 5, "documents": 1, "groups": counts, "shards": [shard]}}}


def test_long_lists_are_cut_and_names_cannot_leave_their_cell(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "read_manifest", lambda folder: data_manifest(25))
    text = card.render("owner/small", collect(tmp_path, None, manifest, checkpoint=None, data=tmp_path))
    assert "5 more groups are not listed." in text
    assert "| train | group 0 &#60;b&#62;&#124; | 1,000 |" in text
    assert "<b>" not in text
    assert "ab" * 32 in text


@pytest.mark.parametrize("given", ["", "mit\n", "mit license", "a: b", "-x", "x" * 65])
def test_a_licence_is_an_identifier(given: str) -> None:
    with pytest.raises(UsageError, match="give the identifier"):
        card.check_license(given)


def test_a_bench_file_of_another_kind_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    for content in ("[]", "{}", '{"schema": "blt.bench/1", "kind": "patch"}', "no JSON"):
        (tmp_path / "bench.json").write_text(content)
        with pytest.raises(UsageError, match="blt bench latency --json"):
            collect(tmp_path, None, manifest, checkpoint=None, bench=tmp_path / "bench.json")


def test_the_data_folder_of_a_run_is_found(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"data": {"path": "somewhere"}}')
    assert collect(tmp_path, None, manifest, checkpoint=None).data is None
    monkeypatch.setattr(dataset, "is_data_folder", lambda folder: str(folder) == "somewhere")
    monkeypatch.setattr(dataset, "read_manifest", lambda folder: data_manifest(1))
    assert collect(tmp_path, None, manifest, checkpoint=None).data == data_manifest(1)
