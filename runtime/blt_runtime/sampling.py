"""Choosing the next id from logits: greedy, or a draw from a trimmed distribution (float64 inside)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import number, whole

Array = npt.NDArray[Any]

FIRST = 16
"""Ids that are looked at one by one, from the most likely on, before all are sorted."""
CLOSE = 1e-9
"""A random number so close to a border between two ids (times the largest probability) is decided by the sorted form,
whose sums are rounded otherwise."""


class Sampler:
    """Chooses ids from logits [V].

    temperature 0 is argmax (the lowest id wins ties). Otherwise the logits are divided by the temperature and trimmed
    in this order: the `top_k` most likely ids; the smallest set of most likely ids whose probabilities sum to `top_p`;
    ids with at least `min_p` times the probability of the most likely. `seed` makes the draws repeatable; None uses
    fresh entropy. Raises UsageError for a value out of range.
    """

    def __init__(
        self,
        temperature: float,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        check_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        self.temperature, self.top_p, self.min_p = float(temperature), top_p, min_p
        self.top_k = None if top_k is None else int(top_k)
        self._random = generator(seed)

    def __call__(self, logits_V: Array) -> int:
        """The next id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        number = self._random.random()
        if self.top_k is None and self.top_p is None and self.min_p is None:
            id = self._among_first(logits_V, number)
            if id is not None:
                return id
        return self._from_sorted(logits_V, number)

    def _from_sorted(self, logits_V: Array, number: float) -> int:
        """The id whose share of the distribution, the most likely id first, holds `number` in [0, 1)."""
        order_V, mass_V = self.candidates(logits_V)
        total_V = np.cumsum(mass_V)
        drawn = np.searchsorted(total_V, number * total_V[-1], side="right")
        return int(order_V[min(int(drawn), len(order_V) - 1)])

    def _among_first(self, logits_V: Array, number: float) -> int | None:
        """The same id without sorting, in half the time, if it is one of the FIRST most likely; usually it is one of
        the first three. None otherwise, and if `number` is CLOSE to the border of an id."""
        scaled_V = logits_V.astype(np.float64) / max(self.temperature, 1e-6)
        id = int(scaled_V.argmax())
        mass_V = np.exp(scaled_V - scaled_V[id])
        left = number * float(mass_V.sum())
        for _ in range(min(FIRST, len(mass_V))):
            left -= mass_V.item(id)
            if left < CLOSE:
                return id if left < -CLOSE else None
            scaled_V[id] = -np.inf
            id = int(scaled_V.argmax())
        return None

    def draw(self) -> float:
        """A random number in [0, 1)."""
        return self._random.random()

    def forced(self) -> Sequence[int]:
        """Ids that must follow the one just chosen: a subclass may know them. They count as chosen."""
        return ()

    def copy(self) -> Sampler:
        """A sampler that will draw the same random numbers, and does not advance this one."""
        made = copy.copy(self)
        made._random = copy.deepcopy(self._random)
        return made

    def follow(self, ids_N: Array, forgotten: int = 0) -> None:
        """Before this sampler continues in a stream: the ids [N] that are there since it began, without the first
        `forgotten` that the stream no longer holds. A subclass that remembers its choices follows a rewind."""

    def skip(self) -> None:
        """Discards the random number of one id."""
        if self.temperature > 0:
            self._random.random()

    def candidates(self, logits_V: Array) -> tuple[Array, Array]:
        """The ids that remain after trimming, most likely first, and their probabilities (not renormalised)."""
        scaled_V = logits_V.astype(np.float64) / max(self.temperature, 1e-6)
        order_V = np.argsort(-scaled_V, kind="stable")[: self.top_k]
        mass_V = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
        mass_V /= mass_V.sum()
        keep = len(order_V)
        if self.top_p is not None:
            keep = min(keep, int(np.searchsorted(np.cumsum(mass_V), self.top_p)) + 1)
        if self.min_p is not None:
            keep = min(keep, int((mass_V >= self.min_p * mass_V[0]).sum()))
        return order_V[:keep], mass_V[:keep]

    def draft(self, logits_V: Array) -> tuple[int, Array]:
        """An id drawn from a drafter's logits, and its distribution [V], for `verify`."""
        q_V = self.probabilities(logits_V)
        return self._draw(q_V), q_V

    def verify(self, logits_V: Array, id: int, q_V: Array) -> int:
        """`id` if it is accepted, else another id: the result is distributed exactly as `self(logits_V)` is.

        `id` was drawn from q [V]. It is accepted with probability min(1, p/q), and else replaced by a draw from
        max(0, p - q) (Leviathan et al. 2023, arXiv 2211.17192, appendix A.1).
        """
        p_V = self.probabilities(logits_V)
        if self._random.random() * q_V[id] < p_V[id]:
            return id
        rest_V = np.maximum(p_V - q_V, 0.0)
        return self._draw(rest_V if rest_V.any() else p_V)

    def probabilities(self, logits_V: Array) -> Array:
        """The distribution of `self(logits_V)`: [V] float64, sum 1; one-hot at temperature 0."""
        p_V = np.zeros(len(logits_V))
        if self.temperature == 0:
            p_V[int(logits_V.argmax())] = 1.0
            return p_V
        order_V, mass_V = self.candidates(logits_V)
        p_V[order_V] = mass_V / mass_V.sum()
        return p_V

    def _draw(self, mass_V: Array) -> int:
        total_V = np.cumsum(mass_V)
        drawn = int(np.searchsorted(total_V, self._random.random() * total_V[-1], side="right"))
        return min(drawn, int(np.flatnonzero(mass_V)[-1]))


TOGETHER = 4
"""Samplers of one kind from which on they choose in one call of numpy."""


def choose_all(samplers: Sequence[Sampler], logits: Sequence[Array]) -> list[int]:
    """The choice of each sampler from its logits [V]: that of `sampler(logits_V)`, bit for bit, and each sampler draws
    its own random number. Samplers of one kind choose in one call; one of a subclass chooses alone."""
    chosen = [-1] * len(samplers)
    kinds: dict[tuple[bool, int | None] | None, list[int]] = {}
    for i, sampler in enumerate(samplers):
        plain = type(sampler) is Sampler
        kinds.setdefault((sampler.temperature == 0, sampler.top_k) if plain else None, []).append(i)
    for kind, members in kinds.items():
        if kind is None or len(members) < TOGETHER:
            ids = [samplers[i](logits[i]) for i in members]
        else:
            some, logits_QV = [samplers[i] for i in members], np.stack([logits[i] for i in members])
            ids = logits_QV.argmax(axis=1).tolist() if kind[0] else _draw_all(some, logits_QV)
        for i, id in zip(members, ids, strict=True):
            chosen[i] = id
    return chosen


def _draw_all(samplers: Sequence[Sampler], logits_QV: Array) -> list[int]:
    """The same steps as `Sampler.candidates` and `Sampler.__call__`, for rows with equal top_k."""
    temperature_Q = np.array([max(sampler.temperature, 1e-6) for sampler in samplers])
    scaled_QV = logits_QV.astype(np.float64) / temperature_Q[:, None]
    order_QK = np.argsort(-scaled_QV, axis=1, kind="stable")[:, : samplers[0].top_k]
    kept_QK = np.take_along_axis(scaled_QV, order_QK, axis=1)
    mass_QK = np.exp(kept_QK - kept_QK[:, :1])
    mass_QK /= mass_QK.sum(axis=1, keepdims=True)
    total_QK = np.cumsum(mass_QK, axis=1)
    size = mass_QK.shape[1]
    keep_Q = np.full(len(samplers), size)
    for q, sampler in enumerate(samplers):
        if sampler.top_p is not None:
            keep_Q[q] = min(keep_Q[q], int(np.searchsorted(total_QK[q], sampler.top_p)) + 1)
        if sampler.min_p is not None:
            keep_Q[q] = min(keep_Q[q], int((mass_QK[q] >= sampler.min_p * mass_QK[q, 0]).sum()))
    random_Q = np.array([sampler.draw() for sampler in samplers])
    row_Q = np.arange(len(samplers))
    limit_Q = random_Q * total_QK[row_Q, keep_Q - 1]
    drawn_Q = np.minimum((total_QK <= limit_Q[:, None]).sum(axis=1), keep_Q - 1)
    ids: list[int] = order_QK[row_Q, drawn_Q].tolist()
    return ids


def check_sampling(
    temperature: float,
    *,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | np.random.Generator | None,
) -> None:
    """Raises UsageError for a value of the wrong type or out of range."""
    number("temperature", temperature, lambda value: value >= 0, "a number from 0 up")
    if top_k is not None:
        whole("top_k", top_k, 1)
    if top_p is not None:
        number("top_p", top_p, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    if min_p is not None:
        number("min_p", min_p, lambda value: 0 <= value <= 1, "a number between 0 and 1")
    _check_seed(seed)


def generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """The generator of a seed; None uses fresh entropy. Raises UsageError."""
    _check_seed(seed)
    return np.random.default_rng(seed)


def _check_seed(seed: int | np.random.Generator | None) -> None:
    if seed is not None and not isinstance(seed, np.random.Generator):
        whole("seed", seed, wanted="a whole number from 0 up")
