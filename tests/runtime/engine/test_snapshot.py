"""Restoring a snapshot in any stream gives the state that it was taken from, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from blt_runtime import Stream
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.errors import UsageError
from blt_runtime.ids import BOS, EOS
from blt_runtime.sampling import Sampler
from tests.runtime.speculation.scripted import Oracle, Script
from tests.runtime.streams import SPECS, model_of, random_ids

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def same(one: Stream, other: Stream) -> None:
    assert one.position == other.position
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.patch_lengths, other.patch_lengths)
    np.testing.assert_array_equal(one.logits, other.logits)


def continue_with(stream: Stream, ids: np.ndarray) -> None:
    """Single steps, chunks, and a rewind."""
    for id in ids[:7]:
        stream.append_ids([id])
    stream.append_ids(ids[7:])
    stream.rewind(len(ids) // 2)
    stream.append_ids(ids[::-1])


@specs
@pytest.mark.parametrize("length", [0, 1, 9, 60, 150])
def test_a_restored_stream_continues_identically(spec: ModelSpec, length: int) -> None:
    model = model_of(spec)
    first, more = random_ids(length, seed=length), random_ids(30, seed=5)
    stream = model.stream()
    stream.append_ids(first)
    snapshot = stream.snapshot()
    assert snapshot.position == length + 1
    assert snapshot.nbytes > 0
    before = model.stream()
    before.append_ids(first)
    continue_with(stream, more)
    for other in (model.stream(bos=False), model.stream(), stream):  # empty, with BOS, and continued
        other.restore(snapshot)
        same(other, before)
        continue_with(other, more)
        same(other, stream) if other is not stream else None
    continue_with(before, more)
    same(before, stream)


@specs
def test_a_snapshot_between_drafts(spec: ModelSpec) -> None:
    """Caches were written beyond the stream's position, without effect on the results."""
    model, ids = model_of(spec), random_ids(60, seed=3)
    stream, plain = model.stream(), model.stream()
    taken = []
    for _ in stream.generate_ids(
        len(ids), sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 0.9), draft=6
    ):
        taken.append(stream.snapshot())
    plain.append_ids(ids[:20])
    other = model.stream()
    other.append_ids(random_ids(90, seed=8))
    for snapshot in taken[::7]:
        other.restore(snapshot)
        plain = model.stream()
        plain.append_ids(ids[: snapshot.position - 1])
        same(other, plain)
        continue_with(other, ids)
        continue_with(plain, ids)
        same(other, plain)


def test_drafts_of_an_earlier_text_are_dropped() -> None:
    model, ids = model_of(next(iter(SPECS.values()))), random_ids(40, seed=4)
    stream = model.stream()
    start = stream.snapshot()
    for i, _ in enumerate(
        stream.generate_ids(len(ids), sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 1.0), draft=6)
    ):
        if i == 11:
            stream.restore(start)
    plain = model.stream()
    plain.append_ids(ids[12:])
    same(stream, plain)


def test_a_damaged_stream_is_repaired_and_its_document_continues() -> None:
    model = model_of(next(iter(SPECS.values())))
    stream = model.stream()
    stream.append_ids([10, EOS, BOS, 12, 13])
    snapshot = stream.snapshot()
    broken = model.stream()
    broken._damaged = True
    broken.restore(snapshot)
    broken.append_ids([14, 15])
    stream.append_ids([14, 15])
    same(broken, stream)
    assert list(broken.generate_ids(5, sampler=Sampler(0.0), stop_at_eos=False)) == list(
        stream.generate_ids(5, sampler=Sampler(0.0), stop_at_eos=False)
    )


def test_a_snapshot_is_read_only_and_of_one_model() -> None:
    first, second = (model_of(spec) for spec in list(SPECS.values())[:2])
    snapshot = first.stream().snapshot()
    assert all(not array.flags.writeable for array in snapshot.arrays.values())
    with pytest.raises(UsageError, match="another model"):
        second.stream().restore(snapshot)
