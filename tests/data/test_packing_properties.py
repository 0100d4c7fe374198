"""Every token of every document is a target exactly once: both ways to pack, any shape, split, resume and workers."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.data import Batch, BatchShape, Loader
from blt.data.batches import Pack, Share
from blt_runtime.errors import InputError
from tests.data.numbered import STRIDE, Numbered
from tests.data.slow_packing import SlowLoader

FIELDS = ("ids", "targets", "mask", "patch_lengths", "starts", "row_tokens", "row_bytes")
COUNTS = ("n_bytes", "n_targets", "n_tokens", "n_patches", "patch_places")


documents = st.builds(
    Numbered,
    st.lists(st.integers(1, 12) | st.integers(1, 150), min_size=1, max_size=30),
    st.lists(st.integers(0, 20), max_size=10),
)
shapes = st.builds(
    BatchShape,
    st.integers(1, 6),
    st.sets(st.integers(2, 60), min_size=1, max_size=4).map(lambda lengths: tuple(sorted(lengths))),
    st.none() | st.integers(2, 30),
    st.sampled_from(["stream", "documents"]),
)


def loader_of(source: Numbered, shape: BatchShape, **options: Any) -> Loader:
    starts = source if shape.patches else None
    return Loader(source, shape, starts, **{"block_tokens": 200, "seed": 1, **options})


def same(a: Batch, b: Batch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.identity == b.identity


@settings(max_examples=100)
@given(documents, shapes)
def test_every_token_is_a_target_once(source: Numbered, shape: BatchShape) -> None:
    batches = list(loader_of(source, shape).one_pass())
    targets = np.concatenate([batch.targets[batch.mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(targets), source.counted)  # no BOS (position 0), no duplicates
    assert sum(batch.n_bytes for batch in batches) == source.token_bytes[source.counted].sum()
    for batch in batches:
        inputs = batch.ids[batch.mask]
        counted = batch.targets[batch.mask]
        np.testing.assert_array_equal(inputs, counted - 1)
        assert batch.ids.shape[1] in shape.buckets
        assert batch.mask.size >= batch.n_tokens >= batch.n_targets


@settings(max_examples=100)
@given(documents, shapes.filter(lambda shape: shape.patches is not None))
def test_patches_are_the_documents_own(source: Numbered, shape: BatchShape) -> None:
    for batch in loader_of(source, shape).one_pass():
        assert batch.patch_lengths is not None
        assert batch.row_tokens is not None
        assert batch.patch_places == batch.patch_lengths.size
        assert (batch.patch_lengths.sum(1) == batch.ids.shape[1] + 1).all()
        found = 0
        for b in np.flatnonzero(batch.starts >= 0):
            n, lengths = int(batch.row_tokens[b]), batch.patch_lengths[b]
            tokens = np.append(batch.ids[b, :n], batch.targets[b, n - 1])
            begins = [bool(source.patches[token // STRIDE][token % STRIDE]) for token in tokens]
            begins[:2] = True, True
            found += sum(begins)
            cuts = np.cumsum(lengths) - lengths
            np.testing.assert_array_equal(cuts[lengths > 0], np.flatnonzero(begins))
        assert batch.n_patches == found


@settings(max_examples=100)
@given(documents, shapes)
def test_whole_documents_stay_whole(source: Numbered, shape: BatchShape) -> None:
    """All documents except those that are longer than a row."""
    shape = BatchShape(shape.rows, shape.buckets, shape.patches, "documents")
    rows_of: dict[int, int] = {}
    for batch in loader_of(source, shape).one_pass():
        for b in np.flatnonzero(batch.starts >= 0):
            for document in batch.documents[b]:
                rows_of[int(document)] = rows_of.get(int(document), 0) + 1
    for i, size in enumerate(source.sizes):
        fits = size + 1 <= shape.buckets[-1] and (not shape.patches or source.patches[i].sum() <= shape.patches)
        assert rows_of[i] == 1 or not fits


@settings(max_examples=40)
@given(documents, shapes, st.integers(0, 40), st.integers(0, 3), st.integers(0, 3), st.data())
def test_resume_and_workers_change_no_batch(
    source: Numbered, shape: BatchShape, at: int, workers: int, others: int, data: st.DataObject
) -> None:
    plain = loader_of(source, shape)
    states, expected = [], []
    for _ in range(at + 12):
        states.append(plain.state())
        expected.append(next(plain))
    threaded = loader_of(source, shape, workers=workers)
    for batch in expected[: data.draw(st.integers(0, at))]:
        same(next(threaded), batch)
    threaded.restore(states[at])
    assert threaded.state() == states[at]
    for batch, wanted in zip(islice(threaded, 12), expected[at:], strict=True):
        same(batch, wanted)
    resumed = loader_of(source, shape, workers=others)
    resumed.restore(threaded.state())
    same(next(resumed), next(plain))


@settings(max_examples=40)
@given(documents, shapes, st.integers(1, 3), st.integers(1, 3))
def test_ranks_and_micro_batches_share_out_the_rows(
    source: Numbered, shape: BatchShape, ranks: int, micro: int
) -> None:
    shape = BatchShape(ranks * micro * 2, shape.buckets, shape.patches, shape.pack)
    for batch in loader_of(source, shape).one_pass():
        parts = [batch.rows(first, first + 2) for first in range(0, shape.rows, 2)]
        assert [len(part.starts) for part in parts] == [2] * (ranks * micro)
        for name in FIELDS:
            whole = getattr(batch, name)
            joined = None if whole is None else np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, whole)
        for count in COUNTS:
            assert sum(getattr(part, count) for part in parts) == getattr(batch, count)


@settings(max_examples=150, deadline=None)
@given(documents, shapes, st.integers(0, 40), st.booleans())
def test_batches_are_those_of_the_obvious_loader(
    source: Numbered, shape: BatchShape, last_tokens: int, tokens: bool
) -> None:
    """Every field of every batch, of sources of tokens and of bytes, and the rows that are left out."""
    if not tokens:
        source.token_bytes = None  # type: ignore[assignment]
    slow = SlowLoader(
        source, shape, source if shape.patches else None, seed=1, block_tokens=200, last_tokens=last_tokens
    )
    made = loader_of(source, shape, last_tokens=last_tokens)
    for batch, expected in zip(made.one_pass(), slow.one_pass(), strict=True):
        if tokens:
            same(batch, expected)
        else:
            for name in FIELDS[:-1]:
                np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))
        for count in COUNTS if tokens else COUNTS[1:]:
            assert getattr(batch, count) == getattr(expected, count)


@settings(max_examples=60, deadline=None)
@given(documents, shapes, st.integers(1, 3), st.integers(1, 3))
def test_ranks_hold_their_own_rows_of_the_same_batches(
    source: Numbered, shape: BatchShape, ranks: int, micro: int
) -> None:
    shape = BatchShape(ranks * micro * 2, shape.buckets, shape.patches, shape.pack)
    whole = list(loader_of(source, shape).one_pass())
    shares = [Share(rank, ranks, micro) for rank in range(ranks)]
    for share in shares:
        held = share.rows(shape.rows)
        for batch, expected in zip(loader_of(source, shape).shared(share).one_pass(), whole, strict=True):
            for name in FIELDS[:4]:
                if (wanted := getattr(expected, name)) is not None:
                    np.testing.assert_array_equal(getattr(batch, name), wanted[held])
            for count in (*COUNTS, "identity"):
                assert getattr(batch, count) == getattr(expected, count)
            parts = replace(expected, micro_rows=micro).micro_batches()[share.rank :: ranks]
            for part, other in zip(batch.micro_batches(), parts, strict=True):
                same(part, other)
                assert part.n_targets == int(part.mask.sum())


@pytest.mark.parametrize("pack", ["stream", "documents"])
@pytest.mark.parametrize("patches", [None, 2, 7])
@pytest.mark.parametrize("sizes", [[1], [1] * 40, [900], [1, 900, 1]])
def test_extreme_documents(sizes: list[int], patches: int | None, pack: Pack) -> None:
    source = Numbered(sizes)
    loader = loader_of(source, BatchShape(3, (4, 16), patches, pack))
    targets = np.concatenate([batch.targets[batch.mask] for batch in loader.one_pass()])
    np.testing.assert_array_equal(np.sort(targets), source.counted)


def test_a_prompt_longer_than_a_row_leaves_no_empty_row() -> None:
    source = Numbered([100, 3], [90])
    for pack in ("stream", "documents"):
        batches = list(loader_of(source, BatchShape(1, (8,), None, pack)).one_pass())
        assert all(batch.n_targets for batch in batches)
        assert sum(batch.n_targets for batch in batches) == 11 + 4


def test_whole_documents_leave_little_padding() -> None:
    """Best fit decreasing: a thousand short documents fill rows of 64 to over 97 %."""
    source = Numbered(np.random.default_rng(0).integers(1, 40, 1000).tolist())
    batches = list(loader_of(source, BatchShape(4, (64,), None, "documents"), block_tokens=1 << 20).one_pass())
    assert sum(batch.mask.size - batch.n_tokens for batch in batches[:-1]) < 0.03 * sum(
        batch.mask.size for batch in batches[:-1]
    )


def test_an_error_in_a_worker_reaches_the_step() -> None:
    class Broken(Numbered):
        def ids(self, index: int) -> np.ndarray:
            if hasattr(self, "patches"):
                raise InputError("the shard is gone")
            return super().ids(index)

    with pytest.raises(InputError, match="gone"):
        next(loader_of(Broken([5, 6]), BatchShape(1, (8,)), workers=2))


def test_identity_names_the_position_and_the_documents() -> None:
    """Eight rows of six tokens end in the seventh document."""
    batch = next(loader_of(Numbered([5] * 12), BatchShape(8, (6,)), shuffle=False))
    assert batch.identity == "epoch 0, block 0, batch 0 (documents 0, 1, 2, 3 and 3 others)"
    assert batch.rows(0, 1).identity == "epoch 0, block 0, batch 0 (documents 0)"


def test_a_closed_loader_leaves_no_thread_and_can_continue() -> None:
    source, shape = Numbered([30] * 400), BatchShape(2, (8, 16))
    before = set(threading.enumerate())
    threaded, plain = (loader_of(source, shape, workers=workers) for workers in (3, 0))
    for _ in range(2):
        for _ in range(5):
            same(next(threaded), next(plain))
        assert len(set(threading.enumerate()) - before) > 1
        threaded.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
        assert set(threading.enumerate()) <= before
        assert threaded.state() == plain.state()
