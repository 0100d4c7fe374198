"""Which rows are checked: extreme patch rules, and rows of text with scripts, in groups.

A group has one row per interleaved stream, so that few rows are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from blt.evaluate.cache_check.scripts import MOST_GENERATED, Op, make_script
from blt.evaluate.cache_check.text import Random, given_bytes, mixed_bytes, take, with_specials
from blt.evaluate.cache_check.uncached import Row, Uncached
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.errors import UsageError
from blt_runtime.ids import BPE, OFFSET, Ids
from blt_runtime.patching import LONGEST_PATCH, PatchRule

STREAMS = 4
"""Interleaved streams; the first half of them begins with BOS."""
OWN = "own"
"""Name of the model's own rule."""


def rules_for(rule: PatchRule, chunk: int) -> dict[str, PatchRule]:
    """The model's own rule, and others over the same entropies.

    "one patch": after token 0 a row never closes a patch.  "bytes": each byte is a patch.  "capped": the own rule,
    split after 3 bytes.  "long": every patch is longer than two chunks.
    """
    if rule.needs_entropy:
        never = replace(rule, threshold=1e6, max_patch_length=None)
        always = replace(never, threshold=-1e6, threshold_add=None if rule.threshold_add is None else -1e6)
    else:
        never, always = PatchRule("static", patch_size=LONGEST_PATCH), PatchRule("byte")
    capped, long = replace(rule, max_patch_length=3), replace(never, max_patch_length=long_patch(chunk))
    return {OWN: rule, "one patch": never, "bytes": always, "capped": capped, "long": long}


def long_patch(chunk: int) -> int:
    """Longer than two chunks, and no multiple of one."""
    return 2 * chunk + 37


@dataclass(frozen=True)
class Case:
    """A row, the script of operations that leads a stream through it, and its name in messages."""

    row: Row
    bos: bool
    script: list[Op]
    where: str

    @property
    def n_bytes(self) -> int:
        return int((self.row.ids_N >= OFFSET).sum())


class Cases:
    """Makes rows within what the checkpoint was trained for and what every model's streams hold.

    Rows leave room to generate. Raises UsageError if the streams are too short to be checked.
    """

    def __init__(
        self,
        uncached: Uncached,
        specs: Iterable[ModelSpec],
        *,
        row_bytes: int,
        seed: int,
        data: bytes | None,
        tolerance: float,
    ) -> None:
        specs = list(specs)
        self.chunk = max(spec.chunk for spec in specs)
        self.most_ids = min(uncached.longest, *(spec.capacity_bytes for spec in specs)) - MOST_GENERATED
        patches = uncached.blt.config.latent.max_seqlen
        self.most_patches = min(patches, *(spec.capacity_patches for spec in specs)) - MOST_GENERATED - 1
        if min(self.most_ids, self.most_patches) < 2:
            raise UsageError("the model's streams are too short to be checked: export with a larger --capacity")
        self.row_bytes = min(row_bytes, self.most_ids - 1)
        self.rules = rules_for(uncached.rule, self.chunk)
        self.tolerance = tolerance
        self._uncached, self._seed, self._data = uncached, seed, data

    def random(self, *parts: int) -> Random:
        """One generator per purpose, so that one more row here changes nothing there."""
        return np.random.default_rng([self._seed, *parts])

    def text(self, random: Random, rule: PatchRule) -> Iterator[Ids]:
        pieces = mixed_bytes(random) if self._data is None else given_bytes(self._data, random)
        return with_specials(pieces, random, rule)

    def row(self, ids_N: Ids, rule: PatchRule) -> Row:
        if ids_N[-1] == BPE:  # as the last id it closes no patch unless more text follows (spec section 5)
            ids_N[-1] = OFFSET
        return self._uncached.row(ids_N, rule, tolerance=self.tolerance, most_patches=self.most_patches)

    def short(self, name: str, count: int, n_bytes: int) -> Iterator[Row]:
        """Rows of `n_bytes`, every other one with BOS."""
        rule = self.rules[name]
        pieces = self.text(self.random(0, self._number(name)), rule)
        for index in range(count):
            yield self.row(take(pieces, min(n_bytes, self.row_bytes), index % 2 == 0), rule)

    def groups(self, name: str, n_bytes: int) -> Iterator[list[Case]]:
        """Groups of STREAMS cases that together hold `n_bytes` or more."""
        rule, random = self.rules[name], self.random(1, self._number(name))
        pieces, sizes = self.text(random, rule), self._sizes(name, n_bytes, random)
        index = 0
        while n_bytes > 0:
            group = []
            for place in range(STREAMS):
                bos = place < STREAMS // 2
                row = self.row(take(pieces, next(sizes), bos), rule)
                script = make_script(len(row), random, start=int(bos), chunk=self.chunk)
                group.append(Case(row=row, bos=bos, script=script, where=f"rule {name!r}, row {index}"))
                index += 1
            n_bytes -= sum(case.n_bytes for case in group)
            yield group

    def _sizes(self, name: str, n_bytes: int, random: Random) -> Iterator[int]:
        """Ids of each row without BOS. Under the own rule the empty text, the shortest rows and those near a chunk
        are first.

        With little text, rows of the other rules are shorter, but hold a patch of the rule "long".
        """
        longest, chunk = self.row_bytes, self.chunk
        if name == OWN:
            first = (0, longest, chunk, longest, 1, chunk + 1, 2, chunk - 1)
            yield from (min(n, longest) for n in first)
        else:
            longest = min(longest, max(n_bytes // STREAMS, 2 * long_patch(chunk)))
        while True:
            yield int(random.integers(longest // 2, longest)) if random.random() < 0.3 else longest

    def _number(self, name: str) -> int:
        return list(self.rules).index(name)
