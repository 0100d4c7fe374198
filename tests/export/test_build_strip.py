"""Plans without weights (`blt build --strip`): put in when they are opened, from the folder's copy; else refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.cli import run
from blt_export.build import build_engines
from blt_runtime import Model
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.engines import Engines, Flags
from blt_runtime.errors import BackendError, BundleError
from blt_runtime.scheduler import Scheduler
from tests import fake_tensorrt
from tests.engines import platform
from tests.tiny import hard_text

STRIP = Flags(strip=True)
ROWS = 2


pytestmark = pytest.mark.usefixtures("_own_key")


@pytest.fixture(scope="module")
def whole(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    out = tmp_path_factory.mktemp("whole") / "engines"
    return Engines.open(build_engines(bundle, out, platform(), batched=ROWS, check=False).path)


@pytest.fixture(scope="module")
def stripped(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    out = tmp_path_factory.mktemp("stripped") / "engines"
    return Engines.open(build_engines(bundle, out, platform(), batched=ROWS, flags=STRIP).path)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt_runtime.backends.platform.open_platform", platform)


def test_a_folder_has_the_weights_once(bundle: Bundle, whole: Engines, stripped: Engines) -> None:
    graphs = list(bundle.manifest.spec.graphs)
    assert stripped.file.weights == tuple(sorted(f"{name}.weights" for name in graphs))
    assert whole.file.weights == ()
    for file in stripped.file.weights:
        assert (stripped.path / file).read_bytes() == (bundle.path / file).read_bytes()
    more = {path.name for path in stripped.path.iterdir()} - {path.name for path in whole.path.iterdir()}
    assert more == {f"{name}{end}" for name in graphs for end in (".onnx", ".rows.onnx", ".weights")}
    for kept, without in zip(whole.file.forms, stripped.file.forms, strict=True):
        for name in graphs:
            stored = sum(bundle.manifest.files[file].bytes for file in (f"{name}.weights",))
            assert without[name].bytes < kept[name].bytes - stored // 2


def test_it_generates_the_same_bytes_with_the_same_logits(whole: Engines, stripped: Engines) -> None:
    streams = [Model.open(engines.path).stream(bos=False) for engines in (whole, stripped)]
    for stream in streams:
        stream.append_ids(hard_text()[:90])
    one, other = (list(stream.generate_ids(30, temperature=0, stop_at_eos=False)) for stream in streams)
    assert one == other
    np.testing.assert_array_equal(streams[0].logits, streams[1].logits)


def test_batched_streams_generate_the_same_bytes(whole: Engines, stripped: Engines) -> None:
    found = []
    for engines in (whole, stripped):
        with Scheduler(Model.open(engines.path, batched=True), streams=ROWS) as scheduler:
            requests = [
                scheduler.submit_ids(hard_text()[: 20 + 30 * i], 12, temperature=0, stop_at_eos=False) for i in range(3)
            ]
            found.append([request.result() for request in requests])
    assert found[0] == found[1]


def test_an_engine_does_not_run_without_its_weights(stripped: Engines) -> None:
    """What the stand-in is for: were no weights put in, nothing would run."""
    here = platform()
    engine = here.trt.Runtime(None).deserialize_cuda_engine(stripped.plans()["decoder"].plan)
    assert engine.refittable
    context = engine.create_execution_context()
    for name in engine.types:
        context.set_tensor_address(name, 0)
    assert not context.execute_async_v3(here.device.stream())


class TestRefused:
    @pytest.fixture
    def folder(self, stripped: Engines, tmp_path: Path) -> Path:
        shutil.copytree(stripped.path, tmp_path / "engines")
        return tmp_path / "engines"

    @pytest.mark.parametrize("file", ["latent.weights", "latent.onnx", "latent.rows.onnx"])
    def test_what_is_missing(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        with pytest.raises(BundleError, match=rf"{file}( is missing in |: No such file).*: run blt build") as caught:
            Model.open(folder, batched="rows" in file)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("file", ["latent.weights", "latent.onnx", "latent.rows.onnx"])
    def test_what_was_changed(self, folder: Path, file: str) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        with pytest.raises(BundleError, match=rf"{file} was changed \(its sha256 differs\): run blt build"):
            Model.open(folder, batched="rows" in file)

    def test_weights_of_another_size(self, folder: Path) -> None:
        with (folder / "encoder.weights").open("ab") as file:
            file.write(b"x")
        with pytest.raises(BundleError, match=r"encoder.weights has \d+ bytes instead of \d+: run blt build"):
            Model.open(folder)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda self: self.found.popitem(), r"1 are missing, such as .*\): run blt build without --strip"),
            (lambda self: setattr(self, "engine", None), r"no reason given"),
        ],
        ids=["missing", "unknown"],
    )
    def test_weights_that_tensorrt_does_not_take(
        self, folder: Path, change: Callable[[Any], Any], text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Refitter(fake_tensorrt.Refitter):
            def refit_cuda_engine(self) -> bool:
                change(self)
                return False

            def get_missing_weights(self) -> list[str]:
                return super().get_missing_weights() if self.engine is not None else []

        def here() -> Any:
            made = platform()
            made.trt.Refitter = Refitter
            return made

        monkeypatch.setattr("blt_runtime.backends.platform.open_platform", here)
        with pytest.raises(BackendError, match=f"does not put the weights into the engine of the graph .*{text}"):
            Model.open(folder)

    def test_a_build_whose_weights_do_not_fit_writes_nothing(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The builder kept a weight under a name that the graph does not have."""
        whole = fake_tensorrt._strip

        def renamed(weights: Any) -> None:
            whole(weights)
            weights.name += "_folded" if weights.name.endswith("norm.weight") else ""

        monkeypatch.setattr(fake_tensorrt, "_strip", renamed)
        with pytest.raises(BackendError, match=r"Only successfully refitted \d+ weights out of \d+.*without --strip"):
            build_engines(bundle, tmp_path / "engines", platform(), flags=STRIP, check=False)
        assert list(tmp_path.iterdir()) == []


def test_8_bit_floats_are_not_those_of_the_bundle(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(bundle.path), "-o", str(tmp_path / "e"), "--strip", "--fp8"]) == 2
    assert "--fp8 rounds weights in the build, and --strip takes those of the bundle" in capsys.readouterr().err


def test_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engines"
    assert run(["build", str(bundle.path), "-o", str(out), "--strip", "--no-check"]) == 0
    assert "put into the engines when they are opened" in capsys.readouterr().out
    assert Engines.open(out).file.flags.strip
    assert run(["build", str(bundle.path), "-o", str(out), "--force", "--keep-weights", "--no-check"]) == 0
    assert not Engines.open(out).file.flags.strip
