"""Batch invariance: each row's results are those of a single stream, whatever the other rows do."""

from __future__ import annotations

import numpy as np
import pytest

from blt_runtime import PatchRule
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.bundle.spec import CacheKind, ModelSpec
from blt_runtime.engine.batch import Batch, fitted, gather
from blt_runtime.engine.rows import RowCalls
from blt_runtime.errors import CapacityError, UsageError
from blt_runtime.ids import EOS
from tests.runtime.engine.batches import read_texts
from tests.runtime.null_reference import cache_of, compute
from tests.runtime.row_backend import NullRowBackend
from tests.runtime.streams import SPECS, random_ids, tables_for


def batch_of(spec: ModelSpec, rows: int, slice: int = 5, share: float = 0.5) -> Batch:
    return Batch(spec, NullBackend(spec), tables_for(spec), rows, slice, gather(share))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_every_row_matches_the_reference(name: str, share: float) -> None:
    spec = SPECS[name]
    lengths, prompts = {0: 60, 1: 7, 2: 90, 3: 33}, {0: 1, 1: 6, 2: 70, 3: 20}
    texts = {i: random_ids(n, seed=i) for i, n in lengths.items()}
    seen = read_texts(batch_of(spec, rows=4, share=share), texts, prompts)
    for i, ids in texts.items():
        expected = compute(spec, ids, tables_for(spec)).logits.astype(np.float32)
        np.testing.assert_array_equal(np.array(seen[i]), expected[prompts[i] - 1 :])


@pytest.mark.parametrize("kind", ["ring", "window"])
@pytest.mark.parametrize("slice", [4, 8])
def test_patches_of_two_documents_in_one_slice(kind: CacheKind, slice: int) -> None:
    """A patch that an EOS is in the middle of, and the next one, which begins a document, close in the same slice."""
    spec = null_spec(PatchRule("static", patch_size=2), entropy=False, local_kind=kind)
    for at in range(3, 16):
        ids = random_ids(24, seed=at)
        ids[1:][ids[1:] == EOS] = 9
        ids[at] = EOS
        seen = read_texts(batch_of(spec, rows=1, slice=slice), {0: ids}, {0: 20})
        np.testing.assert_array_equal(np.array(seen[0]), compute(spec, ids, {}).logits[19:].astype(np.float32))


ROW_SPECS = {name: spec for name, spec in SPECS.items() if cache_of(spec, "encoder").kind == "window"}


@pytest.mark.parametrize("name", ROW_SPECS)
@pytest.mark.parametrize("slice", [3, 8])
def test_one_call_for_all_rows_matches_the_reference(name: str, slice: int) -> None:
    spec = SPECS[name]
    lengths, prompts = {0: 60, 1: 7, 2: 90, 3: 33, 4: 61}, {0: 1, 1: 6, 2: 70, 3: 20, 4: 60}
    texts = {i: random_ids(n, seed=i) for i, n in lengths.items()}
    batch = Batch(spec, NullRowBackend(spec), tables_for(spec), 5, slice)
    assert isinstance(batch._calls, RowCalls)
    for _ in range(2):  # rows are reused
        seen = read_texts(batch, texts, prompts)
        for i, ids in texts.items():
            expected = compute(spec, ids, tables_for(spec)).logits.astype(np.float32)
            np.testing.assert_array_equal(np.array(seen[i]), expected[prompts[i] - 1 :])


def test_a_restored_row_keeps_its_lengths_while_others_advance() -> None:
    spec = SPECS["window"]
    batch, ids = Batch(spec, NullRowBackend(spec), None, 3, 4), random_ids(60, 2)
    kept = batch.open()
    assert kept is not None
    kept.feed(ids[:40])
    while not kept.done:
        batch.round()
    prefix = batch.snapshot(kept)
    batch.close(kept)
    restored, other = batch.open(), batch.open()
    assert restored is not None
    assert other is not None
    batch.restore(restored, prefix)
    other.feed(ids)
    while not other.done:
        batch.round()
    held = restored.memory.held()
    assert isinstance(batch._calls, RowCalls)
    lengths = {group: int(routes._lengths.array[restored.index]) for group, routes in batch._calls._routes.items()}
    assert lengths == held
    assert held["encoder"] == 40 - np.flatnonzero(np.append(EOS, ids[:39]) == EOS)[-1]  # its document's
    restored.feed(ids[40:])
    while not restored.done:
        batch.round()
    np.testing.assert_array_equal(restored.logits_V, compute(spec, ids, {}).logits[-1].astype(np.float32))


def test_a_row_is_reused_for_the_next_text() -> None:
    spec = SPECS["window"]
    batch = batch_of(spec, rows=1)
    for seed in (1, 2):
        ids = random_ids(50, seed)
        seen = read_texts(batch, {0: ids}, {0: 30})
        np.testing.assert_array_equal(seen[0][-1], compute(spec, ids, {}).logits[-1].astype(np.float32))


def test_waiting_saves_latent_calls() -> None:
    texts = {i: random_ids(80, seed=i) for i in range(6)}
    calls = {}
    for share in (0.0, 0.7):
        batch = batch_of(SPECS["ring"], rows=6, share=share)
        read_texts(batch, texts, dict.fromkeys(texts, 1))
        calls[share] = batch.counts.latent_calls, batch.counts.patches
    assert calls[0.0][1] == calls[0.7][1]
    assert calls[0.7][0] < 0.6 * calls[0.0][0]


@pytest.mark.parametrize("patch", [5, 12])
def test_prompts_are_read_together_while_no_row_generates(patch: int) -> None:
    spec = null_spec(rule=PatchRule("static", patch_size=patch), capacity_bytes=300, capacity_patches=300)
    batch = batch_of(spec, rows=8, slice=8)
    for i in range(8):
        row = batch.open()
        assert row is not None
        row.feed(random_ids(161, i))
    while not all(row.done for row in batch.rows):
        batch.round()
    assert batch.counts.rounds <= 1.5 * 161 / 8 + 8  # at the end some rows generate, and one prompt is read at a time


def test_prompts_are_interleaved_and_do_not_delay_a_generating_row() -> None:
    spec = null_spec(rule=PatchRule("static", patch_size=5), capacity_bytes=300, capacity_patches=300)
    batch, ids = batch_of(spec, rows=8, slice=8), random_ids(280, 1)
    writer, *readers = (batch.open() for _ in range(8))
    assert writer is not None
    writer.feed(ids[:1])
    for reader in readers:
        assert reader is not None
        reader.feed(ids)
    while not writer.done:
        batch.round()
    written, gap, longest = 1, 0, 0
    for _ in range(100):
        gap += 1
        batch.round()
        if writer.done:
            writer.feed(ids[written : written + 1])
            written, gap, longest = written + 1, 0, max(longest, gap)
    assert longest <= 2
    read = [reader.memory.position for reader in readers if reader is not None]
    assert max(read) - min(read) <= 8


def test_a_row_whose_patches_do_not_fit_fails_alone() -> None:
    spec = fitted(SPECS["ring"], 60)
    batch = batch_of(spec, rows=2)
    one, other = batch.open(), batch.open()
    assert one is not None
    assert other is not None
    ids = random_ids(60, 3)
    one.feed(ids[:1])
    other.feed(ids[:50])
    one.memory.patches = spec.capacity_patches  # as if they were all used
    one.stepped = one.memory.patches
    failed = []
    while not other.done:
        failed += [row for row in batch.round() if row.error is not None]
    assert failed == [one]
    assert isinstance(one.error, CapacityError)
    np.testing.assert_array_equal(other.logits_V, compute(spec, ids[:50], {}).logits[-1].astype(np.float32))


def test_limits() -> None:
    spec = SPECS["ring"]
    with pytest.raises(UsageError, match="at least 1 row"):
        batch_of(spec, rows=0)
    with pytest.raises(UsageError, match="exported for"):
        fitted(spec, spec.capacity_bytes + 1)
    row = batch_of(fitted(spec, 40), rows=1).open()
    assert row is not None
    row.feed(random_ids(39))
    with pytest.raises(CapacityError):
        row.feed(random_ids(2))
    assert row.placed == 39
