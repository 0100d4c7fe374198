"""Streams that are full, in bytes, in patches or in both: a text fits or does not fit, however it is read; a refusal
changes nothing; and a full stream rewinds to every position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from blt_runtime import Model, Scheduler, Stream
from blt_runtime.backends.null import NullBackend
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.engine.batch import Batch, Row
from blt_runtime.engine.memory import Memory
from blt_runtime.errors import CapacityError
from blt_runtime.patching import patch_lengths
from tests.pairwise import pairwise
from tests.runtime.null_reference import Expected, cache_of, compute
from tests.runtime.row_backend import NullRowBackend
from tests.runtime.speculation.scripted import Oracle, Script
from tests.runtime.streams import SPECS, model_of, random_ids, tables_for

TEXT = random_ids(90, seed=21)
TEXT[1:][TEXT[1:] == 1] = 9  # one BOS only
BYTES = 44


class Full:
    """A spec whose limits a text reaches, and what the reference computes. `fits`: the tokens of TEXT that fit."""

    def __init__(self, name: str, limit: str) -> None:
        spec = SPECS[name]
        self.expected: Expected = compute(spec, TEXT, tables_for(spec))
        # complete patches after each number of tokens, counted from their ends
        ends = np.cumsum(self.expected.patch_lengths)[:-1]
        complete = [int((ends <= n).sum()) for n in range(len(TEXT) + 1)]
        patches = complete[BYTES]
        limits = {
            "bytes": {"capacity_bytes": BYTES},
            "patches": {"capacity_bytes": 400, "capacity_patches": max(1, patches // 2)},
            "both": {"capacity_bytes": BYTES, "capacity_patches": max(1, patches)},
        }[limit]
        self.spec: ModelSpec = replace(spec, **cast(Any, limits), chunk=min(spec.chunk, BYTES))
        held = [n for n in range(len(TEXT)) if complete[n] <= self.spec.capacity_patches]
        self.fits = min(max(held), self.spec.capacity_bytes)
        assert self.fits < len(TEXT) - 2

    def stream(self) -> Stream:
        return model_of(self.spec).stream(bos=False)

    def check(self, stream: Stream, tokens: int) -> None:
        """The stream has read the first `tokens` of TEXT, and nothing else."""
        assert stream.ids.tolist() == TEXT[:tokens].tolist()
        ends = np.cumsum(self.expected.patch_lengths)[:-1]
        lengths = np.diff([0, *ends[ends <= tokens], tokens + 1])
        assert stream.patch_lengths.tolist() == lengths.tolist()
        if tokens:
            np.testing.assert_array_equal(stream.logits, self.expected.logits[tokens - 1].astype(np.float32))


LIMITS = ("bytes", "patches", "both")


def is_filled(name: str, limit: str) -> bool:
    """Patches that are too long never use up the capacity in patches."""
    return limit == "bytes" or name not in ("huge patches", "long patches")


CASES = {f"{name}, {limit}": (name, limit) for name in SPECS for limit in LIMITS if is_filled(name, limit)}
cases = pytest.mark.parametrize(("name", "limit"), CASES.values(), ids=CASES.keys())


def state(stream: Stream) -> dict[str, Any]:
    """Everything that a later result depends on, to the last bit."""
    snapshot = stream.snapshot()
    return {
        "position": snapshot.position,
        "patches": snapshot.patches,
        "marks": [(mark.position, mark.patches) for mark in snapshot.marks],
        "forgotten": snapshot.forgotten,
        **{name: array.tobytes() for name, array in snapshot.arrays.items()},
    }


@cases
def test_a_text_fits_at_once_and_in_any_parts_or_in_none(name: str, limit: str) -> None:
    full = Full(name, limit)
    rng = np.random.default_rng(5)
    for cuts in ([], range(1, full.fits), sorted(rng.choice(full.fits, 5)), [full.fits - 1]):
        stream = full.stream()
        for part in np.split(TEXT[: full.fits], list(cuts)):
            stream.append_ids(part)
        full.check(stream, full.fits)
        before = state(stream)
        for more in (1, 2, len(TEXT) - full.fits):
            with pytest.raises(CapacityError):
                stream.append_ids(TEXT[full.fits : full.fits + more])
            assert state(stream) == before
        with pytest.raises(CapacityError):
            list(stream.generate_ids(1, sampler=Script(TEXT[full.fits :]), stop_at_eos=False))
        assert state(stream) == before


@cases
def test_a_part_that_does_not_fit_is_refused_wherever_it_begins(name: str, limit: str) -> None:
    full = Full(name, limit)
    stream = full.stream()
    for at in range(full.fits):
        before = state(stream)
        with pytest.raises(CapacityError):
            stream.append_ids(TEXT[at : full.fits + 1])
        assert state(stream) == before
        stream.append_ids(TEXT[at : at + 1])
    full.check(stream, full.fits)


@cases
def test_a_full_stream_rewinds_to_every_position_and_fills_again(name: str, limit: str) -> None:
    full = Full(name, limit)
    stream = full.stream()
    stream.append_ids(TEXT[: full.fits])
    kept = stream.snapshot()
    for back in range(full.fits + 1):
        stream.restore(kept)
        stream.rewind(back)
        full.check(stream, full.fits - back)
        stream.append_ids(TEXT[full.fits - back : full.fits])
        full.check(stream, full.fits)
    for tokens in range(full.fits - 1, -1, -1):
        stream.rewind(1)
        full.check(stream, tokens)


@pytest.mark.parametrize(
    ("name", "limit", "source"),
    pairwise(tuple(SPECS), LIMITS, (None, "entropy", "decoder"), allowed=lambda case: is_filled(*case[:2])),
)
def test_speculation_fills_a_stream_as_plain_decoding_does(name: str, limit: str, source: Any) -> None:
    full = Full(name, limit)
    if source == "entropy" and not full.spec.patch_rule.needs_entropy:
        source = None
    stream = full.stream()
    stream.append_ids(TEXT[:3])
    made = stream.generate_ids(
        90, sampler=Script(TEXT[3:]), stop_at_eos=False, speculate=Oracle(TEXT, 0, 0.8, source), draft=5
    )
    written: list[int] = []
    with pytest.raises(CapacityError):
        written.extend(made)
    assert written == TEXT[3 : full.fits].tolist()
    full.check(stream, full.fits)
    for back in (1, 2, 5):
        stream.rewind(back)
        full.check(stream, full.fits - back)
        again = stream.generate_ids(
            back,
            sampler=Script(TEXT[full.fits - back :]),
            stop_at_eos=False,
            speculate=Oracle(TEXT, 0, 0.8, source),
            draft=5,
        )
        assert len(list(again)) == back
        full.check(stream, full.fits)


@cases
def test_a_batch_reads_what_a_stream_reads(name: str, limit: str) -> None:
    full = Full(name, limit)
    window = cache_of(full.spec, "encoder").kind == "window"
    backend = NullRowBackend(full.spec) if window else NullBackend(full.spec)
    for prompt in (1, full.fits - 1, full.fits):
        batch = Batch(full.spec, backend, tables_for(full.spec), 2, slice=3)
        row = batch.open()
        assert row is not None
        row.feed(TEXT[:prompt])
        for t in range(prompt, full.fits + 1):
            while not row.done:
                batch.round()
                assert row.error is None
            np.testing.assert_array_equal(row.logits_V, full.expected.logits[t - 1].astype(np.float32))
            if t < full.fits:
                row.feed(TEXT[t : t + 1])
        with pytest.raises(CapacityError):
            read_one(batch, row, TEXT[full.fits : full.fits + 1])


def read_one(batch: Batch, row: Row, id_1: np.ndarray) -> None:
    row.feed(id_1)
    while not row.done:
        batch.round()
        if row.error is not None:
            raise row.error


@cases
def test_requests_write_what_fits_a_stream(name: str, limit: str) -> None:
    full = Full(name, limit)
    tokens = min(full.spec.capacity_bytes, len(TEXT) - 1)
    with Scheduler(Model(full.spec, NullBackend(full.spec), tables_for(full.spec)), streams=2, slice=4) as scheduler:
        for prompt in (1, full.fits // 2, full.fits):
            fitting = scheduler.submit_ids(
                TEXT[:prompt], full.fits - prompt + 1, sampler=Script(TEXT[prompt:]), stop_at_eos=False
            )
            assert len(fitting.result()) <= full.fits
            assert (fitting.finish, fitting.generated) == ("length", full.fits - prompt + 1)
        if full.fits < tokens:
            with pytest.raises(CapacityError, match="patches"):
                scheduler.submit_ids(
                    TEXT[: full.fits], 3, sampler=Script(TEXT[full.fits :]), stop_at_eos=False
                ).result()
        assert scheduler.load == (0, 0)


@cases
def test_scores_fit_where_a_stream_fits(name: str, limit: str) -> None:
    full = Full(name, limit)
    stream = full.stream()
    stream.append_ids(TEXT[:5])
    before = state(stream)
    if limit != "patches":
        with pytest.raises(CapacityError):
            stream.score_ids(TEXT[: BYTES + 1])
        assert state(stream) == before
    score = stream.score_ids(TEXT[: full.fits])
    np.testing.assert_array_equal(score.logits, full.expected.logits[: full.fits].astype(np.float32))


def test_a_replay_that_computes_one_patch_more_keeps_the_patches_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropies next to the threshold may fall on its other side when they are computed in another call."""
    full = Full("ring", "both")
    stream = full.stream()
    stream.append_ids(TEXT[: full.fits])
    check, refused = Memory.check_patches, list[int]()

    def once(memory: Memory, patches: int) -> None:
        if not refused:
            refused.append(patches)
            raise CapacityError("one more")
        check(memory, patches)

    monkeypatch.setattr(Memory, "check_patches", once)
    stream.rewind(2)
    assert refused
    full.check(stream, full.fits - 2)
    assert stream.patch_lengths.tolist() == patch_lengths_of(full, full.fits - 2)


def patch_lengths_of(full: Full, tokens: int) -> list[int]:
    lengths: list[int] = patch_lengths(full.spec.patch_rule, TEXT[:tokens], full.expected.entropies[:tokens]).tolist()
    return lengths
