"""`blt bench`: reports, tables, figures, and what can be wrong. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.bench import PARTS
from blt.bench.machine import MemoryReader
from blt.checkpoint.models import save
from blt.cli.commands import bench as commands
from blt.figures.costs import Bar, Bars, duration, render
from blt_runtime import Model
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import UsageError
from tests.runtime.device_backend import FarBackend
from tests.tiny import runs_rows, tiny

Call = Callable[..., Any]
SIZES = ["--prompt-bytes", "24", "--new-bytes", "17", "--repeat", "2", "--threads", "1"]
KEYS = {
    "schema", "kind", "model", "backend", "precision", "cpu", "patch_rule", "open_s", "threads", "prompt_bytes",
    "new_bytes", "repeat", "load_average", "bytes_per_s", "bytes_per_s_of_runs", "time_to_first_byte_s", "gap_p50_s",
    "gap_p95_s", "prefill_bytes_per_s", "mean_patch_bytes", "weight_bytes_per_byte", "read_bandwidth",
    "floor_bytes_per_s", "share_of_floor", "peak_bytes", "resident_hash_table_bytes", "seconds_per_byte",
    "host_s_per_byte", "latent_call_s", "calls_per_byte", "speculation", "provider", "captured_graphs",
    "requests_per_byte",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random BLT as model.pt and as a bundle, one with static patches, and the first one's entropy model."""
    from blt_export import export

    folder = tmp_path_factory.mktemp("bench")
    save(folder / "model.pt", tiny())
    save(folder / "static.pt", tiny("static"))
    export(tiny(), folder / "bundle", capacity=256, check=False)
    (folder / "text").write_bytes(b"All work and no play makes a dull text. " * 4)
    return {path.stem: path for path in folder.iterdir()} | {"tmp": folder}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt.bench.measure.MemoryReader", lambda threads: MemoryReader(threads, 1 << 16))


def report_of(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.text)
    assert report["schema"] == "blt.bench/1"
    return report


@pytest.mark.parametrize("model", ["bundle", "model"])
def test_latency_reports_everything(blt: Call, models: dict[str, Path], model: str) -> None:
    report = report_of(blt("bench", "latency", models[model], *SIZES, "--json"))
    assert set(report) == KEYS
    assert report["backend"] == {"bundle": "onnx", "model": "torch"}[model]
    assert (report["prompt_bytes"], report["new_bytes"], report["repeat"], report["threads"]) == (24, 17, 2, 1)
    assert len(report["bytes_per_s_of_runs"]) == 2
    read = report["weight_bytes_per_byte"]
    assert set(read) == {"entropy", "encoder", "latent", "decoder", "hashing", "total"}
    assert min(read.values()) > 0
    assert read["total"] == pytest.approx(sum(n for part, n in read.items() if part != "total"))
    assert report["floor_bytes_per_s"] == pytest.approx(report["read_bandwidth"]["bytes_per_s"] / read["total"])
    assert report["share_of_floor"] == pytest.approx(report["bytes_per_s"] / report["floor_bytes_per_s"])
    spent = report["seconds_per_byte"]
    assert tuple(spent) == (*PARTS, "total")
    assert spent["total"] == pytest.approx(sum(spent[part] for part in PARTS))
    calls = report["calls_per_byte"]
    assert calls == {**dict.fromkeys(PARTS[:-1], 1.0), "latent": pytest.approx(1 / report["mean_patch_bytes"])}
    assert report["latent_call_s"] * calls["latent"] == pytest.approx(spent["latent"])
    assert report["speculation"] is None
    assert report["provider"] == {"bundle": "cpu", "model": None}[model]
    assert report["captured_graphs"] is None
    assert report["requests_per_byte"] is None
    assert report["host_s_per_byte"] == pytest.approx(sum(spent[part] for part in ("hashing", "sampling", "other")))
    assert report["gap_p95_s"] >= report["gap_p50_s"] > 0


def test_weight_bytes_use_the_mean_patch_of_the_run(blt: Call, models: dict[str, Path]) -> None:
    report = report_of(blt("bench", "latency", models["bundle"], *SIZES, "--json"))
    shown = blt("inspect", models["bundle"], "--json", "--patch-size", report["mean_patch_bytes"]).text
    of_inspect = json.loads(shown)["weight_bytes_per_byte"]
    of_inspect["hashing"] = of_inspect.pop("hash_tables")
    assert report["weight_bytes_per_byte"] == pytest.approx(of_inspect)


def test_speculation_reads_the_weights_of_its_calls(blt: Call, models: dict[str, Path]) -> None:
    arguments = ["bench", "latency", models["bundle"], "--text", models["text"], *SIZES[2:], "--prompt-bytes", "100"]
    report = report_of(blt(*arguments, "--speculate", "lookup", "--json"))
    assert report["speculation"]["right"] > 0
    assert report["calls_per_byte"]["decoder"] < 0.9
    plain = report_of(blt(*arguments, "--json"))
    read, plainly = report["weight_bytes_per_byte"], plain["weight_bytes_per_byte"]
    assert read["decoder"] == pytest.approx(plainly["decoder"] * report["calls_per_byte"]["decoder"])
    assert read["latent"] <= plainly["latent"]  # patches of accepted drafts run in one call, some before the first byte
    assert "drafts accepted" in blt(*arguments, "--speculate", "lookup").text


def test_a_rule_without_entropies_reads_no_entropy_model(blt: Call, models: dict[str, Path]) -> None:
    report = report_of(blt("bench", "latency", models["static"], *SIZES, "--json"))
    assert report["mean_patch_bytes"] == pytest.approx(16 / 3, abs=2)
    assert report["weight_bytes_per_byte"].get("entropy", 0) == 0
    assert report["seconds_per_byte"]["entropy"] == 0


def test_a_wanted_patch_size_and_a_given_text(blt: Call, models: dict[str, Path]) -> None:
    sizes = ["--prompt-bytes", "40", "--new-bytes", "101", "--text", models["text"], "--temperature", "0", "--json"]
    report = report_of(blt("bench", "latency", models["bundle"], *sizes, "--repeat", "1", "--patch-size", "4"))
    assert report["mean_patch_bytes"] == pytest.approx(4, rel=0.1)
    assert report["patch_rule"]["scheme"] == "entropy"


def test_the_table_shows_the_report(blt: Call, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blt("bench", "latency", models["bundle"], *SIZES, "--repeat", 1)
    assert "floor" not in shown.text  # of weights in the processor's caches it means nothing
    with monkeypatch.context() as patch:
        patch.setattr("blt.bench.measure.CACHES", 0)
        shown = blt("bench", "latency", models["bundle"], *SIZES)
    assert shown.code == 0, shown.err
    for words in ("bytes/s after the first byte", "p95", "floor", "reached", "GB/s", "where the time", "1 thread\n"):
        assert words in shown.text
    parts = [line.split()[0] for line in shown.text.splitlines() if line.split()]
    assert [part for part in parts if part in (*PARTS, "total")] == [*PARTS, "total"]


@pytest.mark.parametrize("name", ["figure.html", "figure.png"])
def test_a_figure_is_written(blt: Call, models: dict[str, Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / name
    assert blt("bench", "latency", models["bundle"], *SIZES, "--plot", out).code == 0
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_figures_pieces_are_end_to_end() -> None:
    bars = Bars([Bar("measured", {"entropy": 0.002, "hashing": 0.0, "latent": 0.006}), Bar("floor", {"latent": 0.004})])
    assert list(bars.bars[0].pieces()) == [("entropy", 0.0, 0.002), ("latent", 0.002, 0.006)]
    assert bars.parts() == ["entropy", "latent"]
    assert bars.longest == pytest.approx(0.008)
    with pytest.raises(UsageError):
        render(bars, "gif")
    assert [duration(s) for s in (2.5e-5, 0.0312, 6.96)] == ["25 µs", "31.2 ms", "6.96 s"]
    pytest.importorskip("matplotlib")
    page = render(bars, "html").decode()
    assert page.count("%</title>") == 3
    assert "latent: 6 ms, 75.0%" in page


@pytest.mark.parametrize("model", ["bundle", "static"])
def test_patching_alone(blt: Call, models: dict[str, Path], model: str) -> None:
    report = report_of(blt("bench", "patch", models[model], "--prompt-bytes", "90", "--json"))
    assert report["kind"] == "patch"
    assert report["bytes"] == 90
    assert report["bytes_per_s"] == pytest.approx(90 / (report["entropies_s"] + report["rule_s"]))
    assert (report["entropies_s"] > 0) == (model == "bundle")  # static patches need none
    assert "bytes/s: 90 bytes" in blt("bench", "patch", models[model], "--prompt-bytes", "90").text


@pytest.mark.skipif(not runs_rows(), reason="needs onnxruntime 1.32")
def test_batches_of_streams(blt: Call, models: dict[str, Path]) -> None:
    arguments = ["--batch", "1,3", "--prompt-bytes", "10", "--new-bytes", "120", "--repeat", "1", "--threads", "1"]
    report = report_of(blt("bench", "throughput", models["bundle"], *arguments, "--json"))
    assert (report["kind"], report["prompt_bytes"], report["new_bytes"]) == ("throughput", 10, 120)
    assert report["one_stream_bytes_per_s"] > 0
    one, three = report["streams"]
    assert (one["streams"], three["streams"]) == (1, 3)
    assert one["patches_per_latent_call"] == pytest.approx(1, abs=0.2)  # a prompt's slices end more than one
    assert one["gap_p95_while_a_prompt_is_read"] is None
    assert 1 < three["patches_per_latent_call"] <= 3.5
    assert three["gap_p95_s"] >= three["gap_p50_s"] > 0
    assert three["gap_p95_while_a_prompt_is_read"] > 0
    shown = blt("bench", "throughput", models["bundle"], *arguments).text
    assert "one stream alone" in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["1", "3"]


@pytest.mark.parametrize("kind", ["latency", "patch", "throughput"])
def test_a_model_smaller_than_the_usual_prompt_is_measured_with_what_fits(
    blt: Call, models: dict[str, Path], kind: str
) -> None:
    """The bundle holds 256 bytes."""
    if kind == "throughput" and not runs_rows():
        pytest.skip("needs onnxruntime 1.32")
    sizes = {"latency": ["--new-bytes", 20], "patch": [], "throughput": ["--new-bytes", 200, "--batch", 1]}[kind]
    result = blt("bench", kind, models["bundle"], *sizes, "--repeat", 1, "--threads", 1, "--json")
    report = report_of(result)
    prompt = {"latency": 235, "patch": 255, "throughput": 55}[kind]
    assert report["bytes" if kind == "patch" else "prompt_bytes"] == prompt
    assert f"there is room for 255 bytes: measuring with a prompt of {prompt}" in result.err


def test_lengths_that_were_given_stay() -> None:
    from blt.cli.commands.bench import Lengths

    usual = Lengths.of(None, None, usual=(512, 128), least_new=2)
    assert [usual.fitting(room) for room in (1000, 640, 100, 3)] == [(512, 128), (512, 128), (80, 20), (1, 2)]
    assert Lengths.of(None, None, usual=(64, 128), least_new=16).fitting(192) == (64, 128)
    assert Lengths.of("1k", None, usual=(512, 128), least_new=2).fitting(100) == (1024, 128)
    assert Lengths.of(None, "90", usual=(512, 128), least_new=2).fitting(100) == (10, 90)


WRONG = [
    (["latency", "{bundle}", "--new-bytes", "0"], 2, "--new-bytes 0: must be at least 2"),
    (["latency", "{bundle}", "--prompt-bytes", "0"], 2, "--prompt-bytes 0: must be at least 1"),
    (["latency", "{bundle}", "--prompt-bytes", "240"], 1, "a stream holds 256"),
    (["latency", "{bundle}", "--prompt-bytes", "8", "--plot", "x.gif"], 2, ".png or .html"),
    (["latency", "{bundle}", "--prompt-bytes", "8", "--plot", "{tmp}/no/x.png"], 2, "folder"),
    (["latency", "{bundle}", "--prompt-bytes", "100", "--text", "{text}"], 2, "160 bytes"),
    (["latency", "{bundle}", "--prompt-bytes", "100", "--text", "{tmp}/none"], 2, "no such file"),
    (["latency", "{bundle}", "--prompt-bytes", "8", "--patch-size", "500"], 2, "no threshold gives patches of 500"),
    (["latency", "{static}", "--prompt-bytes", "8", "--patch-size", "4"], 2, "'static'"),
    (["latency", "{bundle}", "--backend", "torch"], 2, "for --backend torch give the model.pt"),
    (["latency", "{bundle}", "--prompt-bytes", "8", "--speculate", "wildly"], 2, "'wildly' is unknown"),
    (["latency", "{static}", "--prompt-bytes", "8", "--speculate", "entropy"], 2, "choose 'decoder'"),
    (["latency", "no-such-model"], 2, "no such file"),
    (["patch", "{bundle}", "--prompt-bytes", "0"], 2, "--prompt-bytes 0"),
    (["patch", "{bundle}", "--prompt-bytes", "256"], 1, "capacity of 256"),
    (["patch", "{bundle}", "--prompt-bytes", "200", "--text", "{text}"], 2, "160 bytes"),
    (["throughput", "{model}"], 2, "blt export"),
    (["throughput", "{bundle}", "--batch", "2,none"], 2, "--batch"),
    (["throughput", "{bundle}", "--prompt-bytes", "200", "--new-bytes", "100"], 1, "a stream holds 256"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0])[:60] for w in WRONG])
def test_bad_input_is_one_line(blt: Call, models: dict[str, Path], arguments: list[str], code: int, words: str) -> None:
    if arguments[0] == "throughput" and not runs_rows():
        pytest.skip("needs onnxruntime 1.32")
    result = blt("bench", *(argument.format(**models) for argument in arguments))
    assert result.code == code, result.err
    assert result.out == b""
    assert result.err.startswith("blt: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_weights_and_captures_of_engines_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("blt_runtime.bundle.engines.is_engines", lambda path: path == tmp_path)
    spec = null_spec()
    model = Model(spec, FarBackend(spec))
    assert commands._weights(model, tmp_path, None) == {}
    assert commands._captured(model) is None
    found = {"launches": 1.2345, "copies": 2.0, "waits": 0.5}
    assert commands._requests(found) == "1.23 launches, 2.00 copies and 0.50 waits per byte"
    assert commands._requests({**found, "launches": None}).startswith("unknown launches, 2.00 copies")
    times = {"host_s_per_byte": 1.0, "seconds_per_byte": {"total": 4.0}}
    assert commands._host({**times, "captured_graphs": None}) == "25.0% of the time of a byte"
    assert commands._host({**times, "captured_graphs": []}).endswith("graphs that are captured: none")
    assert commands._host({**times, "captured_graphs": ["entropy"]}).endswith("captured: entropy")
