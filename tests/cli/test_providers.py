"""`--provider`, `--trust-engines` and `--engine-cache`: they reach the model, or one line refuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from blt_runtime import Model
from blt_runtime.errors import BackendError
from tests.runtime.bundle.test_engines import write_engines
from tests.runtime.bundles import write_bundle
from tests.tiny import tiny

Call = Callable[..., Any]
SINGLE = {
    "generate": ["generate", "{model}", "x"],
    "chat": ["chat", "{model}"],
    "score": ["score", "{model}", "{text}", "--npz", "{folder}/out.npz"],
    "eval": ["eval", "{model}", "{text}"],
    "bench latency": ["bench", "latency", "{model}"],
    "bench patch": ["bench", "patch", "{model}"],
    "patch": ["patch", "{text}", "--model", "{model}"],
}
BATCHED = {
    "serve": ["serve", "{model}", "--port", "0"],
    "bench throughput": ["bench", "throughput", "{model}"],
    "generate --jsonl": ["generate", "{model}", "--jsonl", "{lines}", "-o", "-"],
}


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """For the whole test: `blt` undoes what `monkeypatch` did."""
    with pytest.MonkeyPatch.context() as made:
        yield made


@pytest.fixture
def places(tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A checkpoint, a bundle of the flavour ort, a folder of engines of this user, a text and prompts."""
    patch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    save(tmp_path / "model.pt", tiny("static"))
    write_bundle(tmp_path / "bundle")
    write_engines(tmp_path / "engines")
    (tmp_path / "text").write_bytes(b"A text. " * 200)
    (tmp_path / "lines").write_text('{"prompt": "x"}\n')
    return {path.stem: path for path in tmp_path.iterdir()} | {"folder": tmp_path}


@pytest.fixture
def opened(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each model that is opened; it is not here then."""
    found: list[dict[str, Any]] = []

    def open_(path: Path, **options: Any) -> None:
        found.append(options)
        raise BackendError("no such device")

    patch.setattr(Model, "open", open_)
    patch.setattr("blt_runtime.backends.onnx.check_rows", lambda bundle, provider: None)
    return found


def given(command: list[str], places: dict[str, Path], model: str) -> list[str]:
    """The command on one of the models."""
    return [word.format(**{**places, "model": places[model]}) for word in command]


@pytest.mark.parametrize("name", SINGLE)
def test_options_of_single_streams_reach_the_model(
    blt: Call, places: dict[str, Path], opened: list[dict[str, Any]], name: str
) -> None:
    cache = places["folder"] / "cache"
    command = given(SINGLE[name], places, "bundle")
    done = blt(*command, "--provider", "tensorrt", "--engine-cache", cache)
    assert (done.code, done.err) == (4, "blt: error: no such device\n")
    assert (opened[0]["provider"], opened[0]["engine_cache"], opened[0]["trust_engines"]) == ("tensorrt", cache, False)
    assert blt(*given(SINGLE[name], places, "engines"), "--trust-engines").code == 4
    assert opened[1]["trust_engines"]


@pytest.mark.parametrize("name", BATCHED)
def test_options_of_batched_streams_reach_the_model(
    blt: Call, places: dict[str, Path], opened: list[dict[str, Any]], name: str
) -> None:
    done = blt(*given(BATCHED[name], places, "bundle"), "--provider", "cuda")
    assert (done.code, done.err) == (4, "blt: error: no such device\n")
    assert opened[0]["provider"] == "cuda"


@pytest.mark.parametrize("provider", ["webgpu", "tensorrt"])
@pytest.mark.parametrize("name", BATCHED)
def test_batched_streams_need_attention_over_rows(blt: Call, places: dict[str, Path], name: str, provider: str) -> None:
    done = blt(*given(BATCHED[name], places, "bundle"), "--provider", provider)
    assert done.code == 2
    assert f"provider {provider} runs no batched graphs: choose cpu or cuda, or run single streams" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", SINGLE)
def test_an_engine_cache_is_of_one_provider(blt: Call, places: dict[str, Path], name: str) -> None:
    done = blt(*given(SINGLE[name], places, "bundle"), "--engine-cache", places["folder"])
    assert done.code == 2
    assert "--engine-cache is for --provider tensorrt, not cpu: leave it out" in done.err


@pytest.mark.parametrize("model", ["bundle", "model"])
@pytest.mark.parametrize("name", [*SINGLE, "check"])
def test_only_engines_are_trusted(blt: Call, places: dict[str, Path], name: str, model: str) -> None:
    command = SINGLE.get(name, ["check", "{model}"])
    done = blt(*given(command, places, model), "--trust-engines")
    assert done.code == 2
    assert "holds no TensorRT engines: leave --trust-engines out" in done.err


class TestCheckpoints:
    @pytest.mark.parametrize("name", [*SINGLE, "calibrate"])
    def test_pytorch_has_no_provider(self, blt: Call, places: dict[str, Path], name: str) -> None:
        command = SINGLE.get(name, ["calibrate", "{model}", "{text}", "--mean-patch", "4"])
        done = blt(*given(command, places, "model"), "--provider", "webgpu")
        assert done.code == 2
        assert "--provider webgpu is ONNX Runtime's: give a bundle, or add --backend onnx" in done.err

    def test_a_temporary_bundle_is_of_fp32(self, blt: Call, places: dict[str, Path]) -> None:
        done = blt("generate", places["model"], "x", "--backend", "onnx", "--provider", "cuda")
        assert done.code == 2
        assert "which --provider cuda does not run: blt export" in done.err
        assert "--flavour cuda --precision bf16" in done.err

    def test_a_missing_device_is_found_before_the_export(
        self, blt: Call, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_driver() -> None:
            raise BackendError("no NVIDIA driver: libcuda.so.1 is not installed")

        monkeypatch.setattr("blt_runtime.backends.nvidia.probe", no_driver)
        monkeypatch.setattr("blt.checkpoint.models.load", None)
        done = blt("generate", places["model"], "x", "--backend", "onnx", "--provider", "tensorrt")
        assert (done.code, done.err) == (4, "blt: error: no NVIDIA driver: libcuda.so.1 is not installed\n")


BUILT_FROM = "that they were built from"
REFUSED = {
    "push": (["push", "{engines}", "me/x"], "they run on one kind of GPU; upload the bundle " + BUILT_FROM),
    "push --bundle": (["push", "{model}", "me/x", "--bundle", "{engines}"], "upload the bundle " + BUILT_FROM),
    "export": (["export", "{engines}", "-o", "{folder}/b"], "give the checkpoint, or with --triton the bundle"),
    "export --triton": (["export", "{engines}", "--triton", "{folder}/t"], "or with --triton the bundle, that"),
    "build": (["build", "{engines}", "-o", "{folder}/e"], "give the bundle " + BUILT_FROM),
    "convert": (["convert", "{engines}", "-o", "{folder}/c", "--to", "native"], "their weights cannot be converted"),
    "calibrate": (["calibrate", "{engines}", "{text}", "--mean-patch", "4"], "then export and build again"),
    "check": (["check", "{engines}"], f"give the bundle {BUILT_FROM}, or its checkpoint, as --reference"),
    "check --reference": (["check", "{bundle}", "--provider", "auto", "--reference", "{engines}"], "runs on the CPU"),
    "check --bundle": (["check", "{model}", "--bundle", "{engines}"], "--reference {model} compares them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_command_that_takes_no_engines_says_what_it_takes(blt: Call, places: dict[str, Path], name: str) -> None:
    command, message = REFUSED[name]
    done = blt(*(word.format(**places) for word in command))
    assert done.code == 2, done.err
    assert f"{places['engines']} holds TensorRT engines: " in done.err
    assert message.format(**places) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--backend=torch", "is a folder of TensorRT engines, which PyTorch does not run"),
        ("--device=cuda", "--device cuda is for checkpoints: engines run on the first GPU"),
        ("--provider=cuda", "no provider of ONNX Runtime: leave out cuda"),
        ("--provider=auto --engine-cache=x", "engine_cache is for single streams of a bundle"),
    ],
)
def test_options_that_engines_do_not_have(blt: Call, places: dict[str, Path], option: str, message: str) -> None:
    done = blt("generate", places["engines"], "x", *option.split())
    assert done.code in (2, 4)
    assert message in done.err
