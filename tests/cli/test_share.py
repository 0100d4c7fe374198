"""`blt push` and `blt pull` with a hub on this machine, and bundles that open by their hub name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blt.checkpoint.formats import open_source
from blt.checkpoint.models import save
from blt.share import download
from blt_export import pipeline
from tests import exports
from tests.cli.calls import PATHS, WITHOUT_TORCH, Result
from tests.share import local_hub
from tests.share.local_hub import Hub
from tests.tiny import tiny

pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
pytest.importorskip("safetensors", reason="the hub extra is not installed")

Call = Callable[..., Result]
NAME = "owner/small"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with everything that must not be uploaded."""
    folder = tmp_path_factory.mktemp("runs") / "blt"
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    save(folder / "model.pt", tiny())
    (folder / "checkpoints" / "step-2" / "optimizer.safetensors").write_bytes(b"state")
    (folder / "log.txt").write_text("secret")
    (folder / ".git").mkdir()
    records = [
        {"step": 2, "loss": 1.0, "bpb": 2.0, "bytes": 1000, "flops": 1.0, "seconds": 1.0, "patch_size": 4.25},
        {"step": 2, "valid_bpb": 1.875, "valid_bytes": 500},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the model in `run`."""
    return pipeline.run(exports.prepare("plain", check=False), tmp_path_factory.mktemp("exports") / "bundle").path


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with local_hub.running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, which huggingface_hub talks to."""
    server.repositories.clear()
    server.objects.clear()
    server.answers.clear()
    server.requests.clear()
    server.ranges.clear()
    server.damaged = server.cut = server.card_error = ""
    with local_hub.used(server, tmp_path / "cache"):
        yield server


def done(result: Result) -> str:
    assert result.code == 0, result.err
    return result.text


def failed(result: Result, code: int = 1) -> str:
    assert result.code == code, result.err
    (line,) = result.err.strip().splitlines()[-1:]
    assert line.startswith("blt: error: ")
    return line


def card(hub: Hub, name: str = NAME) -> tuple[dict[str, Any], str]:
    """Metadata and text of a repository's card."""
    text = hub.repositories[name].files()["README.md"].decode()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_push_then_pull_gives_the_same_bytes(blt: Call, hub: Hub, run: Path, bundle: Path, tmp_path: Path) -> None:
    address = done(blt("push", run, NAME, "--bundle", bundle)).splitlines()[-1]
    files = hub.repositories[NAME].files()
    assert address == f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", *(f"onnx/{path.name}" for path in bundle.iterdir()),
    }  # fmt: skip
    assert done(blt("pull", NAME, "-o", tmp_path / "pulled")).strip() == str(tmp_path / "pulled")
    pulled = tmp_path / "pulled"
    assert {str(p.relative_to(pulled)) for p in pulled.rglob("*") if p.is_file()} == set(files) - {".gitattributes"}
    assert all((pulled / name).read_bytes() == data for name, data in files.items() if name != ".gitattributes")
    assert not any(path.is_symlink() for path in pulled.rglob("*"))
    for path in bundle.iterdir():
        assert (pulled / "onnx" / path.name).read_bytes() == path.read_bytes()
    read = open_source(pulled)
    assert read.format == "huggingface"
    assert read.patch_rule == tiny().patch_rule


def test_a_push_is_one_commit_with_its_message_on_its_branch(blt: Call, hub: Hub, run: Path) -> None:
    done(blt("push", run, NAME, "--message", "First", "--revision", "v1"))
    assert hub.repositories[NAME].messages == ["initial commit", "First"]
    assert "model.safetensors" in hub.repositories[NAME].files("v1")
    assert "model.safetensors" not in hub.repositories[NAME].files("main")
    folder = Path(done(blt("pull", NAME, "--revision", "v1")).strip())
    assert (folder / "model.safetensors").is_file()
    assert "has no checkpoint and no bundle" in failed(blt("pull", NAME))
    assert "no such revision" in failed(blt("pull", NAME, "--revision", "v2"))


def test_the_card_says_what_is_known_and_what_is_not(blt: Call, hub: Hub, run: Path) -> None:
    done(blt("push", run, NAME))
    metadata, body = card(hub)
    assert "license" not in metadata
    assert metadata["pipeline_tag"] == "text-generation"
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 1.875
    for text in (
        "| checkpoint | validation split of the training data | 500 | 1.8750 |", "| mean patch | 4.25 bytes |",
        "FLOPs per byte", "trained on 1,000 bytes", "The data was not recorded.", "No licence was given.",
        "Not measured.", f"blt generate {NAME}",
    ):  # fmt: skip
        assert text in body, text


def test_the_card_has_licence_speed_and_training_data(blt: Call, hub: Hub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a|b.txt").write_text("Some text to train on. " * 200)
    done(blt("data", "prepare", tmp_path / "a|b.txt", "-o", tmp_path / "data"))
    speed = {
        "schema": "blt.bench/1", "kind": "latency", "backend": "onnx", "precision": "int8", "cpu": "Fast CPU",
        "threads": 2, "prompt_bytes": 512, "bytes_per_s": 123.4, "time_to_first_byte_s": 0.5, "mean_patch_bytes": 4.5,
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(speed))
    done(
        blt(
            "push",
            run,
            NAME,
            "--license",
            "Apache-2.0",
            "--bench",
            tmp_path / "bench.json",
            "--data",
            tmp_path / "data",
        )
    )
    metadata, body = card(hub)
    assert metadata["license"] == "apache-2.0"
    assert "123.4 bytes/s" in body
    assert "int8 on onnx, 2 threads, Fast CPU" in body
    shard = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]["train"]["shards"][0]
    assert shard["sha256"] in body
    assert "a&#124;b" in body
    assert str(tmp_path) not in body


def test_a_card_that_is_there_is_kept(blt: Call, hub: Hub, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("My card.\n")
    done(blt("push", tmp_path / "run", NAME))
    assert hub.repositories[NAME].files()["README.md"] == b"My card.\n"
    (tmp_path / "other.md").write_text("Other.\n")
    done(blt("push", tmp_path / "run", NAME, "--card", tmp_path / "other.md"))
    assert hub.repositories[NAME].files()["README.md"] == b"Other.\n"


def test_a_card_that_was_edited_on_the_hub_is_kept(blt: Call, hub: Hub, run: Path, tmp_path: Path) -> None:
    done(blt("push", run, NAME))
    done(blt("push", run, NAME, "--license", "mit"))
    assert card(hub)[0]["license"] == "mit"
    repository = hub.repositories[NAME]
    repository.commit("main", {**repository.files(), "README.md": b"By hand.\n"}, "edited")
    done(blt("push", run, NAME))
    assert repository.files()["README.md"] == b"By hand.\n"
    (tmp_path / "card.md").write_text("Another.\n")
    done(blt("push", run, NAME, "--card", tmp_path / "card.md"))
    assert repository.files()["README.md"] == b"Another.\n"


def test_a_card_that_the_hub_refuses_is_one_line(blt: Call, hub: Hub, run: Path) -> None:
    hub.card_error = '"license" must be one of these'
    assert '"license" must be one of these' in failed(blt("push", run, NAME))
    assert hub.repositories[NAME].messages == ["initial commit"]


def test_a_connection_that_breaks_within_a_file_continues_there(
    blt: Call, hub: Hub, bundle: Path, tmp_path: Path
) -> None:
    done(blt("push", bundle, NAME))
    hub.cut = "onnx/latent.weights"
    if blt("pull", NAME, "-o", tmp_path / "out").code:  # older versions of huggingface_hub do not try again themselves
        assert not (tmp_path / "out").exists()
        done(blt("pull", NAME, "-o", tmp_path / "out"))
    half = (bundle / "latent.weights").stat().st_size // 2
    assert f"bytes={half}-" in hub.ranges
    assert (tmp_path / "out" / "onnx" / "latent.weights").read_bytes() == (bundle / "latent.weights").read_bytes()


def test_a_pulled_folder_opens_as_its_bundle(blt: Call, hub: Hub, run: Path, bundle: Path, tmp_path: Path) -> None:
    done(blt("push", run, NAME, "--bundle", bundle))
    done(blt("pull", NAME, "-o", tmp_path / "both"))
    arguments = ("Once", "-n", "8", "--temperature", "0")
    assert done(blt("generate", tmp_path / "both", *arguments)) == done(blt("generate", bundle, *arguments))
    assert json.loads(done(blt("inspect", tmp_path / "both", "--json")))["kind"] == "bundle"
    done(blt("convert", tmp_path / "both", "-o", tmp_path / "native.pt", "--to", "native"))


def test_a_dry_run_uses_no_network(blt: Call, hub: Hub, run: Path, bundle: Path) -> None:
    shown = done(blt("push", run, NAME, "--bundle", bundle, "--dry-run"))
    assert not hub.requests
    assert "onnx/manifest.json" in shown
    assert "# small" in shown
    report = json.loads(done(blt("push", run, NAME, "--dry-run", "--json")))
    assert report["commit"] is None
    assert {file["path"]: file["bytes"] for file in report["files"]}["README.md"] == len(report["card"].encode())


def test_a_model_that_transformers_cannot_represent_is_a_model_pt(blt: Call, hub: Hub, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny("max_patch_length"))
    done(blt("push", tmp_path / "model.pt", NAME))
    assert hub.repositories[NAME].files()["model.pt"] == (tmp_path / "model.pt").read_bytes()
    assert "model.safetensors" not in hub.repositories[NAME].files()
    assert open_source(NAME).patch_rule == tiny("max_patch_length").patch_rule


def test_a_new_upload_replaces_weights_and_bundle_of_an_older_one(blt: Call, hub: Hub, run: Path, bundle: Path) -> None:
    old = ("model.pt", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "onnx/old.onnx", "notes.md")
    repository = hub.add(NAME, dict.fromkeys(old, b"old"))
    done(blt("push", run, NAME))
    assert {"onnx/old.onnx", "notes.md"} <= set(repository.files())
    done(blt("push", run, NAME, "--bundle", bundle))
    assert set(old) & set(repository.files()) == {"notes.md"}


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("PUT", "/objects/", 403, "your token does not allow this"),
        ("POST", "/commit/", 409, "was changed on the hub at the same time"),
        ("POST", "/create", 403, "your token does not allow this"),
        ("POST", "/preupload/", 413, "files of this size"),
    ],
    ids=["upload", "conflict", "create", "size"],
)
def test_a_refused_upload_leaves_no_commit(
    blt: Call, hub: Hub, run: Path, method: str, path: str, status: int, message: str
) -> None:
    hub.answers[method, path] = status
    assert message in failed(blt("push", run, NAME))
    repository = hub.repositories.get(NAME)
    assert repository is None or repository.messages == ["initial commit"]


def test_an_interrupted_upload_leaves_no_commit(
    blt: Call, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import lfs

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lfs, "_upload_single_part", interrupted)
        assert blt("push", run, NAME).code == 130
    assert hub.repositories[NAME].messages == ["initial commit"]
    done(blt("push", run, NAME))
    assert "model.safetensors" in hub.repositories[NAME].files()


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_token_is_asked_for_and_never_shown(
    blt: Call, server: Hub, run: Path, tmp_path: Path, token: str | None
) -> None:
    with local_hub.used(server, tmp_path / "cache", token):
        line = failed(blt("push", run, NAME))
    assert "hf auth login" in line
    assert token is None or token not in line


def test_an_unreachable_hub_is_one_line(blt: Call, run: Path, tmp_path: Path) -> None:
    with local_hub.running() as gone:
        pass
    with local_hub.used(gone, tmp_path / "cache"):
        assert "the hub cannot be reached" in failed(blt("push", run, NAME))
        assert "the hub cannot be reached" in failed(blt("pull", NAME))
        assert "the hub cannot be reached" in failed(blt("inspect", NAME))


def test_private_is_kept_to(blt: Call, hub: Hub, run: Path) -> None:
    done(blt("push", run, NAME, "--private"))
    assert hub.repositories[NAME].private
    hub.add("owner/public", {})
    assert "is public" in failed(blt("push", run, "owner/public", "--private"))
    assert hub.repositories["owner/public"].messages == ["given"]


@pytest.mark.parametrize("name", ["small", "a/b/c", "owner/..", "owner/a--b", "-a/b", "https://x/y", "owner/x.git", ""])
def test_wrong_names_are_refused_before_anything_is_read(blt: Call, hub: Hub, run: Path, name: str) -> None:
    assert "is no name of a repository" in failed(blt("push", "--", run, name), 2)
    assert "is no name of a repository" in failed(blt("pull", "--", name), 2)
    assert not hub.requests


def test_what_does_not_belong_together_is_refused(blt: Call, hub: Hub, run: Path, bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny("bytes_no_window"))
    assert "exported from another model" in failed(blt("push", tmp_path / "model.pt", NAME, "--bundle", bundle))
    shutil.copytree(bundle, tmp_path / "bundle")
    with (tmp_path / "bundle" / "latent.onnx").open("r+b") as file:
        file.write(b"\x00")
    assert "sha256 differs" in failed(blt("push", run, NAME, "--bundle", tmp_path / "bundle"))
    (tmp_path / "bundle" / "link").symlink_to(run / "model.pt")
    assert "is a link" in failed(blt("push", tmp_path / "bundle", NAME))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.pt").symlink_to(run / "model.pt")
    assert "link to a file outside" in failed(blt("push", tmp_path / "linked", NAME))
    assert "give the identifier" in failed(blt("push", run, NAME, "--license", "mit\nx: y"), 2)
    assert "not the output of blt bench" in failed(blt("push", run, NAME, "--bench", bundle / "manifest.json"), 2)
    assert not hub.requests


def test_a_damaged_download_is_removed_and_the_next_one_is_right(
    blt: Call, hub: Hub, bundle: Path, tmp_path: Path
) -> None:
    done(blt("push", bundle, NAME))
    hub.damaged = "onnx/latent.weights"
    assert "damaged in transit" in failed(blt("pull", NAME, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    hub.damaged = ""
    done(blt("pull", NAME, "-o", tmp_path / "out", "--bundle"))
    assert (tmp_path / "out" / "latent.weights").read_bytes() == (bundle / "latent.weights").read_bytes()
    assert "exists" in failed(blt("pull", NAME, "-o", tmp_path / "out", "--bundle"), 2)
    done(blt("pull", NAME, "-o", tmp_path / "out", "--bundle", "--force"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert "is not replaced" in failed(blt("pull", NAME, "-o", tmp_path / "mine", "--force"), 2)


def test_large_files_are_hard_links_where_that_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LINKED", 4)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "large").write_bytes(b"large")
    (tmp_path / "cache" / "a").write_bytes(b"a")
    (tmp_path / "out").mkdir()
    download.copy(download.Pulled(tmp_path / "cache", "c", ("a", "large")), tmp_path / "out")
    assert (tmp_path / "out" / "large").samefile(tmp_path / "cache" / "large")
    assert not (tmp_path / "out" / "a").samefile(tmp_path / "cache" / "a")


def test_a_bundle_on_the_hub_generates_without_torch_also_offline(
    blt: Call, hub: Hub, run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(blt("push", run, NAME, "--bundle", bundle))
    arguments = ("generate", NAME, "Once", "-n", "8", "--temperature", "0")
    expected = blt("generate", bundle, *arguments[2:]).out
    for key, value in local_hub.environment(hub, tmp_path / "new").items():
        monkeypatch.setenv(key, value)
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    monkeypatch.setenv("PYTHONPATH", PATHS)
    online = subprocess.run(command, capture_output=True)
    assert (online.returncode, online.stdout) == (0, expected), online.stderr
    hub.answers["GET", ""] = hub.answers["HEAD", ""] = 500
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = subprocess.run(command, capture_output=True)
    assert (offline.returncode, offline.stdout) == (0, expected), offline.stderr


def test_a_bundle_alone_is_pushed_without_torch(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "push", str(bundle), NAME, "--dry-run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "onnx/manifest.json" in done.stdout
    assert "parameters and FLOPs are not stated" in done.stderr


def test_a_checkpoint_on_the_hub_opens_as_before(blt: Call, hub: Hub, run: Path) -> None:
    done(blt("push", run, NAME))
    report = json.loads(done(blt("inspect", NAME, "--json")))
    assert (report["kind"], report["format"]) == ("checkpoint", "huggingface")
    assert json.loads(done(blt("inspect", NAME, "--json")))["kind"] == "checkpoint"


def test_a_name_that_the_cache_lacks_is_one_line_offline(blt: Call, server: Hub, tmp_path: Path) -> None:
    with local_hub.used(server, tmp_path / "cache", offline=True):
        assert "HF_HUB_OFFLINE forbids" in failed(blt("inspect", NAME))
        assert "HF_HUB_OFFLINE forbids" in failed(blt("pull", NAME))
