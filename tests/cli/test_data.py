"""`blt data corpus`, and the error of a shard that changed after it was prepared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt_runtime.errors import InputError

Call = Callable[..., Any]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "python"
    folder.mkdir()
    for name in ("abc", "ast", "csv", "json", "re"):
        (folder / f"{name}.py").write_text(f'"""About {name}: {"many words " * 30}"""\n{name} = 1\n' * 3)
    (folder / "LICENSE.txt").write_text("Free to use.\n" * 20)
    return folder


def test_a_named_corpus_is_a_data_folder(
    blt: Call, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt.data.corpora.tiny.sysconfig.get_path", lambda _: str(library))
    made = blt("data", "corpus", "tiny", "-o", tmp_path / "data", "--json")
    assert made.code == 0, made.err
    report = json.loads(made.text)
    assert report["schema"] == "blt.data/1"
    assert report["options"]["corpus"] == "tiny"
    assert report["options"]["files"] == ["abc.py", "ast.py", "csv.py", "json.py", "re.py", "LICENSE.txt"]
    assert report["splits"]["train"]["groups"]["licence.en"]["documents"] == 1
    assert min(report["splits"][name]["documents"] for name in ("train", "valid", "test")) > 0
    assert blt("data", "info", tmp_path / "data", "--verify").code == 0
    again = blt("data", "corpus", "tiny", "-o", tmp_path / "data")
    assert (again.code, again.out) == (2, b"")
    assert "--force" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["base"], "apt-get download"),
        (["base", "--debs", "nowhere"], "no such folder"),
        (["tiny", "--debs", "nowhere"], "--debs belongs to the corpus base"),
    ],
)
def test_wrong_corpora(blt: Call, tmp_path: Path, words: list[str], message: str) -> None:
    found = blt("data", "corpus", *words, "-o", tmp_path / "data")
    assert (found.code, found.out) == (2, b"")
    assert message in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_missing_packages_are_named(blt: Call, tmp_path: Path) -> None:
    found = blt("data", "corpus", "base", "--debs", tmp_path, "-o", tmp_path / "data")
    assert found.code == 2
    assert f"{tmp_path}: 49 of 49 packages are missing" in found.err
    assert "apt-get download anarchism=15.3-3 " in found.err


def test_a_changed_shard_stops_training_and_evaluation(blt: Call, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\0".join(b"some words %d" % i for i in range(300)))
    data = tmp_path / "data"
    assert blt("data", "prepare", tmp_path / "text.txt", "-o", data, "--split", "8/1/1").code == 0
    config = Path(__file__).resolve().parents[2] / "configs" / "tiny-entropy.yaml"
    for split in ("train", "test"):
        shard = data / f"{split}-00000.bin"
        shard.write_bytes(b"?" * shard.stat().st_size)
    trained = blt("train", "entropy", "-c", config, "--data", data, "-o", tmp_path / "run")
    evaluated = blt("eval", Path(__file__).resolve().parents[2] / "configs" / "demo" / "model.pt", data)
    for result, split in ((trained, "train"), (evaluated, "test")):
        assert (result.code, result.out) == (2, b"")
        assert f"{split}-00000.bin has changed since it was prepared; run `blt data prepare` again" in result.err


def test_many_files_print_one_line_per_folder(blt: Call, tmp_path: Path) -> None:
    for number in range(300):
        path = tmp_path / "in" / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {number}\n")
    made = blt("data", "prepare", tmp_path / "in", "-o", tmp_path / "data")
    assert made.code == 0, made.err
    assert len(made.text.splitlines()) < 15
    assert "part0" in made.text
    by_file = blt("data", "prepare", tmp_path / "in", "-o", tmp_path / "files", "--group-by", "file")
    assert "groups (blt data info --groups lists them)" in by_file.text
    assert len(by_file.text.splitlines()) < 50
    listed = blt("data", "info", tmp_path / "files", "--groups")
    assert len(listed.text.splitlines()) > 300


def test_one_tiny_document(blt: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.\n")
    made = blt("data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "data", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.text)["splits"]["train"]["documents"] == 1
    assert "no validation text: there is too little text" in made.err


def test_what_is_refused_is_one_line(blt: Call, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    refused = blt("data", "prepare", tmp_path, "-o", tmp_path.parent / "refused-data")
    assert refused.code == InputError.exit_code
    assert refused.err.startswith("blt: error: 40 of 40 files cannot be read as text: ")
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path.parent / "refused-data").exists()


def test_memory_is_a_size(blt: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.\n")
    wrong = blt("data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "data", "--max-memory", "lots")
    assert wrong.code == 2
    assert "--max-memory" in wrong.err
