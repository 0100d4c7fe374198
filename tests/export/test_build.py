"""Engines from a bundle, on a stand-in for TensorRT: they generate the bundle's ids, or nothing is written."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from blt.cli import run
from blt_export.build import build_engines, build_graph, compare, longest_patch, profiles
from blt_export.quantize import eight_bit_floats
from blt_export.tensorrt import Profile, logger
from blt_export.verify import emulate
from blt_export.verify.errors import TOLERANCE
from blt_runtime import Model
from blt_runtime.backends.platform import Platform, open_engines
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.engines import Engines, Flags, Machine
from blt_runtime.bundle.spec import ModelSpec, resident_spec
from blt_runtime.engine.prefill import GATHER_BYTES
from blt_runtime.errors import BackendError, BundleError, CheckFailed, UsageError
from blt_runtime.patching import PatchRule
from tests import fake_tensorrt
from tests.engines import exported, platform, with_states

PROMPT = "Grüße\naus 東京, of two documents\0and more"


pytestmark = pytest.mark.usefixtures("_own_key")


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engines(bundle, tmp_path_factory.mktemp("folder") / "engines", platform(), check=False).path


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt_runtime.backends.platform.open_platform", platform)


def test_engines_generate_the_ids_of_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[str] = []
    report = build_engines(bundle, tmp_path / "engines", platform(), progress=steps.append)
    assert steps == [*bundle.manifest.spec.graphs, "parity"]
    engines = Engines.open(report.path)
    assert engines.file == report.file
    assert sorted(path.name for path in report.path.iterdir()) == sorted(
        ["engines.json", "manifest.json", "hash_tables.npy", *(f"{name}.plan" for name in steps[:-1])]
    )
    assert {row.output for row in report.file.parity} == {"prompt.logits", "prompt.entropies", "steps.logits"}
    assert all(row.error <= row.tolerance and row.positions >= 24 for row in report.file.parity)
    backend = open_engines(engines, platform())
    found = Model(backend.spec, backend, engines.bundle.hash_tables()).stream()
    wanted = Model.open(bundle.path).stream()
    for stream in (found, wanted):
        stream.append(PROMPT)
    made = list(wanted.generate_ids(40, temperature=0.0, stop_at_eos=False))
    assert list(found.generate_ids(40, temperature=0.0, stop_at_eos=False)) == made
    np.testing.assert_array_equal(found.patch_lengths, wanted.patch_lengths)
    found.rewind(40)
    assert list(found.generate_ids(40, temperature=0.0, stop_at_eos=False, speculate="lookup", draft=32)) == made


def test_an_entropy_model_of_n_grams_without_layers(tmp_path: Path) -> None:
    """Its engine has no caches, no node reads positions, and its tables are in a file of their own."""
    bundle = exported(tmp_path, variant="hash_entropy_without_layers")
    report = build_engines(bundle, tmp_path / "engines", platform())
    assert all(row.error <= row.tolerance and row.positions >= 24 for row in report.file.parity)
    assert {path.name for path in report.path.glob("*.npy")} == {"hash_tables.npy", "entropy_tables.npy"}
    assert Engines.open(report.path, verify="full").bundle.hash_tables().keys() == {"encoder", "entropy"}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_float16_is_compared_with_itself_on_the_cpu(tmp_path: Path, precision: str) -> None:
    """With the same codes of matrices."""
    report = build_engines(exported(tmp_path, precision), tmp_path / "engines", platform())
    assert [row.tolerance for row in report.file.parity] == [5e-3] * 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_8_bit_floats_are_compared_with_an_emulation_of_their_numbers(tmp_path: Path, precision: str) -> None:
    """The engines compute what the bundle with rounded weights computes. A further row says what rounding costs."""
    bundle = exported(tmp_path, precision)
    plain = build_engines(bundle, tmp_path / "plain", platform(), check=False)
    report = build_engines(bundle, tmp_path / "engines", platform(), flags=Flags(fp8=True))
    rows = {row.output: row for row in report.file.parity}
    cost = rows.pop("fp8.logits")
    assert 1e-3 < cost.error <= cost.tolerance == TOLERANCE["fp8"]
    assert all(row.error <= row.tolerance == TOLERANCE[precision] for row in rows.values())
    bytes_of = [{name: plan.bytes for name, plan in r.file.plans.items()} for r in (plain, report)]
    assert bytes_of[1].pop("latent") < bytes_of[0].pop("latent")
    assert bytes_of[0] == bytes_of[1]
    assert Engines.open(report.path).file.flags == Flags(fp8=True)
    backend = open_engines(Engines.open(report.path), platform())
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    stream.append(PROMPT)
    assert len(list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False))) == 20


def test_other_weights_than_the_rounded_ones_are_found(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the cost of 8-bit floats, but beyond the tolerance of the bundle."""
    run_ = eight_bit_floats.run

    def run_wrong(model: ir.Model) -> int:
        done = run_(model)
        for name, value in model.graph.initializers.items():
            if name.endswith(".scales") and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=name)
        return done

    monkeypatch.setattr(eight_bit_floats, "run", run_wrong)
    with pytest.raises(CheckFailed, match=r"the engines differ from ONNX Runtime's CPU: prompt.logits"):
        build_engines(bundle, tmp_path / "engines", platform(), flags=Flags(fp8=True))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_compared_with_an_emulation(bundle: Bundle, tmp_path: Path) -> None:
    """The CPU has no kernels for it, so the stand-in cannot run its engines."""
    with emulate.on_cpu(exported(tmp_path, "bf16")) as model:
        rows = compare(Model.open(bundle.path), model, "bf16")
    assert all(1e-4 < row.error <= row.tolerance for row in rows[:2])


class TestNothingIsWritten:
    """The folder appears complete, or not at all; and no build replaces it without --force."""

    def fails(
        self, kind: type[Exception], text: str, bundle: Bundle, out: Path, here: Platform, **options: Any
    ) -> None:
        with pytest.raises(kind, match=text) as caught:
            build_engines(bundle, out, here, **options)
        assert "\n" not in str(caught.value)
        assert [path.name for path in out.parent.iterdir()] == []

    def test_for_a_bundle_of_another_flavour(self, bundle: Bundle, tmp_path: Path) -> None:
        other = Bundle(bundle.path, replace(bundle.manifest, flavour="ort"))
        text = "is of the flavour ort, but engines are built from portable: blt export MODEL -o DIR --flavour portable"
        self.fails(UsageError, text, other, tmp_path / "engines", platform())

    def test_for_8_bit_floats_of_other_gpus(self, bundle: Bundle, tmp_path: Path) -> None:
        text = r"--fp8 needs GPUs of compute capability 8\.9 or newer \(Ada, Hopper\)"
        older = replace(platform(), machine=Machine(fake_tensorrt.VERSION, "Fake A100", "8.0", "580.1", "13.0"))
        for here, flags, more in (
            (older, Flags(fp8=True), ", and Fake A100 has 8.0"),
            (platform(), Flags("ampere+", fp8=True), ": leave out --hardware ampere"),
        ):
            self.fails(UsageError, text + more, bundle, tmp_path / "engines", here, flags=flags)

    def test_for_8_bit_floats_of_codes(self, bundle: Bundle, tmp_path: Path) -> None:
        other = Bundle(bundle.path, replace(bundle.manifest, precisions={"latent": "int4"}))
        text = "--fp8 rounds floats, and the latent transformer of .* is of int4: .* --precision bf16"
        self.fails(UsageError, text, other, tmp_path / "engines", platform(), flags=Flags(fp8=True))

    def test_for_a_graph_that_is_refused(self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parse = fake_tensorrt.OnnxParser.parse

        def refuse(self: Any, model: bytes, path: str) -> bool:
            self._errors.append("no kernel for NonZero")
            return "latent" not in path and parse(self, model, path)

        monkeypatch.setattr(fake_tensorrt.OnnxParser, "parse", refuse)
        text = r"TensorRT 10\.15\.1: latent is refused: .*no kernel for NonZero"
        self.fails(BackendError, text, bundle, tmp_path / "engines", platform())

    def test_for_an_input_that_is_dropped(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = platform()

        class Parser(fake_tensorrt.OnnxParser):
            def __init__(self, network: Any, log: Any) -> None:
                super().__init__(network, log)
                log.log(fake_tensorrt.Logger.WARNING, "Unused Input: doc_start")

        here.trt.OnnxParser = Parser
        self.fails(BackendError, "ignores its inputs doc_start", bundle, tmp_path / "engines", here)

    def test_for_an_engine_that_does_not_open(self, bundle: Bundle, tmp_path: Path) -> None:
        here = platform()
        here.trt.Builder = lambda log: fake_tensorrt.Builder("another version", log)
        self.fails(BackendError, "refuses the engine of the graph", bundle, tmp_path / "engines", here)

    def test_for_engines_that_compute_something_else(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = fake_tensorrt.Engine.__init__

        def wrong(self: Any, device: Any, model: Any, ranges: Any) -> None:
            for weights in model.graph.initializer:
                if weights.name.endswith("norm.weight"):
                    weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) * np.float32(1.01)).tobytes()
            whole(self, device, model, ranges)

        monkeypatch.setattr(fake_tensorrt.Engine, "__init__", wrong)
        text = r"the engines differ from ONNX Runtime's CPU: prompt.logits \d.* \(tolerance 2e-05\)"
        self.fails(CheckFailed, text, bundle, tmp_path / "engines", platform())

    def test_over_other_files_or_engines_without_force(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").touch()
        with pytest.raises(UsageError, match="exists and does not hold engines; give a new folder"):
            build_engines(bundle, tmp_path / "mine", platform(), force=True)
        build_engines(bundle, tmp_path / "engines", platform(), check=False)
        with pytest.raises(UsageError, match="holds engines already; give another folder, or --force"):
            build_engines(bundle, tmp_path / "engines", platform())
        build_engines(bundle, tmp_path / "engines", platform(), check=False, force=True)


class TestFolder:
    """What opens a bundle opens a folder of engines."""

    @pytest.mark.usefixtures("_gpu")
    def test_model_open(self, bundle: Bundle, folder: Path) -> None:
        model = Model.open(folder, precision="fp32")
        assert model.backend.name == "tensorrt"
        assert model.manifest == bundle.manifest
        wanted = "".join(Model.open(bundle.path).generate_text(PROMPT, 20, temperature=0.0))
        assert "".join(model.generate_text(PROMPT, 20, temperature=0.0)) == wanted

    @pytest.mark.usefixtures("_gpu")
    def test_options_of_bundles_are_refused(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="leave out the backend and prepack"):
            Model.open(folder, "null")
        with pytest.raises(UsageError, match="no provider of ONNX Runtime: leave out cuda"):
            Model.open(folder, provider="cuda")
        with pytest.raises(BundleError, match="was exported at fp32, not bf16"):
            Model.open(folder, precision="bf16")

    @pytest.mark.parametrize("options", [{"version": "11.0"}, {"gpu": "Fake B200"}], ids=["version", "gpu"])
    def test_another_machine_is_one_line(
        self, folder: Path, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blt_runtime.backends.platform.open_platform", lambda: platform(**options))
        with pytest.raises(
            BackendError, match=r"are for TensorRT 10\.15\.1 on Fake H100 .*, but here is .*: run blt build"
        ):
            Model.open(folder)

    @pytest.mark.usefixtures("_gpu")
    def test_engines_of_another_user_are_refused_unless_trusted(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        with pytest.raises(BackendError, match="was not built here: run blt build"):
            Model.open(folder)
        assert Model.open(folder, trust_engines=True).backend.name == "tensorrt"

    def test_without_a_gpu_there_is_one_line_and_tensorrt_is_not_loaded(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_driver() -> None:
            raise BackendError("no NVIDIA driver: libcuda.so.1 is not installed")

        monkeypatch.setattr("blt_runtime.backends.platform.probe", no_driver)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        assert run(["generate", str(folder), "x"]) == 4
        assert capsys.readouterr().err == "blt: error: no NVIDIA driver: libcuda.so.1 is not installed\n"


class TestCommand:
    """`blt build`, and `blt inspect` of what it wrote."""

    @pytest.mark.usefixtures("_gpu")
    def test_a_build_and_what_is_in_it(
        self, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "engines"
        assert run(["build", str(bundle.path), "-o", str(out), "--workspace", "1G", "--hardware", "ampere+"]) == 0
        printed = capsys.readouterr().out
        assert "1 x 8, 1-32 x 1-8" in printed
        assert "parity with ONNX Runtime's CPU" in printed
        assert run(["inspect", str(out)]) == 0
        shown = capsys.readouterr().out
        for text in (
            "TensorRT 10.15.1",
            "Fake H100, compute capability 9.0, and Ampere or newer",
            "1, 1-16, 1-32",
            "ok",
        ):
            assert text in shown
        assert run(["inspect", str(out), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        flags = {"hardware": "ampere+", "workspace": 1 << 30, "fp8": False, "strip": False}
        assert (said["kind"], said["engines"]["flags"]) == ("engines", flags)

    @pytest.mark.usefixtures("_gpu")
    def test_a_build_with_8_bit_floats(
        self, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["build", str(bundle.path), "-o", str(tmp_path / "e"), "--fp8"]) == 0
        assert "fp8.logits" in capsys.readouterr().out
        assert run(["inspect", str(tmp_path / "e")]) == 0
        assert "fp32, latent matrices in fp8" in capsys.readouterr().out

    @pytest.mark.usefixtures("_gpu")
    def test_json(self, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["build", str(bundle.path), "-o", str(tmp_path / "e"), "--no-check", "--json", "-q"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["schema"] == "blt.build/1"
        assert set(said["graphs"]) == set(said["engines"]["plans"]) == set(bundle.manifest.graphs)

    @pytest.mark.parametrize(
        ("options", "code", "text"),
        [
            (["--hardware", "any"], 2, "choose one of same, ampere+"),
            (["--workspace", "much"], 2, "--workspace"),
            (["--fp8", "--hardware", "ampere+"], 2, "--fp8 needs GPUs of compute capability 8.9"),
            (["--timing-cache", "/no/such/folder/file"], 2, "the folder /no/such/folder does not exist"),
            ([], 4, "no NVIDIA driver"),
        ],
        ids=["hardware", "workspace", "fp8", "timing-cache", "gpu"],
    )
    def test_a_refusal_is_one_line(
        self,
        bundle: Bundle,
        tmp_path: Path,
        options: list[str],
        code: int,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def no_driver() -> None:
            raise BackendError("no NVIDIA driver: libcuda.so.1 is not installed")

        monkeypatch.setattr("blt_runtime.backends.platform.probe", no_driver)
        assert run(["build", str(bundle.path), "-o", str(tmp_path / "e"), *options]) == code
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
        assert not (tmp_path / "e").exists()

    def test_what_is_no_bundle_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["build", str(tmp_path), "-o", str(tmp_path / "e")]) == 2
        assert "is no bundle: blt export MODEL -o DIR --flavour portable writes one" in capsys.readouterr().err


class TestOptions:
    @pytest.fixture
    def configs(self, monkeypatch: pytest.MonkeyPatch) -> list[fake_tensorrt.Config]:
        made: list[fake_tensorrt.Config] = []

        def create(self: Any) -> fake_tensorrt.Config:
            made.append(fake_tensorrt.Config())
            return made[-1]

        monkeypatch.setattr(fake_tensorrt.Builder, "create_builder_config", create)
        return made

    def test_flags_reach_the_builder_and_the_folder(
        self, bundle: Bundle, tmp_path: Path, configs: list[fake_tensorrt.Config]
    ) -> None:
        flags = Flags("ampere+", 1 << 30)
        report = build_engines(bundle, tmp_path / "engines", platform(), flags=flags, check=False)
        assert Engines.open(report.path).file.flags == flags
        assert len(configs) == 4
        for config in configs:
            assert config.hardware_compatibility_level is fake_tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
            assert config.limits == {fake_tensorrt.MemoryPoolType.WORKSPACE: 1 << 30}
            assert fake_tensorrt.BuilderFlag.TF32 not in config.flags

    def test_the_timing_cache_passes_from_graph_to_graph_and_from_build_to_build(
        self, bundle: Bundle, tmp_path: Path
    ) -> None:
        cache = tmp_path / "timing"
        for builds in (1, 2):
            build_engines(bundle, tmp_path / "e", platform(), timing_cache=cache, check=False, force=True)
            assert cache.read_bytes() == b"t" * 4 * builds

    def test_a_timing_cache_of_another_gpu_is_refused(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "timing").write_bytes(b"other")
        monkeypatch.setattr(fake_tensorrt.Config, "set_timing_cache", lambda *_: False)
        with pytest.raises(BackendError, match="timing is no timing cache of this TensorRT and GPU: delete it"):
            build_engines(bundle, tmp_path / "e", platform(), timing_cache=tmp_path / "timing")
        assert (tmp_path / "timing").read_bytes() == b"other"


class TestProfiles:
    @pytest.fixture
    def spec(self, bundle: Bundle) -> ModelSpec:
        return resident_spec(bundle.manifest.spec, cached=True)

    @pytest.mark.parametrize("graph", ["entropy", "encoder", "decoder"])
    def test_bytes_are_one_or_a_pass_or_a_chunk(self, spec: ModelSpec, graph: str) -> None:
        ranges = [profile["positions"] for profile in profiles(spec, graph)]
        assert ranges == [((1, 1),) * 3, ((1, 1), (1, 4), (1, 16)), ((1, 1), (1, 32), (1, 32))]
        assert not any(name.startswith("past_") for profile in profiles(spec, graph) for name in profile)

    def test_a_patch_has_a_profile_for_each_number_of_entries(self, spec: ModelSpec) -> None:
        """Patches are as long as the text here, so up to 192 bytes."""
        free = replace(spec, patch_rule=PatchRule("space"))
        shapes = [profile["byte_index"] for profile in profiles(free, "latent")]
        assert shapes[:6] == [((1, 1, length),) * 3 for length in (8, 16, 32, 64, 128, 256)]
        assert shapes[6:] == [((1, 1, 1), (1, 8, 8), (1, 32, 256))]

    @pytest.mark.parametrize(
        ("rule", "window", "longest"),
        [
            (PatchRule("space"), 1, 192),
            (PatchRule("space", max_patch_length=16), 1, 16),
            (PatchRule("static", patch_size=6), 1, 6),
            (PatchRule("static", patch_size=6), 4, 24),
            (PatchRule("static", patch_size=500), 1, 192),
            (PatchRule("byte"), 1, 1),
        ],
        ids=["free", "limited", "static", "window", "capacity", "byte"],
    )
    def test_the_longest_patch_follows_the_rule(self, rule: PatchRule, window: int, longest: int) -> None:
        assert longest_patch(rule, window, 192) == longest

    def test_every_call_of_a_prefill_has_a_profile_and_none_gathers_too_much(self, spec: ModelSpec) -> None:
        """States of 16 KiB: all patches and entries that `engine.prefill` puts into one call, and that a pass does."""
        large = replace(with_states(spec, 4096), patch_rule=PatchRule("space"))
        ranges = profiles(large, "latent")
        assert len(ranges) == 6 + 2
        for patches, length in itertools.product((1, 2, 7, 17, 32), range(1, 193)):
            if patches <= 17 or patches * length * 4096 * 4 <= GATHER_BYTES:
                assert any(_takes(profile, patches, length) for profile in ranges)
        for profile in ranges:
            _, _, (_, patches, length) = profile["byte_index"]
            assert patches <= 17 or patches * length * 4096 * 4 <= 8 * GATHER_BYTES


def _takes(profile: Profile, patches: int, length: int) -> bool:
    least, _, most = profile["byte_index"]
    return least[1] <= patches <= most[1] and least[2] <= length <= most[2]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_tensorrt_builds_all_graphs_with_these_profiles(tmp_path: Path, precision: str) -> None:
    """The real builder, which needs no GPU."""
    import tensorrt_rtx

    bundle, log = exported(tmp_path, precision), logger(tensorrt_rtx)
    spec = resident_spec(bundle.manifest.spec, cached=True)
    for name, graph in spec.graphs.items():
        built = build_graph(bundle, graph, tensorrt_rtx, log, profiles(spec, name))
        assert set(built.outputs) == {tensor.name for tensor in graph.outputs}
        assert built.plan.nbytes > 0
        if name == "latent" and precision in ("fp32", "fp16", "bf16"):
            narrow = build_graph(bundle, graph, tensorrt_rtx, log, profiles(spec, name), Flags(fp8=True))
            assert set(narrow.outputs) == set(built.outputs)
            assert narrow.layers > built.layers
