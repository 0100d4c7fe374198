"""The mixture of a training text: the share of each group, and the order of its documents.

Group g has the share

    s_g  proportional to  w_g n_g N_g^(temperature - 1)

of the bytes that are read: w_g is its weight, n_g the bytes of its documents, and N_g those of its class. Classes are
the groups, so that shares are w_g n_g^temperature, or the languages. (Conneau and Lample 2019, "Cross-lingual Language
Model Pretraining", section 3.1, sample languages by bytes^alpha; alpha is `temperature` here.)

A group is read in passes. Each is a permutation of its documents that follows from (seed, group, pass). In the endless
sequence of passes, a document takes the bytes [a, b) of its group. It is due after (a + u (b - a)) / s_g bytes of the
mixture, u random in [0, 1), and documents are read in the order in which they are due. So the bytes read of a group are
always those of its share, to one document. An epoch has about as many bytes as the documents together. It consists of
the visits whose middle (a + b) / (2 s_g) is in it; the middles of some group are close enough that none is empty.

Letters: D documents of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Int

TemperatureBy = Literal["group", "language"]
_SLACK = 1e-6
"""Of a pass: the passes of an epoch are found with so much room for rounding. The middle of a visit decides exactly."""


@dataclass(frozen=True)
class Group:
    """The documents [D] of a group, their bytes [D], and its share of the bytes that are read. `number` is its index in
    the data."""

    number: int
    documents: Int
    lengths: Int
    share: float

    @cached_property
    def n_bytes(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Mixture:
    """The groups of a mixture, by name."""

    groups: Mapping[str, Group]

    @cached_property
    def n_bytes(self) -> int:
        """The bytes of all documents, and about those of an epoch."""
        return sum(group.n_bytes for group in self.groups.values())

    def order(self, seed: int, epoch: int) -> Int:
        """The documents of an epoch in order, some of them repeated and some absent."""
        visits = [self._visits(group, seed, epoch) for group in self.groups.values()]
        documents, due = (np.concatenate(parts) for parts in zip(*visits, strict=True))
        return np.asarray(documents[np.argsort(due, kind="stable")])

    def _visits(self, group: Group, seed: int, epoch: int) -> tuple[Int, NDArray[np.float64]]:
        """The documents of a group that an epoch reads, and when each is due."""
        size = self.n_bytes * group.share  # bytes of the group in an epoch
        first, last = epoch * size / group.n_bytes - _SLACK, (epoch + 1) * size / group.n_bytes + _SLACK
        found, due = [], []
        for number in range(max(0, int(first)), int(last) + 1):
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(group.number, number)))
            order = random.permutation(len(group.documents))
            lengths = group.lengths[order]
            end = number * group.n_bytes + np.cumsum(lengths)
            inside = (2 * end - lengths) // (2 * size) == epoch
            found.append(group.documents[order[inside]])
            due.append(((end - lengths + random.random(len(order)) * lengths) / group.share)[inside])
        return np.concatenate(found), np.concatenate(due)

    def epochs(self, n_bytes: float) -> dict[str, float]:
        """How often each group is read in `n_bytes` of the mixture."""
        return {name: n_bytes * group.share / group.n_bytes for name, group in self.groups.items()}


def shares(
    n_bytes: Mapping[str, int], weights: Mapping[str, float], temperature: float, by: TemperatureBy
) -> dict[str, float]:
    """The share of each group, of its bytes and its weight."""
    classes = {name: language_of(name) if by == "language" else name for name in n_bytes}
    sizes: dict[str, int] = {}
    for name, size in n_bytes.items():
        sizes[classes[name]] = sizes.get(classes[name], 0) + size
    scaled = {name: weights[name] * size * sizes[classes[name]] ** (temperature - 1) for name, size in n_bytes.items()}
    total = sum(scaled.values())
    return {name: value / total for name, value in scaled.items()}


def language_of(group: str) -> str:
    """The part of a group's name after the last dot: `en` of `book.en`; the whole name without a dot."""
    return group.rpartition(".")[2]
