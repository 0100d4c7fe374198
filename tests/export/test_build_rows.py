"""Engines of batched streams: built by `blt build --profiles step,prefill,rows=N`, opened for a `Scheduler`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.cli import run
from blt_export.build import build_engines, build_graph, profiles, rows_of
from blt_export.specs import export_spec
from blt_export.tensorrt import Profile, logger
from blt_runtime import Model
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.engines import Engines, Flags
from blt_runtime.bundle.spec import PADDED, ModelSpec, padded_spec, resident_spec
from blt_runtime.engine.graphs import entries
from blt_runtime.engine.prefill import GATHER_BYTES
from blt_runtime.engine.rows import padded_entries
from blt_runtime.errors import BackendError, Cancelled, CapacityError, CheckFailed, UsageError
from blt_runtime.ids import encode
from blt_runtime.patching import PatchRule
from blt_runtime.scheduler import Scheduler
from tests import fake_tensorrt
from tests.engines import VARIANT, exported, platform, with_states
from tests.tiny import hard_text, tiny

ROWS = 3


pytestmark = pytest.mark.usefixtures("_own_key")


@pytest.fixture(scope="module")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    out = tmp_path_factory.mktemp("folder") / "engines"
    build_engines(bundle, out, platform(), batched=ROWS)
    return Engines.open(out)


@pytest.fixture(scope="module")
def single(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without batched streams."""
    return build_engines(bundle, tmp_path_factory.mktemp("single") / "engines", platform(), check=False).path


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt_runtime.backends.platform.open_platform", platform)


def greedy(bundle: Bundle, prompt: np.ndarray, n: int) -> bytes:
    """What a single stream on ONNX Runtime's CPU generates."""
    stream = Model.open(bundle.path).stream(bos=False)
    stream.append_ids(prompt)
    return b"".join(stream.generate(n, temperature=0, stop_at_eos=False))


class TestFolder:
    def test_what_is_in_it(self, bundle: Bundle, engines: Engines) -> None:
        graphs = list(bundle.manifest.spec.graphs)
        assert {path.name for path in engines.path.glob("*.plan")} == {
            *(f"{name}.plan" for name in graphs),
            *(f"{name}.rows.plan" for name in graphs),
        }
        rows = engines.check_rows()
        assert rows.streams == ROWS
        assert list(rows.plans) == graphs
        for name, plan in rows.plans.items():
            assert plan.aliases == engines.spec.graphs[name].aliases
            assert all(shapes[0][0] == ROWS for profile in plan.profiles for shapes in profile.values())

    def test_rows_were_compared_with_single_streams(self, engines: Engines) -> None:
        parity = {row.output: row for row in engines.file.parity}
        assert set(parity) == {"prompt.logits", "prompt.entropies", "steps.logits", "rows.logits", "rows.entropies"}
        assert parity["rows.logits"].positions == ROWS * 20
        assert parity["rows.entropies"].positions == ROWS * 45
        assert all(row.error <= row.tolerance for row in parity.values())

    def test_rows_have_8_bit_floats_too(self, bundle: Bundle, engines: Engines, tmp_path: Path) -> None:
        report = build_engines(bundle, tmp_path / "engines", platform(), batched=ROWS, flags=Flags(fp8=True))
        parity = {row.output: row for row in report.file.parity}
        assert parity["rows.logits"].tolerance == 2e-5
        assert all(row.error <= row.tolerance for row in parity.values())
        rows, floats = Engines.open(report.path).check_rows(), engines.check_rows()
        assert rows.plans["latent"].bytes < floats.plans["latent"].bytes

    def test_rows_that_compute_something_else_are_refused(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the engines of batched streams differ, and only in their last row."""
        whole = fake_tensorrt._run

        def wrong(engine: fake_tensorrt.Engine, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
            whole(engine, shapes, addresses)
            if "logits" in engine.outputs and "state_row" in engine.inputs:
                shape = (*shapes["positions"], bundle.manifest.spec.vocab_size)
                fake_tensorrt._view(engine, "logits", shape, addresses["logits"])[-1] += 0.01

        monkeypatch.setattr(fake_tensorrt, "_run", wrong)
        with pytest.raises(CheckFailed, match=r"differ from ONNX Runtime's CPU: rows.logits \d"):
            build_engines(bundle, tmp_path / "engines", platform(), batched=ROWS)
        assert list(tmp_path.iterdir()) == []

    def test_float16(self, tmp_path: Path) -> None:
        half = exported(tmp_path, "fp16")
        report = build_engines(half, tmp_path / "engines", platform(), batched=2)
        assert {row.tolerance for row in report.file.parity if row.output.startswith("rows.")} == {5e-3}


@pytest.mark.usefixtures("_gpu")
class TestOpen:
    def test_a_scheduler_generates_what_single_streams_generate(self, bundle: Bundle, engines: Engines) -> None:
        """More requests than rows: prompts of different lengths, across ends of documents, which join and leave."""
        model = Model.open(engines.path, batched=True)
        prompts = [np.roll(hard_text(), -29 * i)[: 1 + 23 * i] for i in range(7)]
        with Scheduler(model, streams=ROWS) as scheduler:
            long = scheduler.submit_ids(prompts[1], 150, temperature=0, stop_at_eos=False)
            requests = [
                scheduler.submit_ids(prompt, 3 + 5 * i, temperature=0, stop_at_eos=False)
                for i, prompt in enumerate(prompts)
            ]
            found = [requests[0].result()]
            long.cancel()
            found += [request.result() for request in requests[1:]]
            assert found == [greedy(bundle, prompt, 3 + 5 * i) for i, prompt in enumerate(prompts)]
            with pytest.raises(Cancelled):
                long.result()

    def test_a_stream_holds_less_than_the_export_by_the_room_for_padding(
        self, bundle: Bundle, engines: Engines
    ) -> None:
        model, most = Model.open(engines.path, batched=True), 192 - 2 * PADDED
        assert model.spec.capacity_bytes == most
        text = np.tile(hard_text(), 2)[: most - 1]
        with Scheduler(model, streams=1) as scheduler:
            assert scheduler.submit_ids(text, 2, temperature=0, stop_at_eos=False).result() == greedy(bundle, text, 2)
            with pytest.raises(CapacityError, match=f"exceed the {most} of a stream"):
                scheduler.submit_ids(text, 3)

    def test_more_streams_than_rows(self, engines: Engines) -> None:
        text = r"run up to 3 streams at a time, not 4: ask for fewer, or run blt build with --profiles .*rows=4"
        with pytest.raises(UsageError, match=text):
            Scheduler(Model.open(engines.path, batched=True), streams=4)

    @pytest.mark.parametrize(
        ("command", "asked"), [(["serve", "--streams"], 5), (["bench", "throughput", "--batch"], "1,5")]
    )
    def test_more_streams_than_rows_are_refused_before_a_device_is_asked(
        self,
        engines: Engines,
        command: list[str],
        asked: object,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("blt_runtime.backends.platform.open_platform", lambda: pytest.fail("asked"))
        assert run([*command, str(asked), str(engines.path)]) == 2
        assert "run up to 3 streams at a time, not 5: ask for fewer" in capsys.readouterr().err

    def test_single_streams_of_a_batched_model(self, engines: Engines) -> None:
        with pytest.raises(UsageError, match="use a Scheduler"):
            Model.open(engines.path, batched=True).stream()

    def test_a_folder_without_rows_names_the_command(self, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = f"holds no engines for batched streams: run blt build BUNDLE -o {single} --force --profiles "
        with pytest.raises(UsageError, match=text):
            Model.open(single, batched=True)
        for command in (["serve"], ["bench", "throughput"]):
            assert run([*command, str(single)]) == 2
            assert text in capsys.readouterr().err

    def test_hash_tables_stay_on_the_host(self, engines: Engines) -> None:
        with pytest.raises(UsageError, match="hash tables are on the host: leave out hash_tables"):
            Model.open(engines.path, batched=True, hash_tables="device")

    def test_another_machine(self, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("blt_runtime.backends.platform.open_platform", lambda: platform(gpu="Fake B200"))
        with pytest.raises(BackendError, match=r"on Fake H100 .*, but here is .* on Fake B200 .*: run blt build"):
            Model.open(engines.path, batched=True)

    def test_serve(self, bundle: Bundle, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("starlette")
        from tests.runtime.server.clients import Client

        def answers(app: Any, *_: Any, **__: Any) -> int:
            body = {"prompt": "abc", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
            answer = Client(app).ok("/v1/completions", **body)["choices"][0]["text"]
            assert answer == greedy(bundle, encode("abc", bos=True), 9).decode(errors="replace")
            app.state.service.scheduler.close()
            return 0

        monkeypatch.setattr("blt_runtime.server.run.serve", answers)
        assert run(["serve", str(engines.path), "--port", "0", "--streams", "2"]) == 0

    def test_bench_throughput(self, engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = ["--batch", "1", "--prompt-bytes", "10", "--new-bytes", "40", "--repeat", "1", "--json"]
        assert run(["bench", "throughput", str(engines.path), *sizes]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["backend"], [row["streams"] for row in found["streams"]]) == ("tensorrt", [1])
        sizes = ["--batch", "1", "--prompt-bytes", "100", "--new-bytes", "76"]
        assert run(["bench", "throughput", str(engines.path), *sizes]) == 1
        assert "are 177 tokens, but a stream holds 176" in capsys.readouterr().err


class TestCommand:
    @pytest.mark.usefixtures("_gpu")
    def test_a_build(self, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "engines"
        assert run(["build", str(bundle.path), "-o", str(out), "--profiles", "rows=2,prefill,step", "--no-check"]) == 0
        printed = capsys.readouterr().out
        assert run(["inspect", str(out)]) == 0
        for shown in (printed, capsys.readouterr().out):
            lines = {line.split("  ")[0]: line for line in shown.splitlines()}
            assert lines["latent of 2 streams"].rstrip().endswith("1 x 8, 8 x 8")
            assert lines["decoder of 2 streams"].rstrip().endswith("1, 8")
        assert Engines.open(out).check_rows().streams == 2

    @pytest.mark.parametrize(
        "profiles",
        [
            "",
            "step",
            "prefill",
            "rows=4",
            "step,rows=4",
            "step,prefill,",
            "step,prefill,rows",
            "step,prefill,rows=0",
            "step,prefill,rows=-1",
            "step,prefill,rows=1.5",
            "step,prefill,rows=1025",
            "step,prefill,rows=99999999999999999999",
            "step,prefill,rows=4,rows=8",
            "step,step,prefill",
            "step,prefill,pass",
        ],
    )
    def test_profiles_that_are_none(
        self, bundle: Bundle, tmp_path: Path, profiles: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["build", str(bundle.path), "-o", str(tmp_path / "e"), "--profiles", profiles]) == 2
        error = capsys.readouterr().err
        assert "give step,prefill (single streams) or step,prefill,rows=N (and N batched streams, 1 to 1024)" in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("profiles", "rows"), [("step,prefill", None), ("prefill, step", None), ("rows=1024,step,prefill", 1024)]
    )
    def test_profiles(self, profiles: str, rows: int | None) -> None:
        assert rows_of(profiles) == rows

    def test_an_export_without_room_for_padding(self, bundle: Bundle, tmp_path: Path) -> None:
        spec = export_spec(tiny(VARIANT), "portable", capacity=16, patches=None, chunk=16)
        short = Bundle(bundle.path, replace(bundle.manifest, spec=spec))
        with pytest.raises(BackendError, match="need an export with a --capacity above 16"):
            build_engines(short, tmp_path / "e", platform(), batched=2)
        assert list(tmp_path.iterdir()) == []


class TestProfiles:
    @pytest.fixture
    def spec(self, bundle: Bundle) -> ModelSpec:
        return resident_spec(bundle.manifest.spec, cached=True)

    @pytest.mark.parametrize("graph", ["entropy", "encoder", "decoder"])
    def test_bytes_are_one_or_eight_of_every_row(self, spec: ModelSpec, graph: str) -> None:
        assert [p["positions"] for p in profiles(spec, graph, 5)] == [((5, 1),) * 3, ((5, 8),) * 3]

    @pytest.mark.parametrize("width", [16, 4096])
    @pytest.mark.parametrize("rows", [1, 16, 512])
    def test_every_call_of_padded_rows_has_a_profile_and_none_gathers_too_much(
        self, spec: ModelSpec, rows: int, width: int
    ) -> None:
        """States of 64 bytes and of 16 KiB. A call of one patch of every row is the least that there is."""
        large = replace(with_states(spec, width), patch_rule=PatchRule("space"))
        ranges = profiles(large, "latent", rows)
        most = padded_entries(padded_spec(large.graphs["latent"]), rows)
        for length in sorted({entries(n) for n in range(1, 193)}):
            assert any(takes(profile, 1, length) for profile in ranges)
            assert any(takes(profile, PADDED, length) for profile in ranges) == (length <= most)
        assert most == 8 or rows * PADDED * most * 4 * width <= GATHER_BYTES < 2 * rows * PADDED * most * 4 * width


def takes(profile: Profile, patches: int, length: int) -> bool:
    least, _, most = profile["byte_index"]
    return least[1] <= patches <= most[1] and least[2] <= length <= most[2]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_builds_all_padded_graphs_with_these_profiles(tmp_path: Path) -> None:
    """The real builder, which needs no GPU; other precisions are in test_aot."""
    import tensorrt_rtx

    bundle, log = exported(tmp_path, "bf16"), logger(tensorrt_rtx)
    spec = resident_spec(bundle.manifest.spec, cached=True)
    for name, graph in spec.graphs.items():
        built = build_graph(bundle, graph, tensorrt_rtx, log, profiles(spec, name, 16), streams=16)
        assert set(built.outputs) == {tensor.name for tensor in padded_spec(graph).outputs}
        assert built.plan.nbytes > 0
