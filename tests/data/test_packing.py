"""Rows and batches: no token lost or doubled, exact state, facebookresearch/blt's convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.data import Batch, BatchShape, Dataset, Documents, Loader, PatchIndex, prepare
from blt.data.rows import cut_rows
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.ids import BOS, EOS
from blt_runtime.patching import PatchRule
from tests.data.slow_packing import row_patch_lengths

RULE = PatchRule("space", max_patch_length=6)
Make = Callable[..., Loader]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("packing")
    random = np.random.default_rng(0)
    words = [b"a", b"bit", b"of", b"wonderfully", b"plain", "tëxt".encode(), b"\n"]
    documents = [b" ".join(words[i] for i in random.integers(0, len(words), n)) for n in random.integers(1, 60, 50)]
    (folder / "a.txt").write_bytes(b"\0".join(documents))
    prepare([folder / "a.txt"], folder / "data", split=(1, 0, 0))
    return Dataset(folder / "data")


@pytest.fixture
def loader(dataset: Dataset) -> Make:
    def make(shape: BatchShape, **options: Any) -> Loader:
        starts = PatchIndex(dataset, "train").with_rule(RULE) if shape.patches else None
        return Loader(dataset.split("train"), shape, starts, **options)

    return make


SHAPES = [BatchShape(4, (50,)), BatchShape(3, (40, 60, 90), patches=16), BatchShape(1, (30,), patches=40)]


def row_stream(batches: list[Batch]) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(block, position) -> inputs and targets of every row that is not blank, without padding."""
    rows = {}
    for batch in batches:
        for b in np.flatnonzero(batch.starts >= 0):
            key = (batch.block, int(batch.starts[b]))
            assert key not in rows
            assert batch.row_tokens is not None
            n = int(batch.row_tokens[b])
            rows[key] = batch.ids[b, :n].tolist(), batch.targets[b, :n].tolist()
    return dict(sorted(rows.items()))


def documents_of(batches: list[Batch]) -> list[list[int]]:
    """All tokens of an epoch, block by block, from the targets alone (and each block's first input)."""
    blocks: dict[int, list[int]] = {}
    for (block, _), (inputs, targets) in row_stream(batches).items():
        stream = blocks.setdefault(block, [inputs[0]])
        stream += [BOS] if (stream[-1], inputs[0]) == (EOS, BOS) else []  # a row of that target alone is left out
        assert inputs == [stream[-1], *targets[:-1]]
        stream += targets
    return [*blocks.values()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_tokens", [1 << 20, 700])
def test_an_epoch_holds_every_document_once(
    dataset: Dataset, loader: Make, shape: BatchShape, block_tokens: int
) -> None:
    batches = list(loader(shape, block_tokens=block_tokens).one_pass())
    documents = dataset.split("train")
    found = []
    for stream in documents_of(batches):
        ends = np.flatnonzero(np.array(stream) == 2) + 1
        found += [part.tolist() for part in np.split(np.array(stream), ends) if len(part)]
    assert sorted(found) == sorted(documents.ids(i).tolist() for i in range(len(documents)))
    assert sum(batch.n_bytes for batch in batches) == documents.n_bytes


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_patch_lengths_are_those_of_the_documents(dataset: Dataset, loader: Make, shape: BatchShape) -> None:
    starts_of = {}
    documents, index = dataset.split("train"), PatchIndex(dataset, "train").with_rule(RULE)
    for i in range(len(documents)):
        starts_of[documents.ids(i).tobytes()] = index.starts(i)
    stream_starts = np.concatenate([index.starts(i) for i in range(len(documents))])
    for batch in loader(shape, shuffle=False).one_pass():
        assert batch.patch_lengths is not None
        assert (batch.patch_lengths.sum(1) == batch.ids.shape[1] + 1).all()
        assert (batch.patch_lengths[:, 0] == 1).all()
        for b, begin in enumerate(batch.starts):
            assert batch.row_tokens is not None
            n = int(batch.row_tokens[b])
            if begin < 0:
                assert n == 0
                continue
            lengths = batch.patch_lengths[b]
            cuts = np.cumsum(lengths)[: np.count_nonzero(lengths) - 1]
            expected = {1} | {int(t) for t in np.flatnonzero(stream_starts[begin : begin + n + 1]) if t >= 1}
            assert set(cuts.tolist()) == expected
            assert lengths[: len(cuts)].max() <= 6


def test_padding_is_zero_and_masked(loader: Make) -> None:
    for batch in loader(SHAPES[1]).one_pass():
        assert batch.row_tokens is not None
        padding = np.arange(batch.mask.shape[1]) >= batch.row_tokens[:, None]
        assert not batch.ids[padding].any()
        assert not batch.targets[padding].any()
        np.testing.assert_array_equal(batch.mask, ~padding & (batch.targets != BOS))
        assert batch.mask.size - batch.n_tokens == padding.sum()


def test_batches_have_few_shapes_and_buckets_fit(loader: Make) -> None:
    batches = list(loader(SHAPES[1]).one_pass())
    assert {batch.ids.shape for batch in batches} <= {(3, n) for n in (40, 60, 90)}
    for batch in batches:
        assert batch.row_tokens is not None
        assert (np.diff(batch.row_tokens) <= 0).all()
        assert batch.ids.shape[1] == min(n for n in (40, 60, 90) if n >= batch.row_tokens[0])


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_micro_batches_hold_the_batch_with_less_padding(loader: Make, micro_rows: int) -> None:
    """The rows of a batch in order, each as long as its bucket."""
    shape = BatchShape(4, (40, 60, 90), patches=16)
    lengths = set()
    for whole in loader(shape).one_pass():
        batch = replace(whole, micro_rows=micro_rows)
        parts = batch.micro_batches()
        assert [part.ids.shape for part in parts] == [(micro_rows, length) for length in batch.micro_lengths]
        assert batch.places == sum(part.mask.size for part in parts) <= whole.places == whole.mask.size
        for name in ("n_targets", "n_bytes", "n_tokens", "n_patches", "patch_places"):
            assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
        for i, part in enumerate(parts):
            lengths.add(part.ids.shape[1])
            rows = whole.rows(i * micro_rows, (i + 1) * micro_rows)
            assert part.row_tokens is not None
            assert part.patch_lengths is not None
            assert rows.patch_lengths is not None
            n = part.ids.shape[1]
            assert not rows.mask[:, n:].any()
            np.testing.assert_array_equal(part.targets, rows.targets[:, :n])
            assert (part.patch_lengths.sum(1) == n + 1).all()
            starts, all_starts = (
                np.minimum(lengths_BP.cumsum(1), n + 1) for lengths_BP in (part.patch_lengths, rows.patch_lengths)
            )
            np.testing.assert_array_equal(starts, all_starts)
    assert lengths == {40, 60, 90} if micro_rows == 1 else len(lengths) > 1


def test_batches_are_drawn_from_the_whole_block(tmp_path: Path) -> None:
    """Two kinds of text whose rows have different lengths: the share of a kind varies over batches as it does in
    independent draws of rows."""
    random = np.random.default_rng(0)
    for group, words in {"short": (b"a", b"b", b"if"), "long": (b"patches", b"latent", b"wonderful")}.items():
        texts = [b" ".join(random.choice(words, int(2000 / (1 + len(words[0]))))) for _ in range(150)]
        (tmp_path / f"{group}.txt").write_bytes(b"\0".join(texts))
    prepare([tmp_path / "short.txt", tmp_path / "long.txt"], tmp_path / "data", split=(1, 0, 0))
    documents = Dataset(tmp_path / "data").split("train")
    starts = PatchIndex(Dataset(tmp_path / "data"), "train").with_rule(PatchRule("space", max_patch_length=16))
    made = Loader(documents, BatchShape(8, (64, 96, 128, 192), patches=24), starts)
    rows = [
        [documents.group(int(row[0])) == "short" for row in batch.documents if len(row)] for batch in made.one_pass()
    ]
    shares = np.array([np.mean(row) for row in rows if len(row) == 8])
    share = shares.mean()
    assert len(shares) > 200
    assert 0.7 < shares.var() / (share * (1 - share) / 8) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_resume_at_every_batch(loader: Make, shape: BatchShape) -> None:
    whole = loader(shape, seed=3, block_tokens=900)
    states, batches = [], []
    for _ in range(90):
        states.append(whole.state())
        batches.append(next(whole))
    assert whole.epoch > 0 or shape.rows == 1
    for at in (0, 1, 13, 89):
        again = loader(shape, seed=3, block_tokens=900)
        again.restore(states[at])
        for batch, expected in zip(islice(again, 90 - at), batches[at:], strict=True):
            np.testing.assert_array_equal(batch.ids, expected.ids)
            np.testing.assert_array_equal(batch.targets, expected.targets)
            np.testing.assert_array_equal(batch.patch_lengths, expected.patch_lengths)


def test_seed_and_epoch_change_the_order(loader: Make) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        one = loader(SHAPES[0], seed=seed)
        one.restore({"epoch": epoch, "block": 0, "batch": 0})
        return [tuple(batch.ids.ravel()) for batch in one.one_pass()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=80),
    st.integers(2, 20),
    st.integers(2, 40),
)
def test_rows_tile_any_stream(lengths: list[int], patches: int, cap: int) -> None:
    n = sum(lengths) + 1
    boundaries = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    rows = cut_rows(n, boundaries, patches, cap)
    assert rows.begin[0] == 0
    assert rows.end[-1] == n
    np.testing.assert_array_equal(rows.begin[1:], rows.end[:-1] - 1)
    assert rows.lengths.min() >= 1
    assert rows.lengths.max() <= cap
    for begin, end in zip(rows.begin, rows.end, strict=True):
        found = row_patch_lengths(int(begin), int(end), boundaries, patches, cap)
        assert found.sum() == cap + 1
        real = np.count_nonzero(found)
        assert (found[:real] > 0).all()
        # A row is short of patches only if it is full of bytes or the stream ends.
        assert real == patches or end - begin - 1 == cap or end == n


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=80),
    st.integers(2, 20),
    st.sets(st.integers(2, 40), min_size=1, max_size=5).map(sorted),
)
def test_rows_end_at_the_nearest_bucket(lengths: list[int], patches: int, buckets: list[int]) -> None:
    n = sum(lengths) + 1
    boundaries = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    rows = cut_rows(n, boundaries, patches, buckets[-1], buckets)
    assert (rows.begin[0], rows.end[-1]) == (0, n)
    np.testing.assert_array_equal(rows.begin[1:], rows.end[:-1] - 1)
    for row in rows.lengths[:-1].tolist():
        above = min(bucket for bucket in buckets if bucket >= row)
        below = max((bucket for bucket in buckets if bucket < row), default=-above)
        assert above - row <= row - below


def test_published_rows_have_our_layout(golden: Path) -> None:
    """The rows of facebookresearch/blt's loader: its padding belongs to the last patch; everything else is equal."""
    case = np.load(golden / "a" / "cases.npz")
    names = ("tokens", "patch_lengths", "mask")
    padded = 0
    for tokens, lengths, mask in zip(*(case[f"train_batch/{name}"] for name in names), strict=True):
        n, real = len(tokens), int(mask.sum())
        starts = np.cumsum(lengths) - lengths
        boundaries = starts[lengths > 0][1:]
        ours = row_patch_lengths(0, max(real, int(boundaries[-1])) + 1, boundaries, len(lengths), n)
        np.testing.assert_array_equal(ours, lengths)
        assert not tokens[real + 1 :].any()
        padded += n - real
    assert padded > 1


class _Empty(Documents):
    def __init__(self) -> None:
        self.lengths = np.empty(0, np.int64)


def test_bad_shapes_and_empty_data() -> None:
    wrong: list[tuple[int, tuple[int, ...]]] = [(0, (4,)), (1, ()), (1, (8, 4))]
    for rows, buckets in wrong:
        with pytest.raises(ConfigError, match="byte_buckets"):
            BatchShape(rows, buckets)
    with pytest.raises(ConfigError, match="at least 2"):
        BatchShape(1, (8,), patches=1)
    with pytest.raises(ConfigError, match="patch boundaries"):
        Loader(_Empty(), BatchShape(1, (8,), patches=4))
    with pytest.raises(InputError, match="no documents"):
        Loader(_Empty(), BatchShape(1, (8,)))


@pytest.mark.parametrize("given", [True, False])
def test_the_first_blocks_of_the_first_epoch_are_smaller(
    loader: Make, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    monkeypatch.setattr("blt.data.packing.FIRST_BLOCK_TOKENS", 100 if given else 500)
    made = loader(BatchShape(2, (40,)), block_tokens=3000, first_block_tokens=500 if given else None)
    tokens = [[made.plan(epoch, block).n_tokens for block in range(made.n_blocks(epoch))] for epoch in (0, 1)]
    assert sum(tokens[0]) == sum(tokens[1])
    for found, expected in zip(tokens[0][:4], (500, 500, 1000, 1000), strict=True):
        assert abs(found - expected) < 700  # documents are whole
    assert tokens[1][0] > 2300
    whole = loader(BatchShape(2, (40,)), block_tokens=3000, first_block_tokens=3000)
    assert whole.plan(0, 0).n_tokens > 2300


@settings(max_examples=30, deadline=None)
@given(batches=st.integers(1, 60), seed=st.integers(0, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_read_only_the_documents_that_were_announced(
    dataset: Dataset, shape: BatchShape, batches: int, seed: int
) -> None:
    starts = PatchIndex(dataset, "train").with_rule(RULE) if shape.patches else None
    made = Loader(dataset.split("train"), shape, starts, seed=seed, block_tokens=400)
    promised = set(made.reached(batches).tolist())
    read = {int(d) for batch in islice(made, batches) for row in batch.documents for d in row}
    assert read <= promised
