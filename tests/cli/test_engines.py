"""Commands on a folder of TensorRT engines, on the stand-ins for TensorRT and its device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from blt_export import pipeline
from blt_export.build import build_engines
from blt_runtime.backends.platform import Platform
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.engines import Machine
from tests import fake_tensorrt
from tests.exports import prepare
from tests.host_device import HostDevice
from tests.tiny import tiny

Call = Callable[..., Any]
VARIANT = "max_patch_length"
TEXT = "Some text of two lines.\nThis is the second. " * 3


def platform() -> Platform:
    device = HostDevice()
    machine = Machine(fake_tensorrt.VERSION, fake_tensorrt.GPU, "9.0", "580.1", "13.0")
    return Platform(fake_tensorrt.module(device), device, machine)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A checkpoint, its bundle, engines of it, and a text."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setattr("blt_runtime.backends.platform.open_platform", platform)
        save(folder / "model.pt", tiny(VARIANT))
        state = prepare(VARIANT, "portable", capacity=192, check=False)
        bundle = Bundle.open(pipeline.run(state, folder / "bundle").path)
        build_engines(bundle, folder / "engines", platform(), check=False)
        (folder / "text").write_text(TEXT)
        yield {path.stem: path for path in folder.iterdir()}


def test_engines_are_compared_with_their_bundle(blt: Call, places: dict[str, Path]) -> None:
    words = ["check", places["engines"], "--bytes", 40, "--threads", 1, "--data", places["text"]]
    done = blt(*words, "--reference", places["bundle"], "--json")
    assert done.code == 0, done.err
    report = json.loads(done.text)
    assert (report["ok"], report["provider"], report["precision"]) == (True, "engines", "fp32")
    assert (report["lost"], report["new"], report["flips"], report["agreement"]) == (0, 0, 0, report["greedy"])
    assert report["logits"] <= report["tolerance"] == 2e-5
    shown = blt(*words, "--reference", places["model"])
    assert shown.code == 0, shown.err
    assert "0 lost, 0 new in 41 positions" in shown.text


def test_inspect_shows_what_engines_json_says(blt: Call, places: dict[str, Path]) -> None:
    shown = blt("inspect", places["engines"]).text
    for text in ("Fake H100, compute capability 9.0", "hardware same, workspace TensorRT's own limit", "1, 1-16, 1-32"):
        assert text in shown


def test_a_byte_is_a_launch_and_a_wait(blt: Call, places: dict[str, Path]) -> None:
    sizes = ["--prompt-bytes", 24, "--new-bytes", 30, "--repeat", 1, "--threads", 1]
    report = json.loads(blt("bench", "latency", places["engines"], *sizes, "--json").text)
    requests, patches = report["requests_per_byte"], report["calls_per_byte"]["latent"]
    assert requests["launches"] == requests["waits"] == pytest.approx(1 + patches)
    assert requests["copies"] == pytest.approx(2 * (1 + patches))
    assert report["floor_bytes_per_s"] is None
    shown = blt("bench", "latency", places["engines"], *sizes).text
    for words in ("launches", "waits per byte", "of the time of a byte", "cannot be measured"):
        assert words in shown


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{engines}", "Some", "-n", "5"],
        ["eval", "{engines}", "{text}"],
        ["patch", "{text}", "--model", "{engines}"],
        ["bench", "patch", "{engines}", "--prompt-bytes", "20"],
    ],
    ids=["generate", "eval", "patch", "bench patch"],
)
def test_engines_of_another_user_run_when_they_are_trusted(
    blt: Call, places: dict[str, Path], tmp_path: Path, command: list[str]
) -> None:
    words = [word.format(**places) for word in command]
    assert blt(*words).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path))
        refused, trusted = blt(*words), blt(*words, "--trust-engines")
    assert refused.code == 4
    assert "was not built here: run blt build" in refused.err
    assert trusted.code == 0, trusted.err
