"""Blocks whose boundaries are computed are planned ahead of the step, as far as the run reads, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from itertools import islice
from threading import Event

import numpy as np
import pytest

from blt.data import BatchShape, Loader
from blt.data.batches import Int, never
from tests.data.numbered import Numbered

SHAPE, BLOCK = BatchShape(2, (40,), patches=12), 400
SIZES = list(range(10, 50)) * 2
LATE = 60  # seconds after which a test fails


class Computing(Numbered):
    """Boundaries that are computed: `asked` has the documents of each call; call number `slow` waits to be stopped."""

    def __init__(self, slow: int = -1):
        super().__init__(SIZES)
        self.asked: list[list[int]] = []
        self.slow, self.began, self.ended = slow, [Event() for _ in range(20)], Event()

    def compute(self, members: Int, stopped: Callable[[], bool] = never) -> None:
        number = len(self.asked)
        self.asked.append(members.tolist())
        self.began[number].set()
        if number == self.slow:
            try:
                while not stopped():
                    Event().wait(0.01)
                raise CancelledError
            finally:
                self.ended.set()

    def computed(self, members: Int) -> bool:
        return members.tolist() in self.asked


@pytest.fixture(autouse=True)
def equal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt.data.packing.FIRST_BLOCK_TOKENS", BLOCK)


def loader_of(source: Computing, total_batches: int | None = None, workers: int = 1) -> Loader:
    return Loader(source, SHAPE, source, block_tokens=BLOCK, workers=workers, total_batches=total_batches)


def test_the_next_block_is_computed_while_batches_are_read() -> None:
    source = Computing(slow=1)
    loader = loader_of(source)
    assert next(loader).block == 0
    assert source.began[1].wait(LATE)  # and it goes on until it is stopped
    assert next(loader).block == 0
    loader.close()
    assert source.ended.wait(LATE)


def test_a_stopped_block_is_computed_again_and_no_batch_is_another() -> None:
    expected = list(islice(loader_of(Computing(), workers=0), 30))
    assert {batch.block for batch in expected} > {0, 1, 2}
    source = Computing(slow=1)
    loader = loader_of(source)
    found = [next(loader), next(loader)]
    assert source.began[1].wait(LATE)
    loader.close()
    found += islice(loader, 28)
    for batch, other in zip(found, expected, strict=True):
        assert batch.identity == other.identity
        np.testing.assert_array_equal(batch.ids, other.ids)
        np.testing.assert_array_equal(batch.patch_lengths, other.patch_lengths)
    assert source.asked[1] in source.asked[2:]


def test_no_block_is_computed_that_the_run_does_not_read() -> None:
    """Without a limit, the block after the current one is."""
    source, unlimited = Computing(), Computing()
    loader, other = loader_of(source, total_batches=3), loader_of(unlimited)
    assert [batch.block for batch in islice(loader, 3)] == [batch.block for batch in islice(other, 3)] == [0, 0, 0]
    assert unlimited.began[1].wait(LATE)
    loader._prefetcher._planner.shutdown(wait=True, cancel_futures=False)
    assert len(source.asked) == 1
