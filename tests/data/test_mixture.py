"""The order of a mixture: each group has its share at any time, and an epoch is what the definition says."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.data import BatchShape, Loader
from blt.data.batches import Share
from blt.data.mixture import Group, Mixture, shares
from tests.data.numbered import Numbered
from tests.data.slow_packing import SlowLoader
from tests.data.test_packing_properties import same

SHAPE = BatchShape(4, (16, 40), 12)


def mixture_of(sizes: list[list[int]], weights: list[float]) -> Mixture:
    """Groups of documents of these sizes, numbered one after another, with shares proportional to the weights."""
    first = np.cumsum([0, *map(len, sizes)])
    return Mixture(
        {
            str(number): Group(number, first[number] + np.arange(len(own)), np.array(own, np.int64), share=share)
            for number, (own, share) in enumerate(zip(sizes, np.array(weights) / sum(weights), strict=True))
        }
    )


groups = st.integers(1, 5).flatmap(
    lambda n: st.builds(
        mixture_of,
        st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=n, max_size=n),
        st.lists(st.floats(0.05, 20), min_size=n, max_size=n),
    )
)


def slow_order(mixture: Mixture, seed: int, epoch: int) -> list[int]:
    """Every pass of every group from the first one on, one document after another."""
    visits = []
    for group in mixture.groups.values():
        n_bytes = mixture.n_bytes * group.share
        at = number = 0
        while at < (epoch + 1) * n_bytes:
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(group.number, number)))
            order = random.permutation(len(group.documents))
            for place, u in zip(order, random.random(len(order)), strict=True):
                length = int(group.lengths[place])
                if epoch * n_bytes <= at + length / 2 < (epoch + 1) * n_bytes:
                    visits.append(((at + u * length) / group.share, int(group.documents[place])))
                at += length
            number += 1
    return [document for _, document in sorted(visits, key=lambda visit: visit[0])]


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(0, 3), st.integers(0, 1 << 40))
def test_the_order_is_the_one_of_the_definition(mixture: Mixture, epoch: int, seed: int) -> None:
    assert mixture.order(seed, epoch).tolist() == slow_order(mixture, seed, epoch)


@settings(max_examples=100, deadline=None)
@given(groups)
def test_a_group_has_its_share_to_one_document_and_reads_no_document_twice_before_all(mixture: Mixture) -> None:
    epochs = [mixture.order(0, epoch) for epoch in range(4)]
    assert all(len(order) for order in epochs)
    for count in range(1, 5):
        read = np.concatenate(epochs[:count])
        for group in mixture.groups.values():
            times = (read[:, None] == group.documents).sum(0)
            expected = count * mixture.n_bytes * group.share
            assert abs(int((times * group.lengths).sum()) - expected) <= group.lengths.max() + 1e-6
            assert times.max() - times.min() <= 1


def test_a_group_has_its_share_at_any_time() -> None:
    sizes = [[50] * 30, [20, 80] * 20, [7] * 3]
    mixture = mixture_of(sizes, [1, 2, 1])
    lengths = np.concatenate([np.array(own) for own in sizes])
    order = mixture.order(3, 0)
    read = np.cumsum(lengths[order])
    for group in mixture.groups.values():
        own = np.cumsum(np.where(np.isin(order, group.documents), lengths[order], 0))
        assert np.abs(own - group.share * read).max() < 200  # two documents of this and each other group


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    mixture = mixture_of([[9] * 40, [5] * 40], [1, 1])
    orders = {tuple(mixture.order(seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_shares_follow_weights_and_temperature() -> None:
    n_bytes = {"code.go": 100, "book.en": 600, "docs.en": 300, "plain": 1}

    def found(temperature: float, by: str = "group", **weights: float) -> list[float]:
        weight_of = {name: weights.get(name.split(".")[0], 1.0) for name in n_bytes}
        return list(shares(n_bytes, weight_of, temperature=temperature, by=by).values())  # type: ignore[arg-type]

    assert found(1) == pytest.approx(np.array([100, 600, 300, 1]) / 1001)
    assert found(0) == pytest.approx([0.25] * 4)
    assert found(0.5) == pytest.approx(np.sqrt([100, 600, 300, 1]) / np.sqrt([100, 600, 300, 1]).sum())
    assert found(1, code=6, plain=2) == pytest.approx(np.array([600, 600, 300, 2]) / 1502)
    assert found(0, "language") == pytest.approx([1 / 3, 2 / 9, 1 / 9, 1 / 3])  # two thirds of English are books
    assert found(0.5, "language")[1:3] == pytest.approx([600 / 900 * 30 / 41, 300 / 900 * 30 / 41])
    assert found(1, "language", code=3) == pytest.approx(found(1, code=3))


def test_epochs_of_a_group_count_what_a_run_reads() -> None:
    mixture = mixture_of([[10] * 10, [10] * 30], [1, 1])
    assert mixture.epochs(400) == pytest.approx({"0": 2.0, "1": 200 / 300})
    times = np.bincount(np.concatenate([mixture.order(0, epoch) for epoch in range(3)]), minlength=40)
    assert times[:10].sum() / 10 == pytest.approx(mixture.epochs(1200)["0"], abs=0.1)


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_batches_of_a_mixture_resume_and_are_shared_like_others(pack: str) -> None:
    """Of three epochs, with documents that a block repeats: those of the slow loader, whatever the workers, the place
    of a restart and the ranks."""
    sizes = [[30] * 20, [90, 60, 3] * 5, [8]]
    source, mixture = Numbered([size for own in sizes for size in own]), mixture_of(sizes, [1, 4, 1])
    shape = BatchShape(SHAPE.rows, SHAPE.buckets, SHAPE.patches, pack)  # type: ignore[arg-type]
    options = {"seed": 5, "block_tokens": 700, "mixture": mixture}
    plain = Loader(source, shape, source, **options)  # type: ignore[arg-type]
    states, expected = [], []
    while plain.epoch < 3:
        states.append(plain.state())
        expected.append(next(plain))
    members = plain.plan(0, 0).members
    assert len(members) > len(set(members.tolist()))
    for batch, wanted in zip(SlowLoader(source, shape, source, **options), expected, strict=False):  # type: ignore[arg-type]
        same(batch, wanted)
    for at in range(0, len(states), 5):
        resumed = Loader(source, shape, source, workers=at % 3, **options)  # type: ignore[arg-type]
        resumed.restore(states[at])
        for batch, wanted in zip(islice(resumed, 3), expected[at:], strict=False):
            same(batch, wanted)
        resumed.close()
    for rank in (0, 1):
        share = Share(rank, 2, 1)
        part = Loader(source, shape, source, **options).shared(share)  # type: ignore[arg-type]
        for batch, wanted in zip(part, expected, strict=False):
            np.testing.assert_array_equal(batch.ids, wanted.ids[share.rows(shape.rows)])
            assert batch.identity == wanted.identity


def test_without_a_mixture_an_epoch_is_the_permutation_of_before() -> None:
    made = Loader(Numbered([10] * 50), BatchShape(2, (16,)), seed=4)
    for epoch in (0, 1):
        expected = np.random.default_rng((4, epoch)).permutation(50)
        np.testing.assert_array_equal(made.plan(epoch, 0).members, expected)
