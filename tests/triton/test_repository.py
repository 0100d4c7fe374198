"""The model repository that `blt export --triton` writes."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blt.triton import repository
from blt_runtime import Bundle
from blt_runtime.errors import BundleError, UsageError
from tests.runtime.bundles import hub_cache, write_bundle
from tests.triton import fake, pbtxt

Write = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return fake.bundle(tmp_path / "bundle")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_complete_without_the_bundle(bundle: Path, models: Path) -> None:
    (bundle / "README.md").write_text("not in the manifest")
    folder = repository.write(bundle, models, "demo")
    files = {f"1/bundle/{name}" for name in tree(bundle) - {"README.md"}}
    assert tree(models) == {f"demo/{name}" for name in files | {"config.pbtxt", "1/model.py"}}
    assert folder == models / "demo"
    Bundle.open(folder / "1/bundle", "full")


def test_a_bundle_in_the_hubs_cache_is_copied_as_files(bundle: Path, models: Path) -> None:
    folder = repository.write(hub_cache(bundle), models, "demo")
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    Bundle.open(folder / "1/bundle", "full")


def test_without_a_copy_the_configuration_names_the_bundle(bundle: Path, models: Path) -> None:
    folder = repository.write(bundle, models, "demo", copy=False)
    assert tree(folder) == {"config.pbtxt", "1/model.py"}
    assert settings(folder)["bundle"] == str(bundle)


def settings(folder: Path) -> dict[str, str]:
    found = pbtxt.parse((folder / "config.pbtxt").read_text())["parameters"]
    return {entry["key"][0]: entry["value"][0]["string_value"][0] for entry in found}


def test_the_configuration_is_a_decoupled_python_model(bundle: Path, models: Path) -> None:
    config = pbtxt.parse((repository.write(bundle, models, "demo") / "config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["demo"], ["python"], [0])
    assert config["model_transaction_policy"] == [{"decoupled": ["true"]}]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert {each["name"][0] for each in config["input"]} == set(fake.KINDS)
    assert all(each["optional"] == ["true"] for each in config["input"])
    assert {each["name"][0]: each["data_type"][0] for each in config["output"]} == {
        "TEXT": "TYPE_STRING",
        "OUTPUT_IDS": "TYPE_INT32",
        "FINISH_REASON": "TYPE_STRING",
        "PROMPT_TOKENS": "TYPE_INT32",
        "COMPLETION_TOKENS": "TYPE_INT32",
    }


def test_the_settings_are_those_that_the_program_knows(
    bundle: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository.write(bundle, models, "demo", copy=False)
    known = fake.program(folder, monkeypatch).SETTINGS
    assert settings(folder) == known | {"bundle": str(bundle)}


@pytest.mark.parametrize("name", ['a "b"', "b\\c", "größe", "a\nb"], ids=["quotes", "backslash", "letters", "newline"])
def test_a_path_of_any_characters_is_quoted(models: Path, tmp_path: Path, name: str) -> None:
    bundle = fake.bundle(tmp_path / name)
    assert settings(repository.write(bundle, models, "demo", copy=False))["bundle"] == str(bundle)


def test_the_program_imports_only_what_the_server_has(bundle: Path, models: Path) -> None:
    program = repository.write(bundle, models, "demo") / "1/model.py"
    found = set()
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"blt_runtime", "numpy", "triton_python_backend_utils"}


# --- what is replaced, and what is not ---------------------------------------------------------------------------


def test_a_model_is_replaced_with_force_only(bundle: Path, models: Path) -> None:
    folder = repository.write(bundle, models, "demo")
    (folder / "older").write_text("older")
    with pytest.raises(UsageError, match="--force"):
        repository.write(bundle, models, "demo")
    assert (folder / "older").exists()
    repository.write(bundle, models, "demo", force=True)
    assert not (folder / "older").exists()


def test_a_folder_of_somebody_else_is_never_replaced(bundle: Path, models: Path) -> None:
    (models / "demo").mkdir(parents=True)
    (models / "demo/config.pbtxt").write_text('name: "demo"\nbackend: "onnxruntime"\n')
    with pytest.raises(UsageError, match="was not written by"):
        repository.write(bundle, models, "demo", force=True)
    assert tree(models) == {"demo/config.pbtxt"}


def test_other_models_of_the_repository_stay(bundle: Path, models: Path) -> None:
    repository.write(bundle, models, "one")
    repository.write(bundle, models, "two", copy=False)
    assert {path.name for path in models.iterdir()} == {"one", "two"}


def test_the_copy_in_a_repository_can_be_the_source(bundle: Path, models: Path) -> None:
    folder = repository.write(bundle, models, "demo")
    repository.write(folder / "1/bundle", models, "demo", force=True)
    Bundle.open(folder / "1/bundle", "full")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ü", "x" * 200])
def test_a_name_that_is_no_folder_is_refused(bundle: Path, models: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        repository.write(bundle, models, name)
    assert not models.exists()


def test_a_repository_that_is_a_file_is_refused(bundle: Path, models: Path) -> None:
    models.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        repository.write(bundle, models, "demo")


def test_a_bundle_without_batched_graphs_is_refused(models: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "plain")
    with pytest.raises(UsageError, match="no batched graphs"):
        repository.write(tmp_path / "plain", models, "demo")
    assert not models.exists()


def test_a_damaged_bundle_leaves_nothing(bundle: Path, models: Path) -> None:
    (bundle / "latent.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"latent\.onnx"):
        repository.write(bundle, models, "demo")
    assert not models.exists()


def test_an_interrupted_copy_leaves_the_older_model(
    bundle: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.write(bundle, models, "demo")
    before = tree(models)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        repository.write(bundle, models, "demo", force=True)
    assert tree(models) == before
    assert json.loads((models / "demo/1/bundle/manifest.json").read_text())
