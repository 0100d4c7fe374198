"""The bench on the null backend: what it counts, and how its numbers are derived. No test depends on a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.bench import (
    PARTS,
    Forced,
    Latency,
    Run,
    Text,
    at_patch_size,
    bench_text,
    latency,
    machine,
    patching,
    run,
    split,
)
from blt.bench.machine import Bandwidth, MemoryReader
from blt.bench.parts import Clock, Split
from blt_runtime import Model
from blt_runtime.backends.null import NullBackend, NullSession, null_spec
from blt_runtime.backends.protocol import Buffer, Call
from blt_runtime.bundle.spec import HashSpec, ModelSpec
from blt_runtime.errors import CapacityError, InputError, UsageError
from blt_runtime.ids import EOS, VOCAB, encode
from blt_runtime.patching import PatchRule
from blt_runtime.speculation.speculate import Speculate
from tests.runtime.device_backend import FarBackend
from tests.runtime.streams import calls_of

HASH = HashSpec((3, 4), 1, 50, 4)
PER_CALL = {"entropy": 100.0, "latent": 125.0}


def null_model(rule: PatchRule | None = None, **options: Any) -> Model:
    spec = null_spec(rule, hash=HASH, **options)
    tables = np.random.default_rng(0).integers(0, 9, (HASH.tables * HASH.rows, HASH.dim)).astype(np.float32)
    return Model(spec, NullBackend(spec), tables)


def text(prompt: int = 20, new: int = 24) -> Text:
    return Text.of(bench_text(prompt + new), prompt, new)


def small_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt.bench.measure.MemoryReader", lambda threads: MemoryReader(threads, 1 << 16))


def test_the_text_is_english_and_always_the_same() -> None:
    assert bench_text(300) == bench_text(5000)[:300]
    assert len(bench_text(5000)) == 5000
    words = bench_text(5000).decode().split()
    assert len(set(words)) > 100
    assert 3 < len(bench_text(5000)) / len(words) < 7


def test_a_run_reads_the_given_bytes_and_samples_each() -> None:
    model, given = null_model(), text()
    stream, sampler, random = model.stream(), Forced(given.new.tolist(), 0.8), np.random.default_rng(0)
    done = run(stream, given, sampler)
    assert stream.ids.tolist() == [1, *given.prompt, *given.new]
    random.random(len(given.new))  # a number for each byte
    assert sampler.draw() == random.random()
    assert len(done.gaps_s) == len(given.new) - 1
    assert 0 < done.prefill_s < done.first_byte_s
    assert min(done.gaps_s) > 0
    assert done.bytes_per_s == pytest.approx(len(done.gaps_s) / sum(done.gaps_s))


class EosBackend(NullBackend):
    """A model that gives EOS the highest logit at every step."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._sessions["decoder"] = EosSession(self, spec.graphs["decoder"])


class EosSession(NullSession):
    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        call = super().bind(buffers)

        def both() -> None:
            call()
            buffers["logits"].array[...] = np.where(np.arange(VOCAB) == EOS, 0.0, -100.0)

        return both


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_eos_does_not_end_a_run(temperature: float) -> None:
    plain = null_model()
    model = Model(plain.spec, EosBackend(plain.spec), plain.hash_tables)
    assert list(model.stream().generate_ids(5, temperature=0, stop_at_eos=True)) == []
    stream, given = model.stream(), text()
    run(stream, given, Forced(given.new.tolist(), temperature))
    assert stream.ids.tolist()[-len(given.new) :] == given.new.tolist()


@pytest.mark.parametrize("rule", [None, PatchRule("static", patch_size=5), PatchRule("byte")], ids=str)
def test_latent_calls_of_the_timed_part_are_counted(rule: PatchRule | None) -> None:
    model, given = null_model(rule), text()
    calls = calls_of(model)
    stream = model.stream()

    def reset() -> None:
        calls["latent"] = 0

    done = run(stream, given, Forced(given.new.tolist(), 0.0), after_first=reset)
    assert done.closed == calls["latent"] > 0
    assert done.mean_patch == len(done.gaps_s) / done.closed


@pytest.mark.parametrize("speculate", ["lookup", "entropy", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_byte_and_its_calls_are_counted(speculate: Speculate, temperature: float) -> None:
    model, given = null_model(), Text.of(b"one and two and " * 8, 64, 64)
    stream = model.stream()
    done = run(stream, given, Forced(given.new.tolist(), temperature), speculate=speculate)
    assert stream.ids.tolist() == [1, *given.prompt, *given.new]
    assert done.speculation.tokens == 64
    parts = split(model, given, temperature, speculate=speculate)
    assert parts.calls["sampling"] == 63
    if speculate == "entropy":
        return  # the null entropy model has no draft accepted
    assert done.speculation.passes < 60
    assert done.speculation.accepted > 0
    assert parts.calls["decoder"] < 60
    if speculate == "lookup":
        assert parts.calls["decoder"] == parts.calls["encoder"]


def test_a_run_without_a_complete_patch_has_an_infinite_mean_patch_size() -> None:
    model, given = null_model(PatchRule("static", patch_size=400)), text()
    done = run(model.stream(), given, Forced(given.new.tolist(), 0.0))
    assert done.closed == 0
    assert done.mean_patch == math.inf
    parts = split(model, given, 0.8)
    assert parts.latent_call_s is None


def test_the_split_sums_to_the_whole_and_counts_every_call() -> None:
    model, given = null_model(), text()
    parts = split(model, given, 0.8)
    n = len(given.new) - 1
    assert tuple(parts.seconds) == PARTS
    assert min(parts.seconds.values()) > 0
    assert parts.total_s == pytest.approx(sum(parts.seconds.values()))
    assert {p: parts.calls[p] for p in PARTS if p != "latent"} == {
        **dict.fromkeys(("entropy", "hashing", "encoder", "decoder", "sampling"), n),
        "other": 0,
    }
    done = run(model.stream(), given, Forced(given.new.tolist(), 0.8))
    assert parts.calls["latent"] == done.closed
    assert parts.latent_call_s == pytest.approx(parts.seconds["latent"] * n / done.closed)


def test_the_clock_adds_time_and_calls_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr("blt.bench.parts.time.perf_counter", lambda: next(ticks))
    clock = Clock()
    clock.clear()
    call = clock.timed("encoder", lambda x: x + 1)
    assert (call(1), call(2)) == (2, 3)
    assert clock.seconds["encoder"] == 0.75
    assert clock.calls["encoder"] == 2
    clock.clear()
    assert clock.seconds["encoder"] == clock.calls["encoder"] == 0


def measured() -> Latency:
    runs = [
        Run(prefill_s=2.0, first_byte_s=2.5, gaps_s=[0.1] * 10, closed=4),
        Run(prefill_s=1.0, first_byte_s=1.5, gaps_s=[0.2] * 9 + [1.2], closed=4),
        Run(prefill_s=3.0, first_byte_s=3.5, gaps_s=[0.4] * 10, closed=4),
    ]
    parts = Split(dict.fromkeys(PARTS, 0.01), {**dict.fromkeys(PARTS, 10), "latent": 4}, 10)
    return Latency(
        runs=runs,
        split=parts,
        bandwidth=Bandwidth(bytes_per_s=3000.0, method="x", buffer_bytes=10, threads=2),
        threads=2,
        per_call=PER_CALL,
        peak_bytes=1,
        tables_bytes=None,
        prompt_bytes=20,
    )


def test_medians_percentiles_and_the_floor() -> None:
    found = measured()
    assert found.bytes_per_s == pytest.approx(1 / 0.3)  # runs: 10, 3.33 and 2.5 bytes/s
    assert (found.first_byte_s, found.prefill_s) == (2.5, 2.0)
    assert found.gap_s(50) == pytest.approx(0.2)
    gaps = sorted([0.1] * 10 + [0.2] * 9 + [1.2] + [0.4] * 10)
    assert found.gap_s(95) == pytest.approx(np.percentile(gaps, 95))
    assert found.gap_s(100) == pytest.approx(1.2)
    assert found.weights == pytest.approx({"entropy": 100.0, "latent": 50.0})  # 4 latent calls in 10 bytes
    assert found.floor_bytes_per_s == pytest.approx(20.0)
    assert found.share_of_floor == pytest.approx(found.bytes_per_s / 20.0)
    assert found.floor_s() == pytest.approx({"entropy": 100 / 3000, "latent": 50 / 3000})
    unknown = replace(found, per_call={})
    assert unknown.floor_bytes_per_s is unknown.share_of_floor is None
    assert not found.on_device


def test_latency_measures_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    small_reader(monkeypatch)
    found = latency(null_model(), text(), PER_CALL, repeat=3, temperature=0.8, threads=1)
    assert len(found.runs) == 3
    assert found.weights["latent"] == pytest.approx(125 / found.mean_patch)
    assert found.bandwidth is not None
    assert found.bandwidth.bytes_per_s > 0
    assert found.bandwidth.method in ("numpy bitwise_or", "memchr")
    assert found.peak_bytes > 1 << 20
    assert found.share_of_floor is not None


def test_a_device_that_cannot_be_measured_has_no_floor() -> None:
    """Main memory's bandwidth says nothing about it."""
    spec = null_spec()
    found = latency(Model(spec, FarBackend(spec)), text(), PER_CALL, repeat=2, temperature=0.8, threads=1)
    assert found.on_device
    assert (found.bandwidth, found.floor_bytes_per_s, found.share_of_floor) == (None, None, None)
    assert found.floor_s() == {}
    assert found.split.host_s < found.split.total_s


@pytest.mark.parametrize("rule", [PatchRule(threshold=3.5), PatchRule(threshold=0.0, monotonic=True)], ids=str)
@pytest.mark.parametrize("mean", [2.0, 4.0])
def test_a_wanted_patch_size_is_met(rule: PatchRule, mean: float) -> None:
    model, given = null_model(rule), text(30, 200)
    chosen = at_patch_size(model, [given], mean)
    assert model.spec.patch_rule == rule  # the model itself stays
    done = run(chosen.stream(), given, Forced(given.new.tolist(), 0.0))
    assert done.mean_patch == pytest.approx(mean, rel=0.05)


def test_a_patch_size_needs_a_threshold() -> None:
    with pytest.raises(UsageError, match="'byte'"):
        at_patch_size(null_model(PatchRule("byte")), [text()], 4.5)
    with pytest.raises(UsageError, match="no threshold gives patches of 300"):
        at_patch_size(null_model(), [text()], 300)


def test_text_that_does_not_fit_or_is_too_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    small_reader(monkeypatch)
    for prompt, new in ((0, 8), (8, 0), (8, 1)):
        with pytest.raises(UsageError, match="at least 1 byte of prompt and 2 new bytes"):
            Text.of(b"x" * 100, prompt, new)
    with pytest.raises(InputError, match="5 bytes"):
        Text.of(b"x" * 5, 3, 3)
    with pytest.raises(CapacityError, match="a stream holds 512"):
        latency(null_model(), text(500, 12), {}, repeat=1, temperature=0.0, threads=1)
    latency(null_model(), text(499, 12), {}, repeat=1, temperature=0.0, threads=1)  # just fits


def test_patching_alone_finds_the_streams_patches() -> None:
    for rule in (None, PatchRule("space"), PatchRule(threshold=3.0, reset_newlines=True)):
        model, data = null_model(rule), bench_text(150).replace(b". ", b"\n")
        found = patching(model, data, 2)
        assert not any(n for graph, n in calls_of(model).items() if graph != "entropy")
        stream = model.stream()
        stream.append(data)
        lengths = [n for n in [*stream.patch_lengths[:-1], stream.patch_lengths[-1] - 1] if n]  # no virtual token
        assert found.mean_patch == pytest.approx(len(data) / (len(lengths) - 1))
        assert found.n == len(data)
        assert found.bytes_per_s == pytest.approx(found.n / (found.entropies_s + found.rule_s))
    with pytest.raises(UsageError):
        patching(null_model(), b"", 1)
    with pytest.raises(CapacityError):
        patching(null_model(), bench_text(512), 1)


def test_a_sweep_reads_the_whole_buffer_on_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PIECE", 1 << 12)
    reader = MemoryReader(2, (1 << 16) + 8 * 3)
    read = []
    monkeypatch.setattr(reader, "_methods", {"watched": lambda piece: read.append(piece.nbytes)})
    best = reader.sample()
    assert sum(read) == machine.SWEEPS * best.buffer_bytes == machine.SWEEPS * ((1 << 16) + 24)
    assert (best.method, best.threads) == ("watched", 2)
    assert reader.sample().bytes_per_s >= best.bytes_per_s
    reader.close()


def test_each_method_reads_the_whole_piece() -> None:
    piece = np.full(1000, 0x0101010101010101, dtype=np.uint64)
    for name, read in machine._methods().items():
        if name == "memchr":
            assert read(piece) is None
            piece[-1] = 1 << 8  # a zero byte in the last word
            assert read(piece) == piece.ctypes.data + 999 * 8
        else:
            assert read(np.append(piece, np.uint64(1 << 63))) == 0x8101010101010101


def test_resident_bytes_of_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "rows_of_a_test.npy"
    np.save(path, np.zeros(1 << 18))
    assert machine.resident_bytes(path.name) in (0, None)
    mapped = np.load(path, mmap_mode="r")
    mapped.sum()
    assert machine.resident_bytes(path.name) in (None, *range(1 << 21, (1 << 21) + 8192))


def test_ids_of_the_text_are_bytes_alone() -> None:
    given = text(4, 6)
    assert np.concatenate([given.prompt, given.new]).tolist() == encode(bench_text(10), bos=False).tolist()
